"""Events as the JSON of OpenAI's chat and completion interfaces."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .jobs import Event, Failed, Finished, Started, Stepped
from .options import PreparedRequest
from .protocol import Common


@dataclass(slots=True)
class ResponseFormatter:
    """Format of one request's answer; ``chat`` or completion."""

    model: str
    request: PreparedRequest
    body: Common
    chat: bool
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)

    @property
    def _with_usage(self) -> bool:
        return self.body.stream_options is not None and self.body.stream_options.include_usage

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def whole(self, done: Finished) -> dict[str, Any]:
        """Return the complete answer as one JSON object."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": done.reason}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": done.text, "refusal": None}
        else:
            choice["text"] = done.text
        answer = self._head("chat.completion" if self.chat else "text_completion")
        return {**answer, "choices": [choice], "usage": self._usage(done), "seed": self._seed}

    def chunks(self, event: Event) -> Iterator[str]:
        """Yield the data fields of the server-sent events for one event."""
        if isinstance(event, Started):
            if self.chat:
                yield self._chunk({"role": "assistant", "content": ""})
            if event.frame:
                yield self._chunk({}, frame=event.frame)
        elif isinstance(event, Stepped):
            if event.frame:
                yield self._chunk({}, frame=event.frame)
            if event.text:
                yield self._chunk({"content": event.text})
        elif isinstance(event, Finished):
            yield self._chunk({}, reason=event.reason, frame=self._closing(event) if self.body.frames else None)
            if self._with_usage:
                yield self._dump({"choices": [], "usage": self._usage(event), "seed": self._seed})
            yield "[DONE]"
        elif isinstance(event, Failed):
            yield json.dumps(event.error.body(), ensure_ascii=False)

    def _chunk(self, delta: dict[str, str], reason: str | None = None, frame: dict[str, Any] | None = None) -> str:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": reason}
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
        return self.request.sequence.params.seed

    def _usage(self, done: Finished) -> dict[str, Any]:
        given = self.request.given
        return {
            "prompt_tokens": given,
            "completion_tokens": done.tokens,
            "total_tokens": given + done.tokens,
            "nfe": done.nfe,
            "tokens_per_forward": round(done.tokens_per_forward, 4),
            "seconds": round(done.seconds, 6),
        }

    def _closing(self, done: Finished) -> dict[str, Any]:
        return {"type": "end", "finish_reason": done.reason, "text": done.text, **self._usage(done)}
