"""Requests of OpenAI's interface, with the extension fields of this server.

Unsupported values are refused with the field's name; ``docs/serving-api.md`` lists the fields without effect.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from .errors import ApiError

_NULLS = {"additionalProperties": {"type": "null"}}  # in the JSON schema: fields that are not declared
_STOPS, _STOP_LENGTH, _MESSAGES = 4, 256, 1024
# The escape of a lone surrogate.
_HALF = re.compile(
    rb"(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
)
_MOST_CHOICES = 8
_CHOSEN = "this server returns the log probabilities of chosen tokens only: logprobs=true in chat, 0 for completions"
_CALLS = "this server calls no tools"
_TEXT = "this server takes and gives text only"
# Fields that are accepted only with neutral values, and the error text for others.
UNSUPPORTED = {
    "n": f"this server returns 1 to {_MOST_CHOICES} choices per request",
    "best_of": "this server returns all choices",
    "tools": _CALLS,
    "tool_choice": _CALLS,
    "functions": _CALLS,
    "function_call": _CALLS,
    "response_format": "this server constrains no formats; only {'type': 'text'} is accepted",
    "logprobs": _CHOSEN,
    "top_logprobs": _CHOSEN,
    "logit_bias": "this server biases no tokens",
    "frequency_penalty": "this server has no penalties; only 0 is accepted",
    "presence_penalty": "this server has no penalties; only 0 is accepted",
    "echo": "this server does not repeat prompts",
    "modalities": _TEXT,
    # of messages
    "tool_calls": _CALLS,
    "refusal": _TEXT,
    "annotations": _TEXT,
    "audio": _TEXT,
}
# Error texts of fields that accept one of several shapes.
SHAPES = {
    "stop": f"must be a string, or a list of at most {_STOPS}, of 1 to {_STOP_LENGTH} characters each",
    "content": "must be a text, or a list of parts {'type': 'text', 'text': ...}",
    "prompt": "must be one text or one list of token ids, alone or as a list of one; several take several requests",
    "sampler": "must be a name, or an object with a 'kind' and options",
    "cache": "must be a name, or an object with a 'kind' and options",
}
# The replacement for a field that only the other interface has.
INSTEAD = {"prompt": "chat takes 'messages'", "suffix": "/v1/completions takes it", "messages": "give a 'prompt'"}


class Strict(BaseModel):
    """Base model that refuses undeclared fields and converts nothing: ``"5"`` and ``true`` are not numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class Lenient(Strict):
    """Base of messages and their parts: a null field is an absent one, since clients send answers back with nulls."""

    model_config = ConfigDict(json_schema_extra=_NULLS)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {k: value for k, value in given.items() if value is not None} if isinstance(given, dict) else given


class TextPart(Lenient):
    type: Literal["text"]
    text: str


class Message(Lenient):
    # an answer may lack its content, but no other message: the schema describes those
    model_config = ConfigDict(json_schema_extra={**_NULLS, "required": ["role", "content"]})

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[TextPart] | None, Field(json_schema_extra={"pattern": r"\S", "minItems": 1})] = ""
    # without effect
    name: str | None = None
    refusal: None = None
    annotations: Annotated[list[JsonValue], Field(max_length=0)] | None = None
    audio: None = None
    tool_calls: Annotated[list[JsonValue], Field(max_length=0)] | None = None
    function_call: None = None

    def plain(self) -> dict[str, str]:
        """Return the message in the format of chat templates."""
        parts = self.content or ""
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class TextFormat(Strict):
    type: Literal["text"]


Setting = str | dict[str, JsonValue]
Stop = Annotated[str, Field(min_length=1, max_length=_STOP_LENGTH)]


class Common(Strict):
    """Fields that chat and completions share."""

    model: Annotated[str, Field(max_length=512)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] | None = None
    # extensions of this server
    sampler: Setting | None = None
    cache: Setting | None = None
    frames: bool | None = None
    # without effect
    user: str | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def scored(self) -> bool:
        """True if log probabilities are requested."""
        return self.logprobs is not None and self.logprobs is not False

    @property
    def tokens_wanted(self) -> tuple[str, int | None]:
        """Return the field that sets the response length, and its value."""
        return "max_tokens", self.max_tokens


class ChatRequest(Common):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Literal[False] | None = None
    tools: Annotated[list[JsonValue], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[JsonValue], Field(max_length=0)] | None = None
    function_call: Literal["none"] | None = None
    response_format: TextFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Literal[0] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None

    @property
    def tokens_wanted(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is None:
            return "max_tokens", self.max_tokens
        return "max_completion_tokens", self.max_completion_tokens


TokenIds = Annotated[list[int], Field(max_length=1 << 20)]
OneText = Annotated[list[str], Field(min_length=1, max_length=1)]
OneList = Annotated[list[TokenIds], Field(min_length=1, max_length=1)]


class CompletionRequest(Common):
    """``POST /v1/completions``. With ``suffix``, the text between prompt and suffix is filled in."""

    prompt: str | OneText | TokenIds | OneList
    suffix: str | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: Literal[0] | None = None

    @property
    def only_prompt(self) -> str | list[int]:
        """Return the prompt: a list of one is what it holds."""
        listed = isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int)
        return self.prompt[0] if listed else self.prompt


def parse(kind: type[Common], body: bytes) -> Common:
    """Parse and check the body of a request.

    Raises:
        ApiError: 400; names the field.
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error, body) from None
    if request.frames and (request.n or 1) > 1:
        raise ApiError(400, f"'frames' shows one choice, and n={request.n}", param="frames")
    for given, needed in (("frames", "stream"), ("stream_options", "stream")):
        if getattr(request, given) and not getattr(request, needed):
            raise ApiError(400, f"{given!r} needs {needed!r}: true", param=given)
    if isinstance(request, ChatRequest) and None not in (request.max_tokens, request.max_completion_tokens):
        raise ApiError(400, "give 'max_tokens' or 'max_completion_tokens', not both", param="max_tokens")
    if isinstance(request, ChatRequest):
        _check_messages(request.messages)
    return request


def _check_messages(messages: list[Message]) -> None:
    """Refuse empty messages, but for the assistant's, and a conversation without a user message."""
    for index, message in enumerate(messages):
        if message.role != "assistant" and not message.plain()["content"].strip():
            raise ApiError(400, f"'messages.{index}' is empty: a {message.role} message needs text", param="messages")
    if not any(message.role == "user" for message in messages):
        raise ApiError(400, "'messages' has no user message", param="messages")


def _explain(error: ValidationError, body: bytes) -> ApiError:
    """Describe the first error of a body in one sentence."""
    problems = error.errors(include_url=False, include_context=False)
    elsewhere = (p for p in problems if p["type"] == "extra_forbidden" and p["loc"][0] in INSTEAD and not p["loc"][1:])
    first = next(elsewhere, problems[0])
    path = [str(part) for part in first["loc"]]
    name = path[0][:100] if path else None
    if first["type"] == "json_invalid":
        return ApiError(400, _not_json(first["msg"].removeprefix("Invalid JSON: "), body), code="invalid_json")
    if name is None:
        return ApiError(400, f"the body is not a JSON object: {first['msg']}")
    if first["type"] == "missing":
        return ApiError(400, f"{'.'.join(path)!r} is missing", param=name)
    field = ".".join(path[:3]) if name == "messages" else name  # its name stands in a message
    why = UNSUPPORTED.get(field.rpartition(".")[2])
    if why is not None:
        return ApiError(400, f"{field!r} is not supported: {why}", param=name, code="unsupported_parameter")
    if first["type"] == "extra_forbidden" and len(path) == 1:
        instead = f": {INSTEAD[name]}" if name in INSTEAD else ""
        return ApiError(400, f"{name!r} is not known here{instead}", param=name, code="unknown_parameter")
    if path == ["messages"] and first["type"] in ("too_short", "too_long"):
        return ApiError(400, f"'messages' must hold 1 to {_MESSAGES} messages", param=name)
    shaped = next((n for n, part in enumerate(path) if part in SHAPES), None)
    if shaped is not None:
        return ApiError(400, f"{'.'.join(path[: shaped + 1])!r} {SHAPES[path[shaped]]}", param=name)
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{'.'.join(path)[:200]!r} is not known here", param=name, code="unknown_parameter")
    given = first["input"]
    shown = f", not {given!r:.80}" if isinstance(given, (bool, float, str)) or _short(given) else ""
    return ApiError(400, f"{'.'.join(path)[:200]!r}: {first['msg']}{shown}", param=name)


def _short(given: Any) -> bool:
    """Return whether it is an integer that is short enough to be written out."""
    return isinstance(given, int) and abs(given) < 10**80


def _not_json(reason: str, body: bytes) -> str:
    half = _HALF.search(body) if "hex escape" in reason else None
    if half is not None:
        escape = half[0].decode()
        return f"the body is not valid JSON: {escape} is half of a surrogate pair, and stands alone ({reason})"
    return f"the body is not valid JSON: {reason}"
