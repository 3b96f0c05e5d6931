"""Schemas of answers, for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class Usage(BaseModel):
    """Token counts, up to and including the end-of-text or the stop string, and their cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    nfe: int
    tokens_per_forward: float
    seconds: float


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sfs_triton"
    context_length: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Answer(BaseModel):
    """A completion, or one chunk of it."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk", "text_completion"]
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: Usage | None = None
    seed: int | None = None
    diffusion: dict[str, Any] | None = None
