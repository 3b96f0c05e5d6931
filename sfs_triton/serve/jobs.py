"""One request in the engine: the steps of its sequence, converted to events for the client."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..models import ModelSpec
from ..scheduling.outputs import Generation
from ..scheduling.sequence import Sequence as InFlight
from ..scheduling.trace import StepTrace
from ..text.codec import TextCodec
from ..text.settled import SettledText
from .errors import ApiError, restarted
from .logprobs import TokenScore, TokenScores
from .options import PreparedRequest


@dataclass(frozen=True, slots=True)
class Started:
    """The sequence has a slot. ``frame`` is None unless frames were requested."""

    frame: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Stepped:
    """New text in order, which may be empty, with its tokens' scores and the step's frame if these were requested."""

    text: str
    frame: dict[str, Any] | None
    scores: tuple[TokenScore, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    text: str
    tokens: int
    nfe: int
    reason: str  # "stop": an end-of-text or a stop string; "length": every position holds text
    seconds: float
    scores: tuple[TokenScore, ...] = ()  # of all tokens, unless they were streamed


@dataclass(frozen=True, slots=True)
class Failed:
    error: ApiError


Event = Started | Stepped | Finished | Failed


class Job:
    """A request that waits, runs or is finished. ``emit`` receives its events, in the engine's thread."""

    def __init__(
        self,
        request: PreparedRequest,
        emit: Callable[[Event], None],
        *,
        stops: Sequence[str] = (),
        stream: bool = False,
        frames: bool = False,
        scored: bool = False,
        deadline: float = math.inf,
    ):
        self.request, self.stops, self.stream, self.frames, self.deadline = request, stops, stream, frames, deadline
        self.scored = scored
        self.left = False  # True once its client has disconnected
        self.outcome: Finished | Failed | None = None
        self._emit = emit

    @property
    def finished(self) -> bool:
        return self.outcome is not None

    def emit(self, event: Event) -> None:
        """Emit an event. The last one ends the job; later ones are dropped."""
        if self.finished:
            return
        if isinstance(event, (Finished, Failed)):
            self.outcome = event
        if not self.left:
            self._emit(event)


class OutputProcessor:
    """Emit the events of a job from the steps of its sequence, which may get a slot more than once."""

    def __init__(self, job: Job, codec: TextCodec, spec: ModelSpec, piece: Callable[[int], str]):
        self.job, self._spec, self._piece = job, spec, piece
        self._text, self._start_time = SettledText(codec, job.stops), 0.0
        self._nfe = self._emitted = 0
        self._scores = TokenScores(codec, piece) if job.scored else None

    @property
    def started(self) -> bool:
        """True once the sequence has had a slot."""
        return self._start_time > 0

    def start(self) -> None:
        """Note that the sequence has a slot."""
        if not self.started:
            self._start_time = time.monotonic()
            if self.job.stream:
                self.job.emit(Started(self._opening() if self.job.frames else None))

    def process(self, sequence: InFlight) -> None:
        """Emit the sequence's last step, and finish the job if its answer is complete.

        Raises:
            ApiError: a restart has decided positions otherwise than was emitted, or searched for stop strings.
        """
        if sequence.changed and (self.job.stream or self.job.stops):
            raise restarted()
        job, first, stop = self.job, self.job.request.first, self.job.request.stop
        if self._scores is not None:
            self._scores.note(sequence.trace, sequence.start - first)
        trace = sequence.take_trace()
        sequence.trace.clear()  # of steps that a restart has repeated
        self._nfe = sequence.steps
        canvas, settled = sequence.tokens, min(sequence.settled, stop)
        cut = self.job.request.cut and settled == stop  # what follows in the block is not part of the answer
        filled = cut or not sequence.running and not self._open(canvas)
        grown, self._emitted = settled > self._emitted, max(settled, self._emitted)
        new, answer = "", self._answer(canvas[first:settled])
        if filled or grown and (job.stream or job.stops):
            new = self._text.take(answer, filled)
        done = filled or self._text.stopped_at is not None
        shown = self._frame(sequence, trace) if job.frames and trace is not None else None
        self._emit(new, shown, answer, done)
        if done:
            self._finish(canvas[first:stop])

    def end(self, result: Generation) -> None:
        """Finish a sequence that its sampler's own limits left with undecided positions."""
        self._nfe = result.nfe
        response = result.canvas[self.job.request.first : self.job.request.stop]
        answer = self._answer(response)
        self._emit(self._text.take(answer, True), None, answer, True)
        self._finish(response)

    def _emit(self, new: str, frame: dict[str, Any] | None, answer: list[int], done: bool) -> None:
        """Emit new text, if the job streams."""
        if self.job.stream:
            scores = self._take_scores(answer, done)
            if new or frame or scores:
                self.job.emit(Stepped(new, frame, scores))

    def _take_scores(self, answer: list[int], done: bool) -> tuple[TokenScore, ...]:
        if self._scores is None:
            return ()
        return self._scores.take(answer, self._text.covered(answer, done))

    def _finish(self, response: list[int]) -> None:
        stopped, end = self._text.stopped_at, self._spec.end_of(response)
        tokens = stopped or (len(response) if end is None else end + 1)
        reason = "length" if stopped is None and end is None else "stop"
        seconds = time.monotonic() - self._start_time
        scores = () if self.job.stream else self._take_scores(self._answer(response), True)
        self.job.emit(Finished(self._text.text, tokens, self._nfe, reason, seconds, scores))

    def _answer(self, tokens: list[int]) -> list[int]:
        return tokens[: self._spec.end_of(tokens)]

    def _open(self, canvas: list[int]) -> bool:
        return self._spec.mask_id in canvas[self.job.request.first : self.job.request.stop]

    def _opening(self) -> dict[str, Any]:
        request = self.job.request
        params = request.sequence.params.to_dict()
        return {
            "type": "start",
            "prompt_length": request.first,
            "response_length": request.stop - request.first,
            "suffix_length": request.suffix,
            "mask_id": self._spec.mask_id,
            "eos_id": self._spec.eos_id,
            "end_ids": list(self._spec.end_ids),
            "sampler": params["sampler"],
            "cache": params["cache"],
            "seed": params["seed"],
        }

    def _frame(self, sequence: InFlight, trace: StepTrace) -> dict[str, Any]:
        """Return the step's changes as a frame; positions count from the answer's first."""
        request, canvas = self.job.request, sequence.tokens
        first, size = request.first, request.stop - request.first
        start, sampler = sequence.start, sequence.params.sampler
        block = start - first + trace.block * (sampler.block_length or 0)
        committed = []
        for place in (n for n in trace.committed if start + n < request.stop):
            score = trace.confidence[place]
            token, fine = canvas[start + place], score is not None and math.isfinite(score)
            committed.append(
                {
                    "position": start + place - first,
                    "token": token,
                    "text": self._piece(token),
                    "confidence": round(score, 5) if fine else None,
                }
            )
        closed = sampler.eos_stop and self._first_end(sequence)
        return {
            "type": "step",
            "step": trace.step,
            "phase": trace.phase,
            "block": trace.block,
            "cycle": trace.cycle,
            "span": [max(0, block + trace.s), None if trace.e is None else min(size, max(0, block + trace.e))],
            "committed": committed,
            "settled": max(0, min(sequence.settled, request.stop) - first),
            "masks_left": canvas[first : request.stop].count(self._spec.mask_id),
            "closed_from": closed if closed else None,
            "positions_forwarded": trace.positions_forwarded,
            "seconds": round(time.monotonic() - self._start_time, 6),
        }

    def _first_end(self, sequence: InFlight) -> int | None:
        """Return one past the leftmost committed end-of-text, counted from the answer's first position, or None."""
        first, stop = self.job.request.first, self.job.request.stop
        pairs = zip(sequence.tokens[first:stop], sequence.commit_step[first:stop], strict=True)
        return next((n + 1 for n, (token, at) in enumerate(pairs) if token in self._spec.end_ids and at >= 0), None)
