"""The ASGI application: routes and their OpenAPI descriptions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from ..engine import Engine
from ..errors import ArgumentError
from ..version import __version__
from .answers import ResponseFormatter
from .errors import ApiError, from_argument
from .guard import RequestLimits, refuse
from .jobs import Job
from .metrics import Metrics
from .options import prepare
from .protocol import ChatRequest, Common, CompletionRequest, parse
from .schemas import Answer, ErrorBody, ModelCard, ModelList
from .settings import ServeSettings
from .sse import Answering, EventQueue
from .worker import Worker

PAGE = Path(__file__).parent / "page"  # index.html is served at /, its assets below /page
_SCHEMAS = "#/components/schemas/"
_REFUSALS = {
    400: "The request cannot be answered; names the field at fault.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not declared as JSON, or as encoded.",
    421: "The Host header names another server.",
    429: "The queue is full; Retry-After has the estimated wait in seconds.",
    500: "The generation failed.",
    503: "The server is shutting down, or its engine has stopped.",
    504: "The time limit has passed.",
}


def create_app(engine: Engine, settings: ServeSettings | None = None) -> FastAPI:
    """Create a server of one engine. ``app.state.worker`` runs from the application's startup to its shutdown.

    Raises:
        ArgumentError: the engine's checkpoint has no tokenizer.
    """
    settings = settings or ServeSettings()
    engine.codec(f"model={settings.model!r}: a server")
    metrics = Metrics()
    worker = Worker(engine, settings, metrics)
    metrics.follow(worker)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await run_in_threadpool(worker.close)

    app = FastAPI(title="sfs_triton", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.engine, app.state.settings, app.state.worker, app.state.metrics = engine, settings, worker, metrics
    app.add_middleware(RequestLimits, settings=settings, metrics=metrics)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(ApiError, _api_error)
    _add_completions(app)
    _add_models(app)
    _add_state(app)
    app.openapi = lambda: _openapi(app)
    _add_page(app)
    return app


def _add_completions(app: FastAPI) -> None:
    async def answer(request: Request, kind: type[Common]) -> Response:
        state, began = request.app.state, time.monotonic()
        state.worker.check_room()
        body = parse(kind, await request.body())
        try:
            prepared = await run_in_threadpool(prepare, state.engine, state.settings, body)
        except ArgumentError as error:
            raise from_argument(error) from None
        events, deadline = EventQueue(), began + state.settings.time_limit
        how = {"stops": body.stops, "stream": bool(body.stream), "frames": bool(body.frames), "scored": body.scored}
        puts = (partial(events.put, choice) for choice in range(len(prepared)))
        jobs = [Job(one, put, **how, deadline=deadline) for one, put in zip(prepared, puts, strict=True)]
        formatter = ResponseFormatter(state.settings.model, prepared, body, chat=kind is ChatRequest)
        state.worker.submit(*jobs)
        return Answering(jobs, events, formatter, state.worker)

    @app.post("/v1/chat/completions", **_described(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation, through the checkpoint's chat template."""
        return await answer(request, ChatRequest)

    @app.post("/v1/completions", **_described(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Continue a text, or fill in the text before a suffix."""
        return await answer(request, CompletionRequest)


def _add_models(app: FastAPI) -> None:
    created = int(time.time())
    settings, spec = app.state.settings, app.state.engine.spec
    card = ModelCard(id=settings.model, created=created, context_length=spec.max_length)

    @app.get("/v1/models", responses=_refusals(401, 421))
    async def models() -> ModelList:
        """List the served model."""
        return ModelList(data=[card])

    @app.get("/v1/models/{model:path}", responses=_refusals(401, 404, 421))
    async def model(model: str) -> ModelCard:
        """Return the model of this name."""
        if model != settings.model:
            raise ApiError(404, f"there is no model {model!r} here, only {settings.model!r}", code="model_not_found")
        return card


def _add_state(app: FastAPI) -> None:
    worker, metrics, engine = app.state.worker, app.state.metrics, app.state.engine

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses=_refusals(421, 503))
    async def health() -> dict[str, str | None]:
        """Liveness: the engine works. With weights, back end and execution in use, and why others were given up."""
        if worker.failure is not None:
            raise worker.failure
        described = engine.describe()
        shown = ("quantization", "backend", "execution", "reason", "fallback")
        return {"status": "ok", **{name: described[name] for name in shown}}

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", responses=_refusals(421, 503))
    async def ready() -> dict[str, str]:
        """Readiness: new requests are accepted."""
        if not worker.ready:
            raise ApiError(503, "no requests are accepted", code="not_ready")
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **_refusals(401)})
    async def counted() -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI) -> None:
    """Add the page on routes of its own: a mount at / would hide errors of requests to other routes."""
    index = PAGE / "index.html"

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(index)

    app.mount("/page", StaticFiles(directory=PAGE))


def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    """Return an OpenAI-shaped error for requests that the framework refuses: unknown routes, wrong methods."""
    said = f"{error.detail}: {request.method} {request.url.path}"[:300]
    return refuse(ApiError(error.status_code, said, headers=error.headers))


def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    return refuse(ApiError(400, "; ".join(problem["msg"] for problem in error.errors())))


def _api_error(request: Request, error: ApiError) -> JSONResponse:
    return refuse(error)


def _refusals(*statuses: int) -> dict[int, dict[str, Any]]:
    return {status: {"model": ErrorBody, "description": _REFUSALS[status]} for status in statuses}


def _described(kind: type[Common]) -> dict[str, Any]:
    """Return the route keywords that describe a body parsed by :func:`parse` to OpenAPI."""
    body = {"required": True, "content": {"application/json": {"schema": {"$ref": _SCHEMAS + kind.__name__}}}}
    # no schema of the stream: readers of the document differ on whether it is of an event or of the whole body
    said = "The answer; if stream is true, its chunks as server-sent events."
    done = {"model": Answer, "description": said, "content": {"text/event-stream": {}}}
    return {"openapi_extra": {"requestBody": body}, "responses": {200: done, **_refusals(*_REFUSALS)}}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document, with the schemas of bodies that are not parameters of their routes."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = schema.setdefault("components", {}).setdefault("schemas", {})
        for kind in (ChatRequest, CompletionRequest):
            own = kind.model_json_schema(ref_template=_SCHEMAS + "{model}")
            schemas |= own.pop("$defs", {})
            schemas[kind.__name__] = own
        if app.state.settings.api_key is not None:
            schema["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"bearer": []}]
        app.openapi_schema = schema
    return app.openapi_schema
