"""Many clients at once, some of whom leave: does every answer stay right, and what does waiting in line cost?

A server of its own on loopback, over the given engine; clients are threads of this process, so their work is in the
measured times, and the times are upper bounds.
"""

from __future__ import annotations

import json
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.client import HTTPConnection
from typing import Any

import psutil

from moespac.config import ServeConfig
from moespac.engine.engine import Engine
from moespac.serve.app import Service
from moespac.serve.server import Server, bind

MODEL = "soak"
_TEXT = (
    "It was a dark and stormy night, and the captain looked at the sea. The wind had not changed since the morning,"
    " and no man on board had slept. def add(a, b): return a + b. How many apples are three apples and four? "
)


@dataclass(frozen=True)
class SoakConfig:
    """What is asked. The seed fixes all of it but the order in which things happen."""

    requests: int = 200
    clients: int = 8
    cancelled: float = 1 / 3  # share of the requests whose client leaves before the end
    most_prompt: int = 160  # tokens; the least is 1
    most_tokens: int = 96  # of an answer; the least is 1
    seed: int = 0


@dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]
    tokens: int
    stream: bool
    leave_after: int | None  # events seen, 0: before anything came; None: stays to the end


@dataclass(frozen=True)
class Reply:
    """What a client saw. Times are seconds."""

    text: str
    error: str | None
    left: bool
    first_token: float | None  # from the request
    per_token: float | None  # after the first


@dataclass(frozen=True)
class SoakResult:
    requests: int
    clients: int
    cancelled: int
    errors: list[str]
    wrong: int  # answers that differ from the request's single-run answer; of one that was left, the part that came
    seconds: float
    first_token: dict[str, float]  # under load, streamed requests: median, p90, worst
    per_token: dict[str, float]
    memory: dict[
        str, float
    ]  # bytes of the process: mean of the first and of the last quarter, and their ratio
    streaming: dict[str, float]  # see ``measure_streaming``

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def soak(engine: Engine, config: SoakConfig, advance: Callable[[], None] = lambda: None) -> SoakResult:
    """Runs the requests and compares; ``advance`` is called after each."""
    requests = make_requests(engine, config)
    expected = [engine.generate(r.prompt, max_new_tokens=r.tokens).text for r in requests]
    sizes: list[int] = []
    process = psutil.Process()
    with serving(engine) as (port, _):

        def run(request: Request) -> Reply:
            reply = send(port, request)
            sizes.append(process.memory_info().rss)
            advance()
            return reply

        start = time.perf_counter()
        with ThreadPoolExecutor(config.clients) as pool:
            replies = list(pool.map(run, requests))
        seconds = time.perf_counter() - start
    stayed = [(reply, text) for reply, text in zip(replies, expected, strict=True) if not reply.left]
    left = [(reply, text) for reply, text in zip(replies, expected, strict=True) if reply.left]
    wrong = sum(reply.text != text for reply, text in stayed if reply.error is None)
    wrong += sum(not text.startswith(reply.text) for reply, text in left)
    quarter = max(1, len(sizes) // 4)
    first, last = statistics.mean(sizes[:quarter]), statistics.mean(sizes[-quarter:])
    return SoakResult(
        requests=len(requests),
        clients=config.clients,
        cancelled=len(left),
        errors=[reply.error for reply in replies if reply.error is not None],
        wrong=wrong,
        seconds=seconds,
        first_token=spread(reply.first_token for reply in replies),
        per_token=spread(reply.per_token for reply in replies),
        memory={"first_quarter": first, "last_quarter": last, "ratio": last / first},
        streaming=measure_streaming(engine),
    )


def make_requests(engine: Engine, config: SoakConfig) -> list[Request]:
    """Mixed lengths, two thirds of them streamed."""
    assert engine.tokenizer is not None, "prompts are cut from a text"
    text, draw = engine.tokenizer.encode(_TEXT), random.Random(config.seed)
    requests = []
    for _ in range(config.requests):
        at, length = draw.randrange(len(text)), draw.randint(1, config.most_prompt)
        prompt = tuple(text[(at + i) % len(text)] for i in range(length))
        leaves = draw.random() < config.cancelled
        requests.append(
            Request(
                prompt,
                tokens=draw.randint(1, config.most_tokens),
                stream=leaves or draw.random() < 0.5,
                leave_after=draw.randint(0, 6) if leaves else None,
            )
        )
    return requests


@contextmanager
def serving(engine: Engine) -> Iterator[tuple[int, Service]]:
    """A server over ``engine`` on a free port of loopback."""
    service = Service(engine, MODEL, ServeConfig())
    listener = bind("127.0.0.1", 0)
    ready = threading.Event()
    server = Server(service, listener, ready.set)
    thread = threading.Thread(target=server.run_until_stopped, name="soak-server")
    thread.start()
    ready.wait()
    try:
        yield listener.getsockname()[1], service
    finally:
        server.should_exit = True
        thread.join()


def send(port: int, request: Request) -> Reply:
    """One request over a connection of its own, as far as its client stays."""
    body = {
        "model": MODEL,
        "prompt": list(request.prompt),
        "max_tokens": request.tokens,
        "temperature": 0,
        "stream": request.stream,
    }
    if request.stream:
        body["stream_options"] = {"include_usage": True}
    connection = HTTPConnection("127.0.0.1", port, timeout=600)
    start = time.perf_counter()
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        if request.leave_after == 0:
            return Reply("", None, True, None, None)
        response = connection.getresponse()
        if response.status != 200:
            return Reply("", f"{response.status} {response.read().decode()}", False, None, None)
        if not request.stream:
            return Reply(json.load(response)["choices"][0]["text"], None, False, None, None)
        return _read_stream(response, request, start)
    except OSError as error:
        return Reply("", repr(error), False, None, None)
    finally:
        connection.close()


def _read_stream(response: Any, request: Request, start: float) -> Reply:
    texts: list[str] = []
    first = last = None
    tokens = seen = 0
    for line in response:
        data = line.removeprefix(b"data: ").strip()
        if not data:
            continue
        if data == b"[DONE]":
            break
        event = json.loads(data)
        if "error" in event:
            return Reply("".join(texts), event["error"]["message"], False, None, None)
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
        for choice in event["choices"]:
            if choice["text"]:
                last = time.perf_counter()
                first = first or last
                texts.append(choice["text"])
        seen += 1
        if seen == request.leave_after:
            return Reply("".join(texts), None, True, first and first - start, None)
    per_token = (last - first) / (tokens - 1) if first and last and tokens > 1 else None
    return Reply("".join(texts), None, False, first and first - start, per_token)


def spread(values: Iterable[float | None]) -> dict[str, float]:
    """Median, nine tenths and worst of the values that there are."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return {}
    return {
        "median": statistics.median(known),
        "p90": known[min(len(known) - 1, int(0.9 * len(known)))],
        "worst": known[-1],
    }


def measure_streaming(engine: Engine, tokens: int = 200, repeats: int = 5) -> dict[str, float]:
    """What HTTP streaming adds to a token: seconds a token of the engine alone and of a client that reads a stream,
    turn about, the median of ``repeats``; and how long a piece takes from the engine to the socket."""
    assert engine.tokenizer is not None
    prompt = engine.tokenizer.encode(_TEXT)[:32]
    request = Request(tuple(prompt), tokens, stream=True, leave_after=None)
    alone, streamed = [], []
    delays: list[float] = []
    with serving(engine) as (port, service):
        send(port, request)  # both ways have run once before they are timed
        for _ in range(repeats):
            alone.append(_on_engine(service, lambda: _time_alone(engine, request)))
            service.sent = delays.append
            reply = send(port, request)
            assert reply.per_token is not None, reply.error
            streamed.append(reply.per_token)
    seconds_alone, seconds_streamed = statistics.median(alone), statistics.median(streamed)
    return {
        "engine_seconds_per_token": seconds_alone,
        "streamed_seconds_per_token": seconds_streamed,
        "added_seconds_per_token": seconds_streamed - seconds_alone,
        "engine_to_socket_median": statistics.median(delays),
        "engine_to_socket_p99": sorted(delays)[int(0.99 * len(delays))],
    }


def _time_alone(engine: Engine, request: Request) -> float:
    """Seconds a token after the first piece, without a server."""
    stream = engine.stream(request.prompt, max_new_tokens=request.tokens)
    first = last = 0.0
    count = 0
    for _ in stream:
        last = time.perf_counter()
        first = first or last
    count = len(stream.result.token_ids)
    return (last - first) / (count - 1)


def _on_engine(service: Service, work: Callable[[], float]) -> float:
    """``work`` on the engine's own thread, as answers are."""
    result: list[float] = []
    done = threading.Event()

    def errand() -> None:
        result.append(work())
        done.set()

    service.worker.run_between_windows(errand)
    done.wait()
    return result[0]
