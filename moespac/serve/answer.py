"""One request between its client and the engine's thread."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from moespac.engine.engine import Piece, Stream
from moespac.serve.errors import ApiError, from_failure


@dataclass(frozen=True)
class Begun:
    """The request is sound, and waits for its turn."""

    prompt_tokens: int


@dataclass(frozen=True)
class Ended:
    finish_reason: str  # "stop" or "length"


Event = Begun | Piece | Ended | ApiError


@dataclass(frozen=True)
class Wish:
    """What a request asks of the engine."""

    prompt: str | list[int] | list[dict[str, str]]  # text, token ids, or a conversation
    limit: int | None  # tokens at most; None: as many as are allowed
    settings: dict[str, Any]  # for ``Engine.stream``


@dataclass
class Timing:
    """On time.monotonic()."""

    asked: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    last_token: float | None = None
    engine_seconds: float = 0.0  # that the engine worked on it


class Answer:
    """Made in the event loop, which reads its events; the engine's thread does the rest."""

    def __init__(self, wish: Wish) -> None:
        self.wish = wish
        self.timing = Timing()
        self.stream: Stream | None = None  # once the engine has looked at it
        self.prompt_tokens = 0
        self.tokens = 0  # of the answer, so far
        self.stopped: ApiError | None = None  # why it is to end early: the client went, the server goes
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[Event, float]] = asyncio.Queue()
        self.told = 0.0  # when the latest event that was read had happened, on time.monotonic()

    def tell(self, event: Event | Exception) -> None:
        """From any thread: what has happened."""
        if isinstance(event, Exception):
            event = from_failure(event)
        with contextlib.suppress(RuntimeError):  # the event loop is gone: nobody listens
            self._loop.call_soon_threadsafe(self._events.put_nowait, (event, time.monotonic()))

    async def begun(self) -> Begun:
        """Wait until the engine has looked at it. Raises ApiError where it cannot be answered."""
        event, self.told = await self._events.get()
        if isinstance(event, ApiError):
            raise event
        assert isinstance(event, Begun)
        return event

    async def events(self) -> AsyncIterator[Piece | Ended]:
        """Up to and with its end. Raises ApiError where it fails on the way."""
        while True:
            event, self.told = await self._events.get()
            if isinstance(event, ApiError):
                raise event
            assert not isinstance(event, Begun)
            yield event
            if isinstance(event, Ended):
                return
