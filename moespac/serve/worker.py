"""The one thread that the engine belongs to: answers take turns on it, everybody else asks it.

Requests are admitted first come, first served, to ``parallel`` places. The answers there take turns, round robin,
``turn_windows`` windows each, so that a short answer does not wait for a long one: with P places it is through
after at most P times the windows it needs. Each keeps its KV cache and its drafter's, so an answer is what it would
have been alone; what turns cost is that experts of one text make room for those of another.

Whatever needs the engine otherwise (looking at it for the page) is an errand that is run between two windows: there
is no lock around the engine.
"""

from __future__ import annotations

import copy
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from jinja2 import TemplateError

from moespac.config import ServeConfig
from moespac.engine.engine import Engine, Piece
from moespac.errors import ConfigError
from moespac.serve.answer import Answer, Begun, Ended
from moespac.serve.errors import ApiError, queue_full, shutting_down
from moespac.speculate.drafters import Drafter

log = logging.getLogger(__name__)

GONE = ApiError(499, "the client closed the connection")  # nobody reads it


class Observer(Protocol):
    """Is told what the worker does, on the worker's thread."""

    def stepped(self, piece: Piece, seconds: float) -> None:
        """One step of the engine is over."""

    def ended(self, answer: Answer) -> None:
        """An answer is over, in whatever way."""


class Worker:
    """Runs answers on ``engine``. All public methods may be called from any thread."""

    def __init__(self, engine: Engine, config: ServeConfig, observers: list[Observer]) -> None:
        self._engine = engine
        self._config = config
        self._observers = observers
        self._change = threading.Condition()  # guards all that follows; held for moments, between windows
        self._new: deque[Answer] = deque()  # not looked at yet
        self._waiting: deque[Answer] = deque()
        self._active: deque[Answer] = deque()  # in the order of their turns
        self._errands: deque[Callable[[], None]] = deque()
        self._open = True  # for requests
        self._running = True
        self._drafters: list[Drafter] = []  # idle; each follows one answer at a time
        self._cost: float | None = None  # seconds of the engine that an answer takes, a running mean
        self._thread = threading.Thread(target=self._run, name="moespac-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # ---- for the event loop --------------------------------------------------------------------------

    def submit(self, answer: Answer) -> None:
        """Queue an answer. Raises ApiError when the queue is full or the server is about to stop."""
        with self._change:
            if not self.is_open:
                raise shutting_down()
            if self.active + self.waiting >= self._config.parallel + self._config.queue:
                raise queue_full(self._retry_after())
            self._new.append(answer)
            self._change.notify()

    def cancel(self, answer: Answer, reason: ApiError = GONE) -> None:
        """End an answer early: at once where it waits, else after the window that runs."""
        with self._change:
            answer.stopped = answer.stopped or reason
            for queue in (self._new, self._waiting):
                if answer in queue:
                    queue.remove(answer)
                    answer.tell(answer.stopped)

    def run_between_windows(self, errand: Callable[[], None]) -> None:
        """Have ``errand`` called on the engine's thread as soon as no window runs."""
        with self._change:
            self._errands.append(errand)
            self._change.notify()

    def close_door(self) -> None:
        """Take no more requests; those that wait are refused, those that run go on."""
        with self._change:
            self._open = False
            waiting = [*self._new, *self._waiting]
        for answer in waiting:
            self.cancel(answer, shutting_down())

    def cancel_all(self) -> None:
        """End the running answers too, with an error."""
        with self._change:
            for answer in self._active:
                answer.stopped = answer.stopped or shutting_down()
            self._change.notify()

    def stop(self) -> None:
        """Return once the thread has ended; what it was at is cancelled."""
        self.close_door()
        self.cancel_all()
        with self._change:
            self._running = False
            self._change.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def is_open(self) -> bool:
        return self._open and (self._thread.is_alive() or self._thread.ident is None)

    @property
    def active(self) -> int:
        return len(self._active)

    @property
    def waiting(self) -> int:
        return len(self._new) + len(self._waiting)

    def _retry_after(self) -> int:
        """Seconds until a place is likely to be free: the engine is through with one answer in about that time."""
        return 1 if self._cost is None else max(1, math.ceil(self._cost))

    # ---- the thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._wait_for_work():
            self._between_windows()
            if self._active:
                self._turn(self._active[0])
        for answer in list(self._active):
            self._end(answer, answer.stopped or shutting_down())

    def _wait_for_work(self) -> bool:
        """False when the thread is to end."""
        with self._change:
            self._change.wait_for(
                lambda: not self._running or self._errands or self._new or self._waiting or self._active
            )
            return self._running

    def _between_windows(self) -> None:
        """Look at new requests, admit, run errands."""
        while self._new or self._errands:  # nobody else takes from these, save for who cancels
            with self._change:
                answer = self._new[0] if self._new else None
                errand = self._errands.popleft() if self._errands else None
            if answer is not None:
                self._look_at(answer)
            if errand is not None:
                self._run_errand(errand)
        with self._change:
            while self._waiting and len(self._active) < self._config.parallel:
                self._active.append(self._waiting.popleft())

    def _run_errand(self, errand: Callable[[], None]) -> None:
        try:
            errand()
        except Exception:  # whoever asked has no answer; the others still do
            log.exception("looking at the engine failed")

    def _look_at(self, answer: Answer) -> None:
        """Check the request against the model and make its stream; it then waits for a place."""
        failure: Exception | None = None
        try:
            self._prepare(answer)
        except Exception as error:  # a chat template may raise anything
            failure = error
        with self._change:
            if answer not in self._new:
                return  # cancelled in the meantime
            self._new.remove(answer)
            if failure is None:
                self._waiting.append(answer)
        answer.tell(failure or Begun(answer.prompt_tokens))

    def _prepare(self, answer: Answer) -> None:
        prompt, limit = answer.wish.prompt, answer.wish.limit
        tokens = self._tokens(prompt)
        most = self._config.max_tokens_limit or self._engine.context
        if limit is not None and self._config.max_tokens_limit and limit > most:
            raise ApiError(
                400,
                f"max_tokens: {limit} is more than the {most} that this server allows",
                param="max_tokens",
            )
        if len(tokens) + (limit or 1) > self._engine.context:
            raise ApiError(
                400,
                f"the context holds {self._engine.context} tokens; the prompt has {len(tokens)}, and the answer "
                f"needs up to {limit or 1}: shorten one of them",
                param="messages" if isinstance(prompt, list) and tokens is not prompt else "prompt",
                code="context_length_exceeded",
            )
        room = min(limit or most, self._engine.context - len(tokens))
        answer.prompt_tokens = len(tokens)
        answer.stream = self._engine.stream(tokens, max_new_tokens=room, **answer.wish.settings)

    def _tokens(self, prompt: str | list[int] | list[dict[str, str]]) -> list[int]:
        if isinstance(prompt, str):
            if self._engine.tokenizer is None:
                raise ConfigError("this model has no tokenizer: give the prompt as token ids")
            return self._engine.tokenizer.encode(prompt)
        if prompt and isinstance(prompt[0], dict):
            try:
                return self._engine.chat_tokens(prompt)  # type: ignore[arg-type]
            except TemplateError as error:
                reason = " ".join(str(error).split())
                raise ApiError(
                    400, f"messages: the model's chat template refuses them: {reason}", param="messages"
                ) from None
        return prompt  # type: ignore[return-value]

    def _turn(self, answer: Answer) -> None:
        """Run a few windows of one answer; it ends, or joins the back of the round."""
        stream = answer.stream
        assert stream is not None
        if answer.timing.first_token is None:
            stream.drafter = self._drafter()
        for window in range(self._config.turn_windows):
            if window:
                self._between_windows()
            if answer.stopped is not None:
                self._end(answer, answer.stopped)
                return
            try:
                self._step(answer)
            except Exception as error:  # this answer fails, the engine stays usable
                self._end(answer, error)
                return
            if stream.done:
                reason = stream.finish_reason
                self._end(answer, Ended("stop" if reason == "stop" else "length"))
                return
        with self._change:
            self._active.rotate(-1)

    def _step(self, answer: Answer) -> None:
        assert answer.stream is not None
        start = time.monotonic()
        piece = answer.stream.advance()
        answer.tell(piece)
        now = time.monotonic()
        timing = answer.timing
        timing.engine_seconds += now - start
        timing.last_token = now
        timing.first_token = timing.first_token or now
        answer.tokens += len(piece.tokens)
        for observer in self._observers:
            observer.stepped(piece, now - start)

    def _end(self, answer: Answer, event: Ended | Exception) -> None:
        assert answer.stream is not None
        answer.stream.close()
        self._drafters.append(answer.stream.drafter)
        with self._change:
            self._active.remove(answer)
        if isinstance(event, Ended):
            seconds = answer.timing.engine_seconds
            share = 1 / self._config.speed_life
            self._cost = seconds if self._cost is None else self._cost + share * (seconds - self._cost)
        answer.tell(event)
        for observer in self._observers:
            observer.ended(answer)

    def _drafter(self) -> Drafter:
        """One for this answer alone: the one that was used last, which may know how a conversation began, or a
        twin of the engine's. Twins share the weights of a draft model, and nothing that changes."""
        if self._drafters:
            return self._drafters.pop()
        twin = copy.copy(self._engine.drafter)
        twin.reset()
        return twin
