"""Events as the JSON of OpenAI's chat and completion interfaces."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .jobs import Event, Failed, Finished, Started, Stepped
from .logprobs import TokenScore, of_chat, of_completion
from .options import PreparedRequest
from .protocol import Common


@dataclass(slots=True)
class ResponseFormatter:
    """Format of one request's answer, of one or several choices; ``chat`` or completion."""

    model: str
    requests: Sequence[PreparedRequest]
    body: Common
    chat: bool
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    _done: list[Finished] = field(default_factory=list)  # choices whose streams have ended

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)

    @property
    def _with_usage(self) -> bool:
        return self.body.stream_options is not None and self.body.stream_options.include_usage

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def whole(self, done: Sequence[Finished]) -> dict[str, Any]:
        """Return the complete answer, of its choices in order, as one JSON object."""
        choices = []
        for index, one in enumerate(done):
            choice = self._choice(index, one.reason, one.scores)
            if self.chat:
                choice["message"] = {"role": "assistant", "content": one.text, "refusal": None}
            else:
                choice["text"] = one.text
            choices.append(choice)
        answer = self._head("chat.completion" if self.chat else "text_completion")
        return {**answer, "choices": choices, "usage": self._usage(done), "seed": self._seed}

    def chunks(self, index: int, event: Event) -> Iterator[str]:
        """Yield the data fields of the server-sent events for one event of the choice ``index``."""
        if isinstance(event, Started):
            if self.chat:
                yield self._chunk(index, {"role": "assistant", "content": ""})
            if event.frame:
                yield self._chunk(index, {}, frame=event.frame)
        elif isinstance(event, Stepped):
            if event.frame:
                yield self._chunk(index, {}, frame=event.frame)
            if event.text or event.scores:
                yield self._chunk(index, {"content": event.text}, scores=event.scores)
        elif isinstance(event, Finished):
            self._done.append(event)
            frame = self._closing(event) if self.body.frames else None
            yield self._chunk(index, {}, reason=event.reason, frame=frame)
            if len(self._done) == len(self.requests):
                if self._with_usage:
                    yield self._dump({"choices": [], "usage": self._usage(self._done), "seed": self._seed})
                yield "[DONE]"
        elif isinstance(event, Failed):
            yield json.dumps(event.error.body(), ensure_ascii=False)

    def _choice(self, index: int, reason: str | None, scores: Sequence[TokenScore]) -> dict[str, Any]:
        """Return what choices of all forms share."""
        form = of_chat if self.chat else of_completion
        wanted = self.body.scored and (scores or not self.body.stream)
        return {"index": index, "logprobs": form(scores) if wanted else None, "finish_reason": reason}

    def _chunk(
        self,
        index: int,
        delta: dict[str, str],
        reason: str | None = None,
        frame: dict[str, Any] | None = None,
        scores: Sequence[TokenScore] = (),
    ) -> str:
        choice = self._choice(index, reason, scores)
        choice |= {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        rest: dict[str, Any] = {"usage": None} if self._with_usage else {}
        if frame is not None:
            rest["diffusion"] = frame
        return self._dump({"choices": [choice], **rest})

    def _dump(self, rest: dict[str, Any]) -> str:
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        return json.dumps({**head, **rest}, ensure_ascii=False, allow_nan=False)

    @property
    def _seed(self) -> int:
        return self.requests[0].sequence.params.seed

    def _usage(self, done: Sequence[Finished]) -> dict[str, Any]:
        given = self.requests[0].given
        tokens, nfe = sum(one.tokens for one in done), sum(one.nfe for one in done)
        return {
            "prompt_tokens": given,
            "completion_tokens": tokens,
            "total_tokens": given + tokens,
            "nfe": nfe,
            "tokens_per_forward": round(tokens / max(1, nfe), 4),
            "seconds": round(max(one.seconds for one in done), 6),
        }

    def _closing(self, done: Finished) -> dict[str, Any]:
        return {"type": "end", "finish_reason": done.reason, "text": done.text, **self._usage([done])}
