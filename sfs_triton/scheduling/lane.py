"""Slots on the device in which rows of one kind are decoded side by side."""

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

_LEFT: list[Mailbox] = []  # of lanes that failed: no one else may have their memory
_CANVAS = 130  # bytes a position of a canvas, of what is decided there and of what is posted
_PATIENCE = 60.0  # seconds that the last copy of a row may take


class Lane:
    """A fixed number of slots for canvases of at most ``length`` positions. Rows join and leave between steps.

    All tensors are there from the start, at fixed addresses: a row that comes or goes changes numbers in them, so
    nothing is captured anew, and rows that are there already get what they would get alone. Free slots are rows that
    are done.

    Args:
        length: of the canvases.
        response: most positions of a row that may be decoded.
    """

    def __init__(self, model: Transformer, kind: Kind, slots: int, length: int, response: int, loops: LoopChoice):
        self.model, self.kind, self.slots, self.length, self._loops = model, kind, slots, length, loops
        self._key = (kind, slots, length, response if _is_timed(kind.sampler) else None)
        full = False
        try:
            with torch.device("cpu"):  # and not what the caller's default device is
                self._allocate(response)
        except RuntimeError as error:
            if not is_lack_of_memory(error):
                raise
            full = True
        if model.group.any(full):  # what was allocated before it failed is free again by now
            raise OutOfDeviceMemory(self._no_room())
        self._rows: list[Row | None] = [None] * slots
        self._ending: list[int] = []  # slots of rows that are done, whose last copy is on its way
        self._reports: Reports | None = None
        self.sound = True  # whether it can be used again

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
                model.ops.post,
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

    # ------------------------------------------------------------------------------------------ rows that come and go

    def fits(self, kind: Kind, slots: int, length: int, response: int) -> bool:
        """Return whether a new lane with these arguments would be the same."""
        return self._key == (kind, slots, length, response if _is_timed(kind.sampler) else None)

    def expect(self, prompts: Sequence[int], masks: Sequence[int]) -> None:
        """Be ready for rows with these prompt lengths and so many undecided positions, and all in between. No row may
        be there. Captures what has not been captured."""
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
        """The rows that are in a slot."""
        return [row for row in self._rows if row is not None]

    @property
    def free(self) -> int:
        """Slots without a row."""
        return self._rows.count(None)

    def join(self, row: Row) -> None:
        """Put a row into a free slot; its first step is in the round after the one that runs."""
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
                dials=sampler.dials(),
                block_steps=block_steps,
            )
        if self.step.control[slot][COLUMN["done"]]:  # there is nothing to decide
            row.control = self.step.control[slot]
            self._end(slot)

    def drop(self, row: Row) -> None:
        """End a row before its next step; the others go on as they would have. A step that a loop has queued ahead is
        still taken, but nothing tells of it. Does nothing to a row that has ended."""
        slot = self._rows.index(row)
        if not row.dropped and slot not in self._ending:
            row.dropped = True
            self.step.drop(slot)
            self._end(slot)

    def _end(self, slot: int) -> None:
        """Have the device post how a row ends, after what has been started."""
        outbox = self._outbox[slot]
        with torch.inference_mode():
            outbox.post()
        outbox.posted += 1
        self._ending.append(slot)

    def _collect(self, wait: bool) -> None:
        """Free the slots of rows that have ended, and whose last copy has come or is waited for."""
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
        """One round: every row that runs takes a step; the rows that did. One at its end is ``over`` once its last copy
        has come, in this round or a later one."""
        began, device, here = time.perf_counter(), self.model.device.type, self.rows
        exact = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        moved: list[Row] = []
        try:
            with exact:  # a caller's autocast would mix dtypes in the caches
                while (report := self._next()) is not None:
                    moved += self._tell(report)
                    if report.last and moved:
                        break
            # of a group, every rank must find slots free at the same step
            self._collect(wait=self.model.group.size > 1 or not any(row.running for row in self.rows))
        except BaseException:
            self._leave()
            raise
        seconds = time.perf_counter() - began
        for row in here:
            row.seconds += seconds
        return moved

    def _tell(self, report: Report) -> list[Row]:
        """Let rows know of a step that they took, unless it is one that they take again."""
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
        """Reports; where a loop fails on the device, the one below it starts all rows again."""
        while True:
            loop = self._loops.loop
            try:
                yield from loop.run(self.step)
                return
            except RuntimeError as error:  # what torch raises for CUDA's
                told = isinstance(error, SfsError) or is_lack_of_memory(error)  # another loop would fare no better
                if told or not self._loops.fall_back(loop, error):
                    raise
            for slot, row in enumerate(self._rows):
                if row is not None and slot not in self._ending:
                    self._enter(slot, row)

    def close(self) -> None:
        """Stop, wherever it is: rows that are there are left as they are, and their slots are free."""
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
        """Give up: the device may still be at work, and write to memory of the host."""
        if self.sound:
            self.sound = False
            _LEFT.extend((self.step.mailbox, *self._outbox))


def _is_timed(sampler: Sampler) -> bool:
    """Return whether it follows Dream's time schedule, which each sequence has for itself."""
    return isinstance(sampler, FixedSteps) and sampler.metric != "confidence"


def _set_schedule(state: DecodeState, slot: int, row: Row) -> None:
    """Write a row's time schedule and, for random positions, its stream of uniform numbers."""
    shares = row.sampler.shares(row.response_length)
    send(state.shares[slot, : len(shares)], shares)
    if row.sampler.metric == "origin":
        draws = len(shares) * row.response_length
        source = torch.Generator().manual_seed(row.seed)
        send(state.uniform[slot, :draws], torch.rand(draws, generator=source, dtype=torch.float32))


def is_lack_of_memory(error: BaseException) -> bool:
    """Return whether torch reports lack of memory: a class for a GPU's, a text for the host's."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
