"""The routes: OpenAI's API, health, metrics, and the page with what it shows."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import Receive, Scope, Send

import moespac
from moespac.config import ServeConfig
from moespac.engine.engine import Engine
from moespac.serve import errors
from moespac.serve.answer import Answer, Ended, Wish
from moespac.serve.errors import ApiError
from moespac.serve.guard import Guard
from moespac.serve.live import Live
from moespac.serve.metrics import Metrics
from moespac.serve.replies import DONE, ChatReply, Reply, ReplyFactory, TextReply, event
from moespac.serve.schemas import (
    ChatCompletion,
    ChatRequest,
    CommonRequest,
    CompletionRequest,
    ErrorReply,
    Health,
    ModelCard,
    ModelList,
    TextCompletion,
)
from moespac.serve.words import Words
from moespac.serve.worker import GONE, Worker
from moespac.timeline import Record

T = TypeVar("T")

PAGE = Path(__file__).with_name("page.html")

_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply} for status in (400, 401, 403, 404, 405, 413, 429, 500, 503)
}
_STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


class Service:
    """One engine, served: what the routes need."""

    def __init__(
        self,
        engine: Engine,
        model: str,
        config: ServeConfig,
        api_key: str | None = None,
        record: Record | None = None,
    ) -> None:
        """``model``: the name it is asked for by; ``record``: where the timeline goes, beside the page."""
        self.model = model
        self.config = config
        self.api_key = api_key
        self.started = int(time.time())
        self.words = Words(engine.tokenizer)
        self.metrics = Metrics()
        observers: list[Any] = [self.metrics]
        self.worker = Worker(engine, config, observers)
        self.live = Live(engine, self.worker, config, record)
        observers.append(self.live)
        self.metrics.watch(engine, self.worker)
        self.sent: Callable[[float], None] = (
            self.metrics.sent
        )  # is told of each streamed piece: seconds from the engine to the socket

    def stop(self) -> None:
        """Let go of the engine."""
        self.worker.stop()
        self.live.stop()

    def card(self) -> dict[str, Any]:
        return {"id": self.model, "object": "model", "created": self.started, "owned_by": "moespac"}

    def health(self) -> dict[str, Any]:
        return {
            "status": "ok" if self.worker.is_open else "stopping",
            "model": self.model,
            "version": moespac.__version__,
            "active": self.worker.active,
            "waiting": self.worker.waiting,
        }


def create_app(service: Service, check_host: bool = True) -> Guard:
    """The ASGI application. ``check_host``: see ``guard.Guard``; for servers without a key on loopback."""
    app = FastAPI(title="moespac", version=moespac.__version__, docs_url=None, redoc_url=None)
    errors.install(app)
    _add_api(app, service)
    _add_page(app, service)
    return Guard(
        app,
        api_key=service.api_key,
        check_host=check_host,
        body_bytes=service.config.body_bytes,
        counted=service.metrics.requested,
    )


def _add_api(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", response_model=ModelList, responses=_REFUSALS)
    async def models() -> Any:
        return {"object": "list", "data": [service.card()]}

    @app.get("/v1/models/{model:path}", response_model=ModelCard, responses=_REFUSALS)
    async def model(model: str) -> Any:
        _check_model(model, service)
        return service.card()

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=_REFUSALS | _STREAMED)
    async def chat(request: Request, body: ChatRequest) -> Response:
        conversation = [message.plain() for message in body.messages]
        wish = Wish(conversation, body.limit, body.settings())
        return await _answer(request, service, body, wish, ChatReply)

    @app.post("/v1/completions", response_model=TextCompletion, responses=_REFUSALS | _STREAMED)
    async def complete(request: Request, body: CompletionRequest) -> Response:
        wish = Wish(body.one_prompt(), body.limit, body.settings())
        return await _answer(request, service, body, wish, TextReply)

    @app.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> Response:
        return JSONResponse(service.health(), 200 if service.worker.is_open else 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})


def _add_page(app: FastAPI, service: Service) -> None:
    html = PAGE.read_bytes()
    policy = _content_policy(html.decode("utf-8"))

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(html, media_type="text/html", headers={"Content-Security-Policy": policy})

    @app.get("/api/live", include_in_schema=False)
    async def live() -> Response:
        return JSONResponse(await service.live.look() | {"model": service.model})


async def _answer(
    request: Request, service: Service, body: CommonRequest, wish: Wish, make_reply: ReplyFactory
) -> Response:
    _check_model(body.model, service)
    answer = Answer(wish)
    service.worker.submit(answer)
    try:
        begun = await _unless_gone(request, answer.begun())
        reply = make_reply(service.model, service.words, begun.prompt_tokens)
        if body.stream:
            return _EventStream(service.worker, answer, _chunks(service, answer, reply, body.include_usage))
        return JSONResponse(await _unless_gone(request, _whole(answer, reply)))
    except BaseException:
        service.worker.cancel(answer)
        raise


class _EventStream(StreamingResponse):
    """An answer as server-sent events. Whatever ends it, the client's leaving too, ends the answer."""

    def __init__(self, worker: Worker, answer: Answer, chunks: AsyncIterator[bytes]) -> None:
        super().__init__(chunks, media_type="text/event-stream")
        self._worker = worker
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._worker.cancel(self._answer)


async def _whole(answer: Answer, reply: Reply) -> dict[str, Any]:
    async for piece in answer.events():
        if isinstance(piece, Ended):
            return reply.whole(piece.finish_reason)
        reply.add(piece)
    raise AssertionError("events() ends with Ended, or raises")


async def _chunks(service: Service, answer: Answer, reply: Reply, usage: bool) -> AsyncIterator[bytes]:
    try:
        if (first := reply.first_chunk()) is not None:
            yield event(first)
        async for piece in answer.events():
            if isinstance(piece, Ended):
                yield event(reply.last_chunk(piece.finish_reason))
                continue
            reply.add(piece)
            if piece.text or piece.logprobs:
                yield event(reply.chunk(piece))
                service.sent(time.monotonic() - answer.told)
        if usage:
            yield event(reply.usage_chunk())
        yield DONE
    except ApiError as error:  # too late for a status
        yield event(error.body())


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """``work``'s result. Raises ApiError when the client goes first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise GONE
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check_model(name: str, service: Service) -> None:
    if name != service.model:
        raise ApiError(
            404,
            f"there is no model {name[:64]!r} here: this server has {service.model!r}",
            param="model",
            code="model_not_found",
        )


def _content_policy(html: str) -> str:
    """Only the page's own script and style run, by their hashes; it talks to this server alone."""

    def hashes(tag: str) -> str:
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S)
        digests = (hashlib.sha256(block.encode("utf-8")).digest() for block in blocks)
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
