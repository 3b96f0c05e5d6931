"""A generation from its request to its results."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from .caching import CachePolicy
from .errors import NumericalFault, OutOfDeviceMemory, SfsError, StepCapExceeded, require
from .generation import Frame, Generation, frame
from .kernels.control import COLUMN
from .loops import Loop, LoopChoice, Report, Step
from .loops.mailbox import Mailbox
from .models import Transformer
from .samplers import FixedSteps, Sampler, SlowFast, Threshold
from .state import DecodeState
from .text import TextCodec
from .trace import StepTrace, Tracer

_LEFT: list[Mailbox] = []  # of runs that failed: no one else may have their memory


@dataclass(frozen=True)
class Request:
    """Checked arguments of a generation: canvases of token ids, where each is decoded from, and how."""

    canvases: list[list[int]]
    starts: list[int]
    sampler: Sampler
    policy: CachePolicy
    seeds: list[int]
    trace: bool = False
    frames: bool = False

    def __post_init__(self) -> None:
        known = isinstance(self.sampler, (SlowFast, Threshold, FixedSteps))
        require(known, f"sampler={self.sampler!r} is not a SlowFast, Threshold or FixedSteps")
        self.sampler.check_cache(self.policy)
        self.sampler.rules(**self.policy.rules)  # which refuse what does not go together
        for seed in self.seeds:
            require(0 <= seed < 2**63, f"seed={seed} is not in [0, 2**63)")

    @property
    def lengths(self) -> list[int]:
        """Positions that may be decoded, of each row."""
        return [len(canvas) - start for canvas, start in zip(self.canvases, self.starts, strict=True)]

    @property
    def caps(self) -> list[int]:
        return [self.sampler.step_cap(n) + self.policy.extra_steps(n) for n in self.lengths]


class Session:
    """The tensors of a generation, on which one request after another can run if they are of one kind.

    A request's :meth:`key` says what that is: batch, canvas length, sampler, policy, and what is posted.
    """

    def __init__(self, model: Transformer, request: Request, length: int):
        self.model, self._key = model, Session.key(request, length)
        full = False
        try:
            with torch.device("cpu"):
                self.state = DecodeState.blank(
                    batch=len(request.canvases),
                    length=length,
                    window=getattr(request.sampler, "window", 1),
                    mask_id=model.spec.mask_id,
                    eos_id=model.spec.eos_id,
                    device=model.device,
                    trace=request.trace,
                )
                self.step = Step(model, request.sampler, request.policy, self.state, frames=request.frames)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError) and "memory" not in str(error):
                raise
            full = True
        if full:  # what was allocated before it failed is free again by now
            raise OutOfDeviceMemory(_no_room(model, request, length))

    @staticmethod
    def key(request: Request, length: int) -> tuple:
        lengths = tuple(request.lengths) if isinstance(request.sampler, FixedSteps) else ()
        batch = len(request.canvases)
        return (batch, length, request.sampler, request.policy, request.trace, request.frames, lengths)

    def fits(self, request: Request, length: int) -> bool:
        """Whether the request can run here."""
        return self._key == Session.key(request, length)

    def run(self, request: Request, loop: Loop) -> Iterator[Report]:
        """Decode; yields a report a step."""
        masks = [canvas.count(self.model.spec.mask_id) for canvas in request.canvases]
        self.step.expect(request.starts, masks)
        with torch.inference_mode(), torch.device("cpu"):  # and not what the caller's default device is
            self.state.done.fill_(1)  # so that what prepares decides nothing
            if isinstance(request.sampler, FixedSteps):
                _set_schedule(self.state, request.sampler, request.lengths, request.seeds)
            loop.prepare(self.step)
            self.state.begin(
                request.canvases,
                request.starts,
                block_length=getattr(request.sampler, "block_length", None),
                seeds=request.seeds,
                caps=request.caps,
            )
            self.state.block_steps.copy_(_block_steps(request))
        self.step.begin()
        yield from loop.run(self.step)

    def result(self) -> tuple[list[list[int]], list[list[int]]]:
        """Tokens and commit steps, in one copy from the device."""
        tokens, commits = torch.stack((self.state.tokens, self.state.commit_step)).tolist()
        return tokens, commits


class Run:
    """One request on one session: its reports or frames, one a step, then :meth:`results`."""

    def __init__(self, session: Session, request: Request, loops: LoopChoice, text: TextCodec | None):
        self._session, self._request, self._loops, self._text = session, request, loops, text
        self._reports = self._decode()
        ends = [len(canvas) for canvas in request.canvases]
        self._tracer = Tracer(request.sampler, request.policy, request.starts, ends)
        self._seconds, self._control = 0.0, None
        self._dropped: set[int] = set()
        self.sound = True  # whether the session can be used again

    def _decode(self) -> Iterator[Report]:
        """Reports; where a loop fails on the device, the one below it starts again, and repeats none of them."""
        told = 0
        while True:
            loop = self._loops.loop
            try:
                for number, report in enumerate(self._session.run(self._request, loop)):
                    if number == told:
                        told += 1
                        yield report
                return
            except RuntimeError as error:  # what torch raises for CUDA's
                if isinstance(error, SfsError) or not self._loops.fall_back(loop, error):
                    raise

    def close(self) -> None:
        """Stop, wherever it is."""
        try:
            self._reports.close()
        except BaseException:
            self._leave()
            raise

    def _leave(self) -> None:
        """Give up a session whose device may still be at work, and write to memory of the host."""
        self.sound = False
        _LEFT.append(self._session.step.mailbox)

    def advance(self) -> Report | None:
        """The next step's report, None at the end. Only the time in here counts as the generation's."""
        began, device = time.perf_counter(), self._session.model.device.type
        exact = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        try:
            with exact:  # a caller's autocast would mix dtypes in the caches
                report = next(self._reports, None)
        except BaseException:
            self._leave()
            raise
        if report is not None:
            self._tracer.after(report)
            self._control = report.control
            self._end_dropped()
        self._seconds += time.perf_counter() - began
        return report

    def drop(self, index: int) -> None:
        """End a row between two steps: it takes none any more, and costs none. The others go on as they would have.

        Its result is the row as it then stands, ``masks_left`` of it undecided. A step that a loop has queued ahead is
        still taken, but no report or frame tells of the row in it.

        Raises:
            RuntimeError: no step has been taken yet.
            ArgumentError: there is no such row.
        """
        rows = len(self._request.canvases)
        require(0 <= index < rows, f"row={index} is not one of the {rows} rows of this generation")
        if self._control is None:
            raise RuntimeError(f"row {index} cannot be dropped before the first step")
        self._dropped.add(index)
        self._end_dropped()

    def _end_dropped(self) -> None:
        """Mark rows that were dropped as done: on the device, and in what the loop has last heard of it.

        A loop that falls back starts all rows again, so this is done after every step.
        """
        for index in self._dropped:
            if not self._control[index][COLUMN["done"]]:
                with torch.inference_mode():
                    self._session.state.done[index].fill_(1)  # in order with the device's other work; nothing is read
                self._control[index][COLUMN["done"]] = 1

    def take_traces(self) -> list[StepTrace | None]:
        """Each row's trace of its last step, if it has not been taken. Results do not have those that were."""
        return [steps.pop() if steps else None for steps in self._tracer.rows]

    def frames(self) -> Iterator[Frame]:
        while (report := self.advance()) is not None:
            yield frame(report, self._request.canvases, self._session.model.spec.mask_id)

    def results(self) -> list[Generation]:
        """The rows of a run that is over.

        Raises:
            NumericalFault, StepCapExceeded: for some rows; the others are in its ``finished``, by row.
        """
        began = time.perf_counter()
        tokens, commits = self._session.result()
        self._seconds += time.perf_counter() - began
        rows = {}
        for index, control in enumerate(self._control):
            if not control[COLUMN["fault"]]:
                rows[index] = self._row(index, tokens[index], commits[index], control)
        _raise_faults(self._control, rows)
        return list(rows.values())

    def _row(self, index: int, canvas: list[int], commits: list[int], control: list[int]) -> Generation:
        request, spec, tracer = self._request, self._session.model.spec, self._tracer
        start, end = request.starts[index], len(request.canvases[index])
        canvas, commits = canvas[:end], commits[:end]
        response = canvas[start:]
        generated = start > 0 and spec.eos_id in response  # a canvas that was filled in is kept whole
        tokens = response[: response.index(spec.eos_id) + 1] if generated else response
        branches = 2 if request.sampler.cfg_scale else 1
        return Generation(
            text=None if self._text is None else self._text.decode(tokens),
            tokens=tokens,
            canvas=canvas,
            prompt_length=start,
            nfe=control[COLUMN["step"]],
            forwards=branches * len(tracer.forward_lengths[index]),
            rows_forwarded=branches * tracer.rows_forwarded[index],
            full_forwards=branches * tracer.full_forwards[index],
            forward_lengths=tracer.forward_lengths[index],
            commit_step=commits,
            masks_left=control[COLUMN["masks_left"]],
            seconds=self._seconds,
            trace=tracer.rows[index] if request.trace else None,
        )


def _raise_faults(control: list[list[int]], finished: dict[int, Generation]) -> None:
    faults = {index: row[COLUMN["fault"]] for index, row in enumerate(control) if row[COLUMN["fault"]]}
    broken = ", ".join(f"row {index} at step {fault - 1}" for index, fault in faults.items() if fault > 0)
    stuck = ", ".join(f"row {index} at step {-fault}" for index, fault in faults.items() if fault < 0)
    kinds = {"the model produced NaN logits": broken, "still undecided at the step cap of their sampler": stuck}
    text = "; ".join(f"{kind}: {rows}" for kind, rows in kinds.items() if rows)
    if faults:
        raise (NumericalFault if broken else StepCapExceeded)(text, finished)


def _set_schedule(state: DecodeState, sampler: FixedSteps, lengths: Sequence[int], seeds: Sequence[int]) -> None:
    """Write each row's time schedule and, for random positions, its stream of uniform numbers."""
    steps = [sampler.block_steps(length) for length in lengths]
    shares = [sampler.shares(length) for length in lengths]
    rows = [row + [0.0] * (max(steps) - len(row)) for row in shares]
    tables = {"shares": torch.tensor(rows, dtype=torch.float32)}
    if sampler.metric == "origin":
        draws = max(n * length for n, length in zip(steps, lengths, strict=True))
        sources = [torch.Generator().manual_seed(seed) for seed in seeds]
        tables["uniform"] = torch.stack([torch.rand(draws, generator=g, dtype=torch.float32) for g in sources])
    for name, table in tables.items():
        mine = getattr(state, name)
        if mine.shape == table.shape:
            mine.copy_(table)
        else:
            setattr(state, name, table.to(state.tokens.device))


def _block_steps(request: Request) -> torch.Tensor:
    """Steps that a block of each row has, where the sampler fixes them."""
    fixed = isinstance(request.sampler, FixedSteps)
    return torch.tensor([request.sampler.block_steps(n) if fixed else 0 for n in request.lengths])


def _bytes_needed(model: Transformer, request: Request, length: int) -> int:
    """What the caches and the canvas of a generation take, without its activations."""
    store, batch = request.policy.store, len(request.canvases)
    branches = 2 if request.sampler.cfg_scale else 1
    cache = 0 if store is None else branches * store.values(model.spec, length) * model.dtype.itemsize
    return batch * (cache + 80 * length)


def _no_room(model: Transformer, request: Request, length: int) -> str:
    batch, needed = len(request.canvases), _bytes_needed(model, request, length)
    text = (
        f"{batch} canvases of {length} positions with cache={request.policy.name!r} need "
        f"{needed / 2**30:.2f} GiB on {str(model.device)!r}"
    )
    if model.device.type != "cuda":
        return text + "; use fewer or shorter canvases"
    kept = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)  # by torch, unused
    free = torch.cuda.mem_get_info(model.device)[0] + kept
    fits = int(length * free / needed)
    return text + f", and {free / 2**30:.2f} GiB are free: {batch} canvases of up to {fits} positions would fit"
