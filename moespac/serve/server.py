"""The listening: a socket, uvicorn on it, and an end that loses no answer without a word."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from moespac.errors import ConfigError
from moespac.serve.app import Service, create_app


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet. Raises ConfigError where it cannot be had; before a model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        what = "is in use already; name another port" if taken else f"cannot be had ({error.strerror})"
        raise ConfigError(f"--host {host} --port {port}: {what}") from None
    return listener


def is_loopback(listener: socket.socket) -> bool:
    address = listener.getsockname()[0]
    return address == "::1" or address.startswith("127.")


def url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, with an end of our own: running answers have ``grace_seconds`` to finish, then end in an error."""

    def __init__(self, service: Service, listener: socket.socket, started: Callable[[], None]) -> None:
        self._service = service
        self._listener = listener
        self._say_started = started
        config = service.config
        super().__init__(
            uvicorn.Config(
                create_app(service, check_host=is_loopback(listener) and service.api_key is None),
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=config.connections,
                h11_max_incomplete_event_size=config.header_bytes,
            )
        )

    def run_until_stopped(self) -> None:
        """Serve until SIGTERM, SIGINT or ``should_exit``; then let go of the engine."""
        self._service.worker.start()
        try:
            self.run(sockets=[self._listener])
        finally:
            self._service.stop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._say_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_answers())
        await super().shutdown(sockets)  # closes the door, then waits for the connections
        await ending

    async def _end_answers(self) -> None:
        worker = self._service.worker
        worker.close_door()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._service.config.grace_seconds):
                while worker.active and not self.force_exit:
                    await asyncio.sleep(0.02)
        worker.cancel_all()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, without sending the signal again in the end: this end is not a failure."""
        signals = (signal.SIGINT, signal.SIGTERM)
        try:
            before = {number: signal.signal(number, self.handle_exit) for number in signals}
        except ValueError:  # not the main thread: whoever started it sets should_exit
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
