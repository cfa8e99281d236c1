"""Work over tensors that stay where they are, recorded once and launched again as a whole.

On CUDA a recording is a CUDA graph: one launch in place of some dozens. In the process it is the function itself,
and everything around it (buffers, order, what is put back after a recording) is the same, so tests see it.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

log = logging.getLogger(__name__)

Work = Callable[[], object]

_WARMUPS = 2  # libraries make handles and choose kernels on the first call, some on the second


class Mailbox(Protocol):
    """A small tensor on the device and what of it has come to the host."""

    host: torch.Tensor

    def send(self) -> None:
        """Start bringing what the device has, once it has finished what was launched before."""

    def wait(self) -> None:
        """Until what was sent last is in ``host``."""


class Recorder(Protocol):
    """Where recordings are made and run. All of them run in the order in which they are launched."""

    device: torch.device
    captures: bool  # False once a recording failed: work then runs as it is

    def record(self, work: Work, state: Sequence[torch.Tensor] = ()) -> Work:
        """``work`` as something cheap to launch. It runs here too; what it both reads and writes is ``state``, and
        is put back, and all else it must write anew from what it reads."""
        ...

    def mailbox(self, source: torch.Tensor) -> Mailbox: ...

    def feed(self, target: torch.Tensor) -> Callable[[Sequence[int]], None]:
        """A function that brings numbers (N,) from the host into the head of ``target``, int64, on the device."""
        ...

    def stopwatch(self) -> Stopwatch: ...


class Stopwatch(Protocol):
    """When the device came to certain points of what was launched."""

    def lap(self) -> None:
        """The device passes here."""

    def read(self) -> list[float]:
        """Seconds from the first lap to each; waits for the last."""
        ...


class InProcess:
    """A device that is this process. A message arrives when it is waited for and not before, as on a real one."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self.captures = True

    def record(self, work: Work, state: Sequence[torch.Tensor] = ()) -> Work:
        _warm_up(work, state)
        return work

    def mailbox(self, source: torch.Tensor) -> Mailbox:
        return _InProcessMailbox(source)

    def feed(self, target: torch.Tensor) -> Callable[[Sequence[int]], None]:
        def feed(numbers: Sequence[int]) -> None:
            target[: len(numbers)].copy_(torch.tensor(numbers))

        return feed

    def stopwatch(self) -> Stopwatch:
        return _InProcessStopwatch()


class CudaRecorder:
    """CUDA graphs that share one pool of memory. After one that cannot be captured, all work runs as it is."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.captures = True  # until one failed
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Work, state: Sequence[torch.Tensor] = ()) -> Work:
        if not self.captures:
            return work
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            _warm_up(work, state)  # what fails here fails without graphs too
        self._stream.synchronize()
        try:
            return self._capture(work)
        except RuntimeError as error:  # out of memory, or an operation that cannot be captured
            self.captures = False
            log.warning("CUDA graphs are off, tokens come slower: %s", str(error).splitlines()[0])
            return work

    def mailbox(self, source: torch.Tensor) -> Mailbox:
        return _CudaMailbox(source)

    def feed(self, target: torch.Tensor) -> Callable[[Sequence[int]], None]:
        staged = torch.empty(target.shape, dtype=target.dtype, pin_memory=True)
        numbers_in, left = staged.numpy(), torch.cuda.Event()

        def feed(numbers: Sequence[int]) -> None:
            left.synchronize()  # what was staged last may still be on its way
            numbers_in[: len(numbers)] = numbers
            target[: len(numbers)].copy_(staged[: len(numbers)], non_blocking=True)
            left.record()

        return feed

    def stopwatch(self) -> Stopwatch:
        return _CudaStopwatch()

    def _capture(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # Not by torch.cuda.graph: it collects garbage and empties the allocator each time, and there are hundreds.
        with torch.cuda.stream(self._stream), _no_collection():
            # thread_local: copies of experts go on meanwhile, on other threads.
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph.replay


def recorder_for(device: torch.device) -> Recorder | None:
    """None where launches cost too little to be worth recording."""
    return CudaRecorder(device) if device.type == "cuda" else None


class _InProcessMailbox:
    def __init__(self, source: torch.Tensor) -> None:
        self._source = source
        self._sent = source.clone()
        self.host = torch.zeros_like(source)

    def send(self) -> None:
        self._sent.copy_(self._source)

    def wait(self) -> None:
        self.host.copy_(self._sent)


class _CudaMailbox:
    def __init__(self, source: torch.Tensor) -> None:
        self._source = source
        self._sent = torch.cuda.Event()
        self.host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)

    def send(self) -> None:
        self.host.copy_(self._source, non_blocking=True)
        self._sent.record()

    def wait(self) -> None:
        self._sent.synchronize()  # spins: sleeping would cost more than most waits


class _InProcessStopwatch:
    def __init__(self) -> None:
        self._laps: list[float] = []

    def lap(self) -> None:
        self._laps.append(time.perf_counter())

    def read(self) -> list[float]:
        return [lap - self._laps[0] for lap in self._laps]


class _CudaStopwatch:
    def __init__(self) -> None:
        self._laps: list[torch.cuda.Event] = []

    def lap(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._laps.append(event)

    def read(self) -> list[float]:
        self._laps[-1].synchronize()
        return [self._laps[0].elapsed_time(lap) / 1e3 for lap in self._laps]


def _warm_up(work: Work, state: Sequence[torch.Tensor]) -> None:
    """Each run begins where the first one did: one that counts on would leave what it may write to."""
    before = [tensor.clone() for tensor in state]
    for _ in range(_WARMUPS):
        work()
        for tensor, kept in zip(state, before, strict=True):
            tensor.copy_(kept)


@contextmanager
def _no_collection() -> Iterator[None]:
    """What the collector frees within a capture could be part of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
