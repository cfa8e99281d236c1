"""A real server: a thread of this process, or a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

import moespac
from moespac.config import ServeConfig
from moespac.engine.engine import Engine
from moespac.serve.app import Service
from moespac.serve.server import Server, bind, url

MODEL = "moespac-demo"


class Running:
    """Where a server is, and the little that most tests ask of it."""

    def __init__(self, base: str, service: Service | None = None, key: str | None = None) -> None:
        self.base = base
        self.service = service  # where it runs in this process
        self.session = requests.Session()
        if key:
            self.session.headers["Authorization"] = f"Bearer {key}"

    def get(self, path: str, **options: Any) -> requests.Response:
        return self.session.get(self.base + path, timeout=30, **options)

    def chat(self, text: str = "Hello", **fields: Any) -> requests.Response:
        return self.post("/v1/chat/completions", messages=[{"role": "user", "content": text}], **fields)

    def complete(self, prompt: Any = "The sea", **fields: Any) -> requests.Response:
        return self.post("/v1/completions", prompt=prompt, **fields)

    def post(self, path: str, stream: bool = False, **fields: Any) -> requests.Response:
        body = {"model": MODEL, "temperature": 0, "stream": stream} | fields
        return self.session.post(self.base + path, json=body, stream=stream, timeout=120)

    def settled(self, seconds: float = 20.0) -> None:
        """Wait until nothing decodes or waits."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            health = self.get("/health").json()
            if not health["active"] and not health["waiting"]:
                return
            time.sleep(0.02)
        raise AssertionError("the server is still busy")


@contextmanager
def in_thread(engine: Engine, config: ServeConfig | None = None, key: str | None = None) -> Iterator[Running]:
    """Serve ``engine``, which stays open."""
    service = Service(engine, MODEL, config or ServeConfig(), key)
    listener = bind("127.0.0.1", 0)
    ready = threading.Event()
    server = Server(service, listener, ready.set)
    thread = threading.Thread(target=server.run_until_stopped, daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield Running(url(listener), service, key)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@contextmanager
def in_process(*flags: str, cwd: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], Running]]:
    """``moespac serve`` on a free port, as a user starts it."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "moespac",
            "serve",
            "--port",
            "0",
            "--no-profile",
            "--host-memory",
            "50%",
            *flags,
        ],
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(Path(moespac.__file__).parent.parent)} | environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(f"{MODEL}: "):
                break
        else:
            raise AssertionError("the server did not start")
        yield process, Running(line.split()[1].rstrip("/"), key=environment.get("MOESPAC_API_KEY"))
    finally:
        process.kill()
        process.wait()


class Events:
    """The server-sent events of a stream, one by one; the last is [DONE], or an error."""

    def __init__(self, response: requests.Response) -> None:
        self._lines = response.iter_lines()  # one for all: dropping it would close the connection

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        line = next(line for line in self._lines if line)
        assert line.startswith(b"data: ")
        if line == b"data: [DONE]":
            assert not list(filter(None, self._lines))
            raise StopIteration
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            assert not list(filter(None, self._lines))
            self._lines = iter([b"data: [DONE]"])
        return event


def events(response: requests.Response) -> list[dict[str, Any]]:
    return list(Events(response))
