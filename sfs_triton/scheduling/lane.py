"""A persistent batch: fixed device buffers whose slots hold sequences that share one batch key."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from ..decoding.samplers import FixedSteps, Sampler
from ..errors import OutOfDeviceMemory, SfsError
from ..kernels.control import COLUMN
from ..models import Transformer
from ..runner import LoopChoice, Report, Step
from ..runner.host_ring import Mailbox
from ..runner.report import Reports
from ..runner.state import DecodeState, send
from .request import Kind
from .sequence import Row

_LEFT: list[Mailbox] = []  # of failed batches: a device that still runs may write there, so the memory is never freed
_CANVAS = 130  # bytes per position of a canvas: decode state and published copies
_PATIENCE = 60.0  # seconds to wait for the final copy of a sequence


class Lane:
    """A persistent batch: a fixed number of slots for canvases of at most ``length`` positions.

    Sequences join and leave between steps. All tensors are allocated once, at fixed addresses: a sequence that joins or
    leaves changes values in them only, so nothing is captured again, and the others get the results that they would
    get alone. A free slot holds a sequence that is done.

    Args:
        length: positions of a canvas.
        response: most positions of a sequence that may be decoded.
    """

    def __init__(self, model: Transformer, kind: Kind, slots: int, length: int, response: int, loops: LoopChoice):
        self.model, self.kind, self.slots, self.length, self._loops = model, kind, slots, length, loops
        self._key = (kind, slots, length, response if _is_timed(kind.sampler) else None)
        full = False
        try:
            with torch.device("cpu"):  # not the caller's default device
                self._allocate(response)
        except RuntimeError as error:
            if not is_lack_of_memory(error):
                raise
            full = True
        if model.group.any(full):  # partial allocations are free again here
            raise OutOfDeviceMemory(self._no_room())
        self._rows: list[Row | None] = [None] * slots
        self._ending: list[int] = []  # slots of done sequences whose final copy has not been read
        self._reports: Reports | None = None
        self.sound = True  # False: must not be used again

    def _allocate(self, response: int) -> None:
        model, kind = self.model, self.kind
        self.state = DecodeState.blank(
            batch=self.slots,
            length=self.length,
            window=getattr(kind.sampler, "window", 1),
            mask_id=model.spec.mask_id,
            eos_id=model.spec.eos_id,
            device=model.device,
            trace=kind.trace,
        )
        if _is_timed(kind.sampler):
            steps = [(n, kind.sampler.block_steps(n)) for n in range(1, response + 1)]
            sizes = {"shares": max(step for _, step in steps)}
            if kind.sampler.metric == "origin":
                sizes["uniform"] = max(n * step for n, step in steps)
            for name, size in sizes.items():
                setattr(self.state, name, torch.zeros((self.slots, size), device=model.device))
        self.step = Step(model, kind.sampler, kind.policy, self.state, frames=kind.frames)
        state = self.state
        self._outbox = [
            Mailbox(
                {"tokens": state.tokens[slot], "commit_step": state.commit_step[slot], "control": state.control[slot]},
                1,
                model.ops.publish,
                model.device,
            )
            for slot in range(self.slots)
        ]

    @staticmethod
    def bytes_needed(model: Transformer, kind: Kind, slots: int, length: int) -> int:
        """Return the bytes of caches and canvases, without the activations of a step."""
        store, branches = kind.policy.store, 2 if kind.sampler.cfg_scale else 1
        cache = 0 if store is None else branches * store.values(model.local, length) * model.dtype.itemsize
        return slots * (cache + _CANVAS * length)

    def _no_room(self) -> str:
        model, needed = self.model, Lane.bytes_needed(self.model, self.kind, self.slots, self.length)
        text = (
            f"{self.slots} canvases of {self.length} positions with cache={self.kind.policy.name!r} need "
            f"{needed / 2**30:.2f} GiB on {str(model.device)!r}"
        )
        if model.device.type != "cuda":
            return text + "; use fewer or shorter canvases"
        kept = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)  # by torch, unused
        free = torch.cuda.mem_get_info(model.device)[0] + kept
        fits = int(self.length * free / needed)
        return (
            text + f", and {free / 2**30:.2f} GiB are free: {self.slots} canvases of up to {fits} positions would fit"
        )

    # ------------------------------------------------------------------------------------------ join and leave

    def fits(self, kind: Kind, slots: int, length: int, response: int) -> bool:
        """Return whether a new persistent batch with these arguments would be equal to this one."""
        return self._key == (kind, slots, length, response if _is_timed(kind.sampler) else None)

    def expect(self, prompts: Sequence[int], masks: Sequence[int]) -> None:
        """Prepare for sequences within these bounds: prompt lengths and numbers of undecided positions.

        Captures missing graphs. All slots must be free.
        """
        self.step.expect(prompts, masks)
        loop = self._loops.loop
        try:
            with torch.inference_mode(), torch.device("cpu"):
                loop.prepare(self.step)
        except RuntimeError as error:
            full = is_lack_of_memory(error)
            if full or isinstance(error, SfsError) or not self._loops.fall_back(loop, error):
                self._leave()
                if full:
                    raise OutOfDeviceMemory(self._no_room()) from error
                raise

    @property
    def rows(self) -> list[Row]:
        """Return the sequences that hold a slot."""
        return [row for row in self._rows if row is not None]

    @property
    def free(self) -> int:
        """Return the number of free slots."""
        return self._rows.count(None)

    def join(self, row: Row) -> None:
        """Put a sequence into a free slot; it takes its first step in the next round."""
        slot = self._rows.index(None)
        self._rows[slot] = row
        self._enter(slot, row)

    def _enter(self, slot: int, row: Row) -> None:
        sampler, block_steps = row.sampler, 0
        with torch.inference_mode(), torch.device("cpu"):
            if isinstance(sampler, FixedSteps):
                block_steps = sampler.block_steps(row.response_length)
                if _is_timed(sampler):
                    _set_schedule(self.state, slot, row)
            self.step.join(
                slot,
                row.canvas,
                row.start,
                block_length=getattr(sampler, "block_length", None),
                seed=row.seed,
                cap=row.step_cap,
                sampling=sampler.sampling_values(),
                block_steps=block_steps,
            )
        if self.step.control[slot][COLUMN["done"]]:  # nothing to decide
            row.control = self.step.control[slot]
            self._end(slot)

    def drop(self, row: Row) -> None:
        """End a sequence before its next step; the others are not affected. A step that is already queued still runs,
        but its output is ignored. A sequence that has ended stays as it is."""
        slot = self._rows.index(row)
        if not row.dropped and slot not in self._ending:
            row.dropped = True
            self.step.drop(slot)
            self._end(slot)

    def _end(self, slot: int) -> None:
        """Queue the final copy of a slot's sequence, behind the work already launched."""
        outbox = self._outbox[slot]
        with torch.inference_mode():
            outbox.post()
        outbox.posted += 1
        self._ending.append(slot)

    def _collect(self, wait: bool) -> None:
        """Read the final copies that have arrived, or all with ``wait``, and free the slots of their sequences."""
        # a slot is reused only after its copy was read: its outbox holds one copy, which the next end overwrites
        for slot in list(self._ending):
            outbox, row = self._outbox[slot], self._rows[slot]
            if wait or outbox.has(outbox.posted):
                letter = outbox.read(outbox.posted, _PATIENCE)
                row.tokens, row.commit_step = (
                    letter[name][0 : len(row.canvas)].tolist() for name in ("tokens", "commit_step")
                )
                row.control, row.over = letter["control"].tolist(), True
                self._rows[slot] = None
                self._ending.remove(slot)

    # ---------------------------------------------------------------------------------------------------------- steps

    def advance(self) -> list[Row]:
        """Run one round, in which every running sequence takes a step; return the sequences that did. A finished one is
        ``over`` once its final copy has been read, in this round or a later one."""
        began, device, here = time.perf_counter(), self.model.device.type, self.rows
        exact = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        moved: list[Row] = []
        try:
            with exact:  # a caller's autocast would mix dtypes in the caches
                while (report := self._next()) is not None:
                    moved += self._tell(report)
                    if report.last and moved:
                        break
            # all ranks of a group must free slots at the same step, whenever the copies arrive
            self._collect(wait=self.model.group.size > 1 or not any(row.running for row in self.rows))
        except BaseException:
            self._leave()
            raise
        seconds = time.perf_counter() - began
        for row in here:
            row.seconds += seconds
        return moved

    def _tell(self, report: Report) -> list[Row]:
        """Update the sequences of a report, except those that repeat a step after a fall-back; return the updated."""
        told = []
        for view in report.rows:
            row = self._rows[view.index]
            if view.step >= row.steps:
                row.take(view, report)
                told.append(row)
            if report.control[view.index][COLUMN["done"]]:
                self._end(view.index)
        return told

    def _next(self) -> Report | None:
        if self._reports is None:
            self._reports = self._decode()
        report = next(self._reports, None)
        if report is None:
            self._reports = None
        return report

    def _decode(self) -> Reports:
        """Yield reports. If a loop fails on the device, restart all sequences on the next loop."""
        while True:
            loop = self._loops.loop
            try:
                yield from loop.run(self.step)
                return
            except RuntimeError as error:  # torch raises CUDA errors as this
                told = isinstance(error, SfsError) or is_lack_of_memory(error)  # no other loop would succeed
                if told or not self._loops.fall_back(loop, error):
                    raise
            for slot, row in enumerate(self._rows):
                if row is not None and slot not in self._ending:
                    self._enter(slot, row)

    def close(self) -> None:
        """Stop at any point: sequences keep their present state, and all slots become free."""
        if self._reports is not None:
            try:
                self._reports.close()
            except BaseException:
                self._leave()
                raise
            self._reports = None
        with torch.inference_mode():
            self.state.done.fill_(1)
        for slot, row in enumerate(self._rows):
            if row is not None and slot not in self._ending:
                self.step.drop(slot)
        self._ending, self._rows = [], [None] * self.slots

    def _leave(self) -> None:
        """Abandon this batch and keep its host memory: the device may still write there."""
        if self.sound:
            self.sound = False
            _LEFT.extend((self.step.mailbox, *self._outbox))


def _is_timed(sampler: Sampler) -> bool:
    """Return whether ``sampler`` follows Dream's time schedule, which is per sequence."""
    return isinstance(sampler, FixedSteps) and sampler.metric != "confidence"


def _set_schedule(state: DecodeState, slot: int, row: Row) -> None:
    """Write a sequence's time schedule and, for random positions, its stream of uniform numbers."""
    shares = row.sampler.shares(row.response_length)
    send(state.shares[slot, : len(shares)], shares)
    if row.sampler.metric == "origin":
        draws = len(shares) * row.response_length
        source = torch.Generator().manual_seed(row.seed)
        send(state.uniform[slot, :draws], torch.rand(draws, generator=source, dtype=torch.float32))


def is_lack_of_memory(error: BaseException) -> bool:
    """Return whether torch reports lack of memory: by class for a GPU, by message for the host."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
