"""A card that is not there: streams are threads that run what is put on them, in order and later."""

from __future__ import annotations

import mmap
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from moespac.experts.cuda.accelerator import CudaAccelerator
from moespac.experts.cuda.arena import DeviceArena, MappedArena
from moespac.experts.cuda.page_lock import PageLock
from moespac.experts.workers import Bell
from moespac.timeline import Tape

PAGE = 4096


class FakeStream:
    """What is put on it runs later, on a thread. ``gate``: while it is closed, nothing does."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.put = 0  # jobs so far
        self.delay = 0.0  # seconds that each thing on it takes at least
        self.failure: Exception | None = None  # of a job: a card tells whoever asks next
        self._condition = threading.Condition()
        self._work: deque[Callable[[], object] | None] = deque()
        self._thread = threading.Thread(target=self._serve, name="fake stream", daemon=True)
        self._thread.start()

    def enqueue(self, work: Callable[[], object] | None) -> None:
        with self._condition:
            self._work.append(work)
            self._condition.notify()

    def close(self) -> None:
        self.gate.set()
        self.enqueue(None)
        self._thread.join()

    @torch.inference_mode()
    def _serve(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._work)
                work = self._work.popleft()
            if work is None:
                return
            self.gate.wait()
            time.sleep(self.delay)
            try:
                work()
            except Exception as error:
                self.failure = error


class FakeEvent:
    """``torch.cuda.Event``, as strict: what was not recorded, or not passed, has no time."""

    def __init__(self) -> None:
        self._passed: threading.Event | None = None
        self._at: list[float] = []
        self._stream: FakeStream | None = None

    def record(self, stream: FakeStream) -> None:
        passed, at = threading.Event(), []
        self._passed, self._at, self._stream = passed, at, stream

        def mark() -> None:
            at.append(time.perf_counter())
            passed.set()

        stream.enqueue(mark)

    def query(self) -> bool:
        passed = self._passed is None or self._passed.is_set()
        if passed:
            self._raise()
        return passed

    def synchronize(self) -> None:
        assert self._passed is not None, "an event that nobody recorded"
        self._passed.wait()
        self._raise()

    def elapsed_time(self, end_event: FakeEvent) -> float:
        assert self._at and end_event._at, "both have been passed"
        return (end_event._at[0] - self._at[0]) * 1e3

    def _raise(self) -> None:
        if self._stream is not None and self._stream.failure is not None:
            failure, self._stream.failure = self._stream.failure, None
            raise failure


class FakeDriver:
    """``Driver`` of it. ``eager``: jobs run where they are put, as far as Python is concerned, as launches do."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.copy_stream = FakeStream()
        self.trunk_stream = FakeStream()
        self.events = 0

    def event(self) -> FakeEvent:
        self.events += 1
        return FakeEvent()

    def current_stream(self) -> FakeStream:
        return self.trunk_stream

    def run(self, job: Callable[[], object], stream: FakeStream) -> None:
        stream.put += 1
        stream.enqueue(job)

    def finish(self) -> None:
        for stream in (self.copy_stream, self.trunk_stream):
            idle = threading.Event()
            stream.enqueue(idle.set)
            idle.wait()

    def close(self) -> None:
        self.copy_stream.close()
        self.trunk_stream.close()


class FakeRegistrar:
    """Locks at most ``limit`` bytes together, and hands out at most ``buffers`` buffers."""

    def __init__(self, limit: int, buffers: int = 99) -> None:
        self.limit = limit
        self.buffers = buffers
        self.locked: dict[int, int] = {}
        self.calls = 0

    def register(self, address: int, nbytes: int) -> bool:
        self.calls += 1
        if sum(self.locked.values()) + nbytes > self.limit:
            return False
        for begin, length in self.locked.items():
            assert address >= begin + length or address + nbytes <= begin, "no page is locked twice"
        self.locked[address] = nbytes
        return True

    def unregister(self, address: int) -> None:
        del self.locked[address]

    def buffer(self, nbytes: int) -> torch.Tensor | None:
        if self.buffers == 0:
            return None
        self.buffers -= 1
        return torch.empty(nbytes, dtype=torch.uint8)


class FakeVirtualMemory:
    """Anonymous memory of this process, whose pages are the device's. At most ``limit`` bytes are mapped."""

    def __init__(self, granularity: int = PAGE, limit: int = 1 << 40) -> None:
        self.granularity = granularity
        self.limit = limit
        self.mapped: dict[int, int] = {}
        self.reserved: dict[int, mmap.mmap] = {}

    def reserve(self, nbytes: int) -> int:
        assert nbytes % self.granularity == 0
        memory = mmap.mmap(-1, nbytes)
        address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        self.reserved[address] = memory
        return address

    def map(self, address: int, nbytes: int) -> None:
        assert address not in self.mapped
        if sum(self.mapped.values()) + nbytes > self.limit:
            raise torch.OutOfMemoryError("no device memory is left")
        self.mapped[address] = nbytes

    def unmap(self, address: int, nbytes: int) -> None:
        """What is read there afterwards is not what was there."""
        assert self.mapped.pop(address) == nbytes, "a mapping goes as a whole"
        base, memory = next((a, m) for a, m in self.reserved.items() if a <= address < a + len(m))
        memory[address - base : address - base + nbytes] = b"\xdd" * nbytes

    def free(self, address: int, nbytes: int) -> None:
        assert not self.mapped, "nothing is behind them any more"
        assert len(self.reserved.pop(address)) == nbytes

    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        return torch.frombuffer(self.reserved[address], dtype=torch.uint8)[:nbytes]


def fake_cuda(
    driver: FakeDriver,
    host: torch.Tensor,
    slots: int,
    bell: Bell,
    asynchronous: bool = True,
    *,
    arena: DeviceArena | None = None,
    registrar: Any = None,
    copies_ahead: int = 2,
    tape: Tape | None = None,
) -> CudaAccelerator:
    """The CUDA tier over ``driver``; by default half of the host's slots can be page-locked."""
    record_bytes = host.shape[1]
    lock = PageLock(host, registrar or FakeRegistrar(host.numel() // 2))
    arena = arena or MappedArena(slots, record_bytes, FakeVirtualMemory(), record_bytes)
    return CudaAccelerator(driver, arena, lock, bell, asynchronous, copies_ahead, tape)
