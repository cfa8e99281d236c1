"""Page-locked host memory: what a card reads by itself, at the link's full speed, while the host goes on.

How much may be locked is found by trying: limits of the process, of a container and of WSL are not to be asked for
in one way, and a system with little memory refuses below all of them.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any, Protocol

import torch

log = logging.getLogger(__name__)


class Registrar(Protocol):
    """Who locks pages."""

    def register(self, address: int, nbytes: int) -> bool:
        """False where the system refuses; nothing is locked then."""
        ...

    def unregister(self, address: int) -> None:
        """What ``register`` took in one call."""
        ...

    def buffer(self, nbytes: int) -> torch.Tensor | None:
        """New page-locked memory, (nbytes,) uint8; None where the system refuses."""
        ...


class CudaRegistrar:
    """The CUDA runtime."""

    def __init__(self) -> None:
        self._runtime: Any = torch.cuda.cudart()

    def register(self, address: int, nbytes: int) -> bool:
        if int(self._runtime.cudaHostRegister(address, nbytes, 0)) == 0:
            return True
        self._forget_error()
        return False

    def unregister(self, address: int) -> None:
        if int(self._runtime.cudaHostUnregister(address)) != 0:
            self._forget_error()

    def buffer(self, nbytes: int) -> torch.Tensor | None:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:
            return None

    def _forget_error(self) -> None:
        """The runtime keeps the last error for whoever asks next, which would be an innocent kernel."""
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")


class PageLock:
    """As many slots of a host arena as can be locked, from the first on, and small locked buffers for the rest."""

    def __init__(self, arena: torch.Tensor, registrar: Registrar) -> None:
        """arena (slots, record_bytes) uint8, page-aligned, as are its slots."""
        self._registrar = registrar
        self._slots, self._record_bytes = arena.shape
        self._begin = arena.data_ptr()
        self._registered: list[int] = []  # addresses
        self._locked = self._lock()

    @property
    def share(self) -> float:
        """Of the slots."""
        return self._locked / self._slots

    def report(self) -> None:
        """In the log: what became of it."""
        locked, total = (n * self._record_bytes / 1e9 for n in (self._locked, self._slots))
        if self._locked == self._slots:
            log.info("all %.2f GB of host memory for experts are page-locked", total)
        else:
            log.warning(
                "%.2f of %.2f GB of host memory for experts could be page-locked; the rest is copied by way of a "
                "small buffer, more slowly: raise the limit (ulimit -l, a container's memlock, .wslconfig)",
                locked,
                total,
            )

    def covers(self, record: torch.Tensor) -> bool:
        """Whether this slot of the arena is locked."""
        return 0 <= record.data_ptr() - self._begin < self._locked * self._record_bytes

    def staging(self, count: int) -> list[torch.Tensor]:
        """At most ``count`` locked buffers of a record each; none where all is locked, or none is to be had."""
        if self._locked == self._slots:
            return []
        buffers = (self._registrar.buffer(self._record_bytes) for _ in range(count))
        return [buffer for buffer in buffers if buffer is not None]

    def close(self) -> None:
        while self._registered:
            self._registrar.unregister(self._registered.pop())
        self._locked = 0

    def _lock(self) -> int:
        """Try the rest, and half as much after each refusal: with whole slots, a part that succeeds is of use."""
        locked, attempt = 0, self._slots
        while attempt:
            attempt = min(attempt, self._slots - locked)
            address = self._begin + locked * self._record_bytes
            if attempt and self._registrar.register(address, attempt * self._record_bytes):
                self._registered.append(address)
                locked += attempt
            else:
                attempt //= 2
        return locked
