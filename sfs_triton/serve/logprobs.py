"""Log probabilities of the tokens of an answer, in the forms of OpenAI's two interfaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..scheduling.trace import StepTrace
from ..text.codec import UNFINISHED, TextCodec

_LEAST = -9999.0  # OpenAI's number for a probability of 0


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A chosen token of an answer: spelt out, its bytes in the answer and where its text starts there, its score."""

    token: str
    data: bytes | None
    offset: int
    logprob: float


class TokenScores:
    """The scores of an answer's tokens, collected from the traces of steps and returned in order, each once."""

    def __init__(self, codec: TextCodec, piece: Callable[[int], str]):
        self._codec, self._piece, self._special = codec, piece, set(codec.special_ids().values())
        self._probabilities: dict[int, float] = {}  # by index in the answer
        self._next, self._offset, self._unfinished = 0, 0, []

    def note(self, steps: Iterable[StepTrace], start: int) -> None:
        """Collect the probabilities of tokens that some steps have committed; ``start``: of places in the answer."""
        for step in steps:
            for place in step.committed:
                self._probabilities[start + place] = step.confidence[place]

    def take(self, tokens: Sequence[int], count: int) -> tuple[TokenScore, ...]:
        """Return the scores of the first ``count`` tokens that were not returned before; undecided ones have none."""
        first, self._next = self._next, max(self._next, count)
        known = (index for index in range(first, count) if index in self._probabilities)
        return tuple(self._score(index, tokens[index]) for index in known)

    def _score(self, index: int, token: int) -> TokenScore:
        piece = self._piece(token) if index or token in self._special else self._codec.decode([token])
        text = "" if token in self._special else piece
        if UNFINISHED in text:  # its character is complete with a later token
            self._unfinished.append(token)
        elif text and self._unfinished:
            self._offset += len(self._codec.decode(self._unfinished))
            self._unfinished = []
        offset = self._offset
        self._offset += 0 if self._unfinished else len(text)
        probability = self._probabilities[index]
        data = self._codec.bytes_of(token) if UNFINISHED in text else text.encode()
        return TokenScore(piece, data, offset, math.log(min(1.0, probability)) if probability else _LEAST)


def of_chat(scores: Iterable[TokenScore]) -> dict[str, Any]:
    """Return the ``logprobs`` of a choice in a chat."""
    content = [
        {
            "token": score.token,
            "logprob": score.logprob,
            "bytes": None if score.data is None else list(score.data),
            "top_logprobs": [],
        }
        for score in scores
    ]
    return {"content": content, "refusal": None}


def of_completion(scores: Iterable[TokenScore]) -> dict[str, Any]:
    """Return the ``logprobs`` of a choice of ``/v1/completions``."""
    scores = list(scores)
    return {
        "tokens": [score.token for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": None,
        "text_offset": [score.offset for score in scores],
    }
