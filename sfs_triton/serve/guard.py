"""Checks that every request passes before it is routed, and request counts."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

from .errors import ApiError
from .metrics import Metrics
from .settings import ServeSettings

logger = logging.getLogger("sfs_triton")

_LINGER = 1.0  # seconds for which the rest of an oversized body is still read

_PROTECTED = ("/v1/", "/metrics")  # paths that need the API key
# The page loads only its own files, runs no inline code, and cannot be framed.
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self' data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}


class RequestLimits:
    """ASGI middleware: host, API key, type and size of the body. Refuses with OpenAI-shaped errors.

    The whole body is read here, within a limit of bytes and of seconds, before any other work for the request.
    """

    def __init__(self, app: Any, settings: ServeSettings, metrics: Metrics):
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1003})
            else:
                await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 500

        async def counted(message: dict) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=message["headers"])
                headers.update(_HEADERS)
                headers.setdefault("Cache-Control", "no-cache")  # never use a cached page of an older version
            await send(message)

        try:
            await self._pass(scope, receive, counted)
        finally:
            route = getattr(scope.get("route"), "path", "other")  # not the raw path: its number of values is unbounded
            self._metrics.answered(route, status, time.monotonic() - began)

    async def _pass(self, scope: dict, receive: Any, send: Any) -> None:
        started = False

        async def noted(message: dict) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            self._check_headers(scope)
            body = await self._body(scope, receive)
            await self._app(scope, _replayed(body, receive), noted)
        except ApiError as error:
            await refuse(error)(scope, receive, send)
        except Exception:  # of a route: before the response has started, send an OpenAI-shaped error
            logger.exception("%s %r failed", scope["method"], scope["path"])
            if started:
                raise
            await refuse(ApiError(500, "internal error", code="internal_error"))(scope, receive, send)

    def _check_headers(self, scope: dict) -> None:
        settings, headers = self._settings, Headers(scope=scope)
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # the path that routes match
        if not settings.knows_host(headers.get("host", "localhost")):
            raise ApiError(421, "this Host is not accepted; --allow-host adds a name", code="unknown_host")
        if settings.api_key is not None and path.startswith(_PROTECTED):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not _same(key.strip(), settings.api_key):
                challenge = {"WWW-Authenticate": "Bearer"}
                raise ApiError(401, "a valid API key is needed", code="invalid_api_key", headers=challenge)
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            coding = ", ".join(headers.getlist("content-encoding")).strip().lower()
            if coding not in ("", "identity"):
                message = f"Content-Encoding: {coding[:40]} is not read here; send the body as it is"
                raise ApiError(415, message, code="unsupported_content_encoding")
            if kind != "application/json":  # a page of another origin can send other types without a preflight
                raise ApiError(415, "Content-Type must be application/json", code="unsupported_media_type")

    async def _body(self, scope: dict, receive: Any) -> bytes:
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and len(declared) < 20 and int(declared) > self._settings.max_body:
            if "expect" not in headers:  # a client that sends Expect has not started to send the body
                await self._linger(receive)
            raise self._too_large()
        try:
            return await asyncio.wait_for(self._read(receive), self._settings.body_seconds)
        except (asyncio.TimeoutError, TimeoutError):
            raise ApiError(408, "the body did not arrive in time", headers={"Connection": "close"}) from None

    async def _read(self, receive: Any) -> bytes:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise ApiError(499, "the client has left")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._settings.max_body:
                if message.get("more_body"):
                    await self._linger(receive)
                raise self._too_large()
            if not message.get("more_body"):
                return b"".join(parts)

    async def _linger(self, receive: Any) -> None:
        """Read and discard for a moment: closing a connection with unread bytes resets it, and the client may not see
        the response."""

        async def rest() -> None:
            while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                pass

        try:
            await asyncio.wait_for(rest(), _LINGER)
        except (asyncio.TimeoutError, TimeoutError):
            pass

    def _too_large(self) -> ApiError:
        close = {"Connection": "close"}
        return ApiError(413, f"the body is over {self._settings.max_body} bytes", code="too_large", headers=close)


def refuse(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


def _same(given: str, wanted: str) -> bool:
    """Compare two keys in a time that depends neither on where they differ nor on their length."""
    one, other = (hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest() for key in (given, wanted))
    return hmac.compare_digest(one, other)


def _replayed(body: bytes, receive: Any) -> Any:
    """Return a ``receive`` that yields the body once, then the messages after it."""
    given = False

    async def again() -> dict:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
