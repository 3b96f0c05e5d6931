"""A sequence: one request in flight, from its canvas to its result."""

from __future__ import annotations

import logging
from collections.abc import Sequence as List
from enum import Enum

from ..decoding.params import BatchKey, DecodingParams
from ..decoding.step_plan import StepOutput
from ..errors import CheckpointError, NumericalFault, SequenceFault, StepCapExceeded, require
from ..kernels.control import FAST, Progress
from ..models import ModelSpec
from ..runner.prompt_embeds import PromptEmbeds
from ..text.codec import TextCodec
from .outputs import Generation
from .trace import StepTrace, trace_step

logger = logging.getLogger("sfs_triton")


class Status(Enum):
    """Status of a sequence. Only the scheduler writes it."""

    WAITING = "waiting"  # has no slot
    RUNNING = "running"  # has a slot, and steps left
    DROPPED = "dropped"  # was ended from outside; takes no more steps
    GROWING = "growing"  # has decided its canvas, and continues with a longer one once the host has read it
    ENDING = "ending"  # takes no more steps; its final state has not reached the host
    FINISHED = "finished"  # final tokens and counters have reached the host
    FAILED = "failed"  # its batch has failed; it may be submitted again


class Sequence:
    """A sequence: its canvas and its progress, as the host last read them.

    Args:
        canvas: as long as it may become; where the sampler has it grow, it starts with a part of that.
        start: first position that may be decided; those before it are the prompt, and what earlier parts have decided.
        trace, frames: publish the inputs of each decision, and the canvas after each step.
        infilled: the canvas is its own response, which is not cut at an end-of-text.
        embeds: vectors at some places of the prompt, whose ids in the canvas mean nothing. One without places lets the
            sequence join others that have some.
    """

    def __init__(
        self,
        params: DecodingParams,
        canvas: list[int],
        start: int,
        mask_id: int,
        trace: bool = False,
        frames: bool = False,
        infilled: bool = False,
        embeds: PromptEmbeds | None = None,
    ):
        grow, self.bound, self.prompt_length = params.sampler.grow, len(canvas), start
        if grow is not None:
            fits = start > 0 and canvas[start:].count(mask_id) == len(canvas) - start
            require(fits, f"grow={grow} goes with a prompt before the response, not with infilling")
            require(not trace, f"grow={grow} does not go with a trace, whose positions count from a part")
            canvas = canvas[: start + grow]
        self.params, self.canvas, self.start, self._mask_id = params, canvas, start, mask_id
        self.embeds, self._revocable = embeds, params.sampler.draw().verify
        self.batch_key: BatchKey = params.batch_key(trace, frames)._replace(embeds=embeds is not None)
        self.status = Status.WAITING
        self._infilled = infilled
        self.masks = canvas.count(mask_id)
        self.tokens, self.commit_step = canvas, [-1] * len(canvas)  # as last read
        self.progress: Progress | None = None  # likewise; None before the first step
        self.seconds = 0.0  # duration of its batch's rounds while it held a slot
        self.last_committed: list[int] = []  # positions that its last step committed, or a restart decided otherwise
        self.changed = False  # True once a restart has decided positions otherwise than was reported before
        self._repeated, self.forward_lengths = 0, []
        self._before = (0, 0, 0)  # of earlier parts: steps, positions forwarded, full forwards
        self.begin()

    def begin(self) -> None:
        """Forget the steps that it has taken, before the first one or after a restart.

        The same number of steps is then repeated, and not reported again. Another back end rounds in another way, and
        may decide otherwise: the step that is reported next then replaces all that was decided before.
        """
        self._repeated = self.steps
        steps, self.positions_forwarded, self.full_forwards = self._before
        self.forward_lengths = self.forward_lengths[:steps]  # positions that each step's forward covered
        self.trace: list[StepTrace] = []

    def may_grow(self, spec: ModelSpec) -> bool:
        """Return whether a longer canvas follows, as far as the host has read this one."""
        room, at = len(self.canvas) < self.bound, self.progress
        return room and not at.masks_left and not at.fault and spec.end_of(self.tokens[self.start :]) is None

    def extend(self) -> None:
        """Continue with a longer canvas: what is decided becomes given. Its next step is the first of a part."""
        grow = self.params.sampler.grow
        self.start = len(self.canvas)
        self.canvas = self.tokens + [self._mask_id] * grow
        self.tokens, self.commit_step, self.progress = self.canvas, self.commit_step + [-1] * grow, None
        self.masks = grow
        self._before = len(self.forward_lengths), self.positions_forwarded, self.full_forwards

    @property
    def response_length(self) -> int:
        return len(self.canvas) - self.start

    @property
    def step_cap(self) -> int:
        """Step limit: more steps than it can take."""
        length = self.response_length
        return self.params.sampler.step_cap(length) + self.params.cache.extra_steps(length)

    @property
    def steps(self) -> int:
        """Number of its steps that have been reported."""
        return max(len(self.forward_lengths), self._repeated)

    @property
    def running(self) -> bool:
        """True if it has steps left, whether it holds a slot yet or not."""
        return self.status in (Status.WAITING, Status.RUNNING, Status.GROWING)

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED

    @property
    def fast(self) -> bool:
        """True in the fast stage."""
        return self.progress is not None and self.progress.stage == FAST

    @property
    def span(self) -> tuple[int, int]:
        """Span ``[s, e)`` of its cycle; ``e`` is -1 until it is known."""
        return (self.start, -1) if self.progress is None else (self.progress.span_start, self.progress.span_end)

    @property
    def settled(self) -> int:
        """Position before which everything is decided, for good."""
        at, given, commits = self.progress, self.canvas, self.commit_step
        limit = end = len(given)
        if at is not None:
            limit = at.limit
        if self._revocable and at is not None and not at.done:
            limit = end = at.block_start  # what follows may be taken back
        return next((p for p in range(self.start, limit) if given[p] == self._mask_id and commits[p] < 0), end)

    @property
    def fault(self) -> int:
        """Fault code: 0 none, 1 + the step whose logits held NaN, or -1 - the step at which its cap was reached."""
        fault, before = self.progress.fault if self.progress else 0, self._before[0]
        return fault + before if fault > 0 else fault - before if fault < 0 else 0

    def take_trace(self) -> StepTrace | None:
        """Remove and return the trace of its last step, if it is still there. Results lack the removed ones."""
        return self.trace.pop() if self.trace else None

    def record(self, slot: int, before: Progress, output: StepOutput) -> bool:
        """Record a step that it has taken in ``slot``, from the progress ``before`` it; return whether to report it."""
        policy, after = self.params.cache, output.progress[slot]
        firm = self.settled if self._revocable else len(self.canvas)
        covered = policy.covered(before, after.listed)
        recomputed = policy.recomputed(before, covered)
        self.forward_lengths.append(covered)
        self.positions_forwarded += recomputed
        self.full_forwards += recomputed >= before.limit
        if self.batch_key.trace:
            self.trace.append(trace_step(self.params, slot, len(self.canvas), before, recomputed, output))
        if len(self.forward_lengths) <= self._repeated and not after.done:
            return False
        self._repeated, self.progress = 0, after
        if self.batch_key.frames:
            was = list(zip(self.commit_step, self.tokens, strict=True))
            self._read(output.published["tokens"][slot], output.published["commit_step"][slot])
            now = list(zip(self.commit_step, self.tokens, strict=True))
            self.last_committed = [p for p in range(len(now)) if now[p] != was[p] and now[p][0] >= 0]
            pairs = zip(was[:firm], now[:firm], strict=True)
            self.changed |= any(old[0] >= 0 and old[1] != new[1] for old, new in pairs)
        return True

    def finish(self, final: dict) -> None:
        """Take over the final state: ``tokens``, ``commit_step`` and ``control`` as arrays."""
        self._repeated = 0
        self._read(final["tokens"], final["commit_step"])
        self.progress = Progress(*final["control"].tolist())

    def _read(self, tokens, commit_step) -> None:
        self.tokens, steps = (values[: len(self.canvas)].tolist() for values in (tokens, commit_step))
        before, here = self._before[0], steps[self.start :]
        self.commit_step = self.commit_step[: self.start] + [step + before if step >= 0 else step for step in here]

    def result(self, spec: ModelSpec, text: TextCodec | None) -> Generation:
        """Return the result from its final state."""
        canvas, progress = self.tokens, self.progress
        response = canvas[self.prompt_length :]
        end = None if self._infilled else spec.end_of(response)
        tokens = response if end is None else response[: end + 1]
        branches = 2 if self.params.sampler.cfg_scale else 1
        return Generation(
            text=None if text is None else _text_of(text, tokens),
            tokens=tokens,
            canvas=canvas,
            prompt_length=self.prompt_length,
            nfe=self._before[0] + (progress.step if progress else 0),
            forwards=branches * self.steps,
            positions_forwarded=branches * self.positions_forwarded,
            full_forwards=branches * self.full_forwards,
            forward_lengths=self.forward_lengths,
            commit_step=self.commit_step,
            masks_left=progress.masks_left if progress else self.masks,
            seconds=self.seconds,
            trace=self.trace if self.batch_key.trace else None,
            probabilities=self._probabilities(len(response)) if self.batch_key.trace else None,
        )

    def _probabilities(self, length: int) -> list[float | None]:
        """Return the probability of each token of the response as its step measured it."""
        found: list[float | None] = [None] * length
        if self.params.sampler.draw().metric == "confidence":
            for step in self.trace:
                for place in step.committed:
                    found[place] = step.confidence[place] or None  # 0 is the score of an end of text put last
        return found


def _text_of(codec: TextCodec, tokens: list[int]) -> str | None:
    """Return the text of ``tokens``; None, and a warning, where none can be made of them."""
    try:
        return codec.decode(tokens)
    except CheckpointError as error:
        logger.warning("a result has no text: %s", error)
        return None


def fault_of(sequences: List[Sequence], finished: dict[int, Generation]) -> SequenceFault | None:
    """Return the error for the faults of some sequences, or None; ``finished`` are the results of the others."""
    faults = {index: sequence.fault for index, sequence in enumerate(sequences) if sequence.fault}
    if not faults:
        return None
    broken = ", ".join(f"sequence {index} at step {fault - 1}" for index, fault in faults.items() if fault > 0)
    stuck = ", ".join(f"sequence {index} at step {-fault}" for index, fault in faults.items() if fault < 0)
    kinds = {"the model produced NaN logits": broken, "still undecided at the step cap of their sampler": stuck}
    text = "; ".join(f"{kind}: {which}" for kind, which in kinds.items() if which)
    return (NumericalFault if broken else StepCapExceeded)(text, finished)
