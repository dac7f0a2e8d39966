"""The application: routes, and what every request passes through on its way in and out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from llmcore.inference.async_engine import AsyncEngine
from llmcore.inference.engine import Engine
from llmcore.inference.language_model import LanguageModel
from llmcore.serve import chat, completions, embeddings
from llmcore.serve.errors import ApiError, invalid, timed_out, unavailable
from llmcore.serve.job import Job, Served
from llmcore.serve.limits import Gate, Limits, check_key, read_body, until_gone
from llmcore.serve.metrics import Metrics
from llmcore.serve.protocol import ChatRequest, CompletionRequest, EmbeddingRequest
from llmcore.serve.reasoning import thinks
from llmcore.serve.tool_parsers import TOOL_PARSERS, guess_tool_parser

log = logging.getLogger("llmcore.serve")

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_CLIENT_LEFT = 499
_GRACE = 5.0  # seconds in which a client may still fetch what its request got before its time was up


def create_app(
    model: LanguageModel | None,
    *,
    engine: Engine | None = None,
    embedder: Any = None,
    name: str | None = None,
    limits: Limits | None = None,
    tool_parser: str | None = None,
    reasoning: bool | None = None,
    pooling: str = "mean",
    page: bool = True,
) -> FastAPI:
    """The application that serves a model.

    Args:
        model: None for a server of embeddings alone.
        engine: what runs the model; None: made with its defaults.
        embedder: an `llmcore.inference.TextEmbedder`, where another model than `model` makes the embeddings.
        name: of the model to clients; None: where it came from.
        limits: who may ask for how much.
        tool_parser: one of `tool_parsers.TOOL_PARSERS`; None: by the chat template.
        reasoning: whether to tell thoughts from answers; None: for models that mark their thoughts.
        pooling: of the model's own embeddings.
        page: whether there is a page to chat on at `/`.
    """
    limits = limits or Limits()
    if tool_parser is not None and tool_parser not in TOOL_PARSERS:
        raise ValueError(f"tool_parser is {tool_parser!r}; accepted: {', '.join(map(repr, TOOL_PARSERS))}")
    running = None
    if model is not None:
        running = AsyncEngine(engine or Engine.from_language_model(model))
        tool_parser = tool_parser or guess_tool_parser(model.tokenizer)
        reasoning = thinks(model.tokenizer) if reasoning is None else reasoning
    if embedder is not None:
        embedder = embeddings.EncoderEmbedder(embedder)
    elif model is not None:
        embedder = embeddings.DecoderEmbedder(model, running, pooling)
    served = Served(
        name=name or (model.source if model is not None else "") or "model",
        language_model=model,
        engine=running,
        embedder=embedder,
        limits=limits,
        gate=Gate(limits),
        metrics=Metrics(None if running is None else running.stats),
        tool_parser=tool_parser or "hermes",
        reasoning=bool(reasoning),
    )
    app = FastAPI(title="llmcore", docs_url=None, redoc_url=None, openapi_url=None, lifespan=_lifespan)
    app.state.served = served
    _add_errors(app)
    _add_reading(app, served)
    for path, shape, answer in _ROUTES:
        app.router.routes.append(Route(path, Endpoint(served, path, shape, answer), methods=["POST"]))
    if page and model is not None and model.can_chat:
        _add_page(app)
    return app


_ROUTES: list[tuple[str, type[BaseModel], Callable[[Job, Any], Awaitable[Response]]]] = [
    ("/v1/chat/completions", ChatRequest, chat.answer),
    ("/v1/completions", CompletionRequest, completions.answer),
    ("/v1/embeddings", EmbeddingRequest, embeddings.answer),
]


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    served: Served = app.state.served
    try:
        yield
    finally:  # whoever runs the application has waited for requests to end; what is left ends here
        served.gate.closed = True
        if served.engine is not None:
            await served.engine.drain(0)
            await asyncio.to_thread(served.engine.close)


class Endpoint:
    """A route that takes a JSON body. The order: key, room, size, form, and then `answer`.

    Whatever happens, the request's place is free and its blocks are given back when this returns: the answer has been
    sent, the client has gone, or the time is up.
    """

    def __init__(
        self, served: Served, path: str, shape: type[BaseModel], answer: Callable[[Job, Any], Awaitable[Response]]
    ) -> None:
        self._served, self._path, self._shape, self._answer = served, path, shape, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun, status = time.monotonic(), _CLIENT_LEFT
        metrics, started = self._served.metrics, False

        async def watched(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
            await send(message)

        metrics.in_flight.inc()
        try:
            await self._serve(Request(scope, receive, watched))
        except ClientDisconnect:
            status = _CLIENT_LEFT
        except ApiError as error:
            if not started:
                await error.response()(scope, receive, watched)
        except Exception:
            log.exception("%s failed", self._path)
            if not started:
                await ApiError("the server has a fault", status=500, code="fault").response()(scope, receive, watched)
            status = 500
        finally:
            metrics.in_flight.dec()
            metrics.requests.labels(self._path, status).inc()
            metrics.seconds.labels(self._path).observe(time.monotonic() - begun)

    async def _serve(self, request: Request) -> None:
        served = self._served
        check_key(request, served.limits)
        with served.gate.entered():
            body = await read_body(request, served.limits)
            try:
                asked = self._shape.model_validate_json(body)
            except ValidationError as error:
                raise invalid(error) from None
            del body
            if served.engine is None and self._shape is not EmbeddingRequest:
                raise ApiError(f"{served.name} makes embeddings alone; accepted: /v1/embeddings", code="unsupported")
            with Job(served) as job:
                work = asyncio.wait_for(self._send(request, job, asked), served.limits.timeout + _GRACE)
                try:
                    await until_gone(request, work)
                except asyncio.TimeoutError:
                    raise timed_out(served.limits.timeout) from None

    async def _send(self, request: Request, job: Job, asked: BaseModel) -> None:
        response = await self._answer(job, asked)
        await response(request.scope, request.receive, request._send)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        text = {404: f"there is no {request.url.path[:200]}", 405: f"{request.method} is not for {request.url.path}"}
        message = text.get(error.status_code, str(error.detail))
        return ApiError(message, status=error.status_code, headers=dict(error.headers or {})).response()


def _add_reading(app: FastAPI, served: Served) -> None:
    """The routes that change nothing."""

    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": served.created, "owned_by": "llmcore"}

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        check_key(request, served.limits)
        return JSONResponse({"object": "list", "data": [card(name) for name in [served.name, *served.adapters]]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        check_key(request, served.limits)
        served.adapter(name)
        return JSONResponse(card(name))

    @app.get("/health")
    async def health() -> Response:
        if served.gate.closed:
            raise unavailable("the server is shutting down", "shutting_down")
        if served.engine is not None and not served.engine.alive:
            raise unavailable("the engine has died", "engine_failed")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(served.metrics.text(), headers={"Content-Type": Metrics.CONTENT_TYPE})


def _add_page(app: FastAPI) -> None:
    for path, file in PAGE_FILES.items():
        app.router.routes.append(Route(path, _page(PAGE / file), methods=["GET"]))


def _page(file: Path) -> Callable[[Request], Awaitable[Response]]:
    async def page(_: Request) -> Response:
        return FileResponse(file, headers=SECURITY_HEADERS | {"Cache-Control": "no-cache"})

    return page
