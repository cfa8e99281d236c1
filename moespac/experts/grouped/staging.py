"""Small data on their way to a device: written into page-locked memory, copied without waiting."""

from __future__ import annotations

import itertools

import torch


class StagingBuffer:
    """``nbytes`` here and as many on the device."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        cuda = device.type == "cuda"
        self.host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=cuda)
        self._device = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._copied = torch.cuda.Event() if cuda else None

    def wait(self) -> None:
        """Return once the latest copy has left ``host``."""
        if self._copied is not None:
            self._copied.synchronize()

    def send(self, nbytes: int) -> torch.Tensor:
        """Copy the first ``nbytes`` in the current stream; the view is for what that stream does next."""
        sent = self._device[:nbytes]
        sent.copy_(self.host[:nbytes], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        return sent


class Staging:
    """Two buffers that take turns: one is written while the other is copied. Made once, larger only when asked."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self._device = device
        self._buffers = [StagingBuffer(device, nbytes) for _ in range(2)]
        self._turns = itertools.cycle(range(2))

    def claim(self, nbytes: int) -> StagingBuffer:
        """The next buffer, free to be written, at least ``nbytes`` large."""
        turn = next(self._turns)
        self._buffers[turn].wait()
        if self._buffers[turn].host.numel() < nbytes:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # a kernel may still read what the old buffer sent
            self._buffers[turn] = StagingBuffer(self._device, nbytes)
        return self._buffers[turn]
