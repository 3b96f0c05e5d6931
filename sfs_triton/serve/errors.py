"""Errors in the format of OpenAI's interface."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ..errors import ArgumentError, OutOfDeviceMemory, SequenceFault

_LONGEST = 1000  # characters of a message: some quote their input
_KINDS = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error", 504: "timeout_error"}


class ApiError(Exception):
    """An error response: a status, and a body ``{"error": {message, type, param, code}}``."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})
        self.message = message if len(message) <= _LONGEST else message[:_LONGEST] + " ..."

    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def busy(waiting: int, seconds: float) -> ApiError:
    """Return the error for a full queue; ``seconds`` is the estimated wait until there is room."""
    retry = {"Retry-After": str(min(60, max(1, math.ceil(seconds))))}
    return ApiError(429, f"{waiting} requests are waiting already; try again later", code="queue_full", headers=retry)


def stopping() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "10"})


def stopped() -> ApiError:
    return ApiError(
        503, "the engine has stopped after a failure; the server's log has the reason", code="engine_stopped"
    )


def device_failed() -> ApiError:
    return ApiError(
        503, "the device has failed, and the server must be started again; its log has the reason", code="device_failed"
    )


def restarted() -> ApiError:
    return ApiError(
        503,
        "the engine went on with another back end, whose answer differs from what was sent; send the request again",
        code="restarted",
        headers={"Retry-After": "1"},
    )


def too_late(limit: float) -> ApiError:
    return ApiError(504, f"the request was not finished within {limit:g} s", code="time_limit")


def from_argument(error: ArgumentError, param: str | None = None, length: str = "max_tokens") -> ApiError:
    """Convert an engine's ArgumentError to an error under the request's field name; ``param`` is the field at fault,
    ``length`` the one of the response length."""
    message = str(error).replace("gen_length", length)
    named = re.match(r"(\w+)=", message)
    return ApiError(400, message, param=param or named and named[1])


def too_long(message: str, param: str) -> ApiError:
    return ApiError(400, message, param=param, code="context_length_exceeded")


def from_failure(error: Exception) -> ApiError:
    """Convert the failure of an accepted generation; only messages known to be harmless are repeated."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ArgumentError):
        return from_argument(error)
    if isinstance(error, OutOfDeviceMemory):
        return ApiError(400, str(error), code="out_of_memory")
    if isinstance(error, SequenceFault):
        return ApiError(500, str(error), code="numerical_fault")
    return ApiError(500, "the generation failed; the server's log has the reason", code="internal_error")
