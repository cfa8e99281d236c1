"""One pass of a native decoder: from layer to layer in the library, as far as it gets without asking."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from moespac.experts.kernels.host import HostKernel
from moespac.experts.kernels.library import Experts, Order, PassModel, Run
from moespac.policy.base import CacheRetention, PassRetention

if TYPE_CHECKING:
    from moespac.experts.kernels.foresight import NativeForesight

_BROKEN, _FAILED, _OVER, _ASKS = -2, -1, 0, 2  # of what pass.c returns
_NO_LIMIT = 1 << 30


@dataclass(frozen=True, eq=False)
class HostExperts:
    """Where a model's experts lie in host memory: live views.

    arena (slots, record_bytes) uint8; slots (MoE layers, experts) int64, the place of each in it; ready
    (MoE layers, experts) bool, whether its record is there. ``memory``: the address of the books that the library
    keeps of them; None where it keeps none, and nobody changes anything during a call.
    """

    kernel: HostKernel
    arena: torch.Tensor
    slots: NDArray[np.int64]
    ready: NDArray[np.bool_]
    memory: int | None = None

    def describe(self) -> Experts:
        """For the library, which does not hold them."""
        assert self.slots.flags.c_contiguous and self.ready.flags.c_contiguous
        slots, ready = (torch.from_numpy(part).data_ptr() for part in (self.slots, self.ready))
        record_bytes, experts = self.arena.shape[1], self.slots.shape[1]
        where = (self.arena.data_ptr(), record_bytes, experts, slots, ready, self.memory)
        return Experts(self.kernel.address, self.kernel.threads, *where)


class PassOrder:
    """A policy's ``pass_retention``, for the library."""

    def __init__(
        self, retention: PassRetention | CacheRetention, foresight: NativeForesight | None = None
    ) -> None:
        """``foresight``: what ``retention`` says of it, for passes over this model."""
        self._held = retention, foresight
        if isinstance(retention, CacheRetention):
            value, once_used = (part.ctypes.data for part in retention)
            self._order = Order(value=value, once_used=once_used)
        else:
            ran, to_come = (value.ctypes.data for value in (retention.ran, retention.to_come))
            self._order = Order(ran, to_come, retention.runs, foresight.begin() if foresight else None)

    @property
    def address(self) -> int:
        return ctypes.addressof(self._order)


@dataclass(frozen=True)
class Routed:
    """What a layer's experts are asked: x (T, hidden) for experts index (T, k) int64 with their shares (T, k)."""

    layer: int  # of all layers
    x: torch.Tensor
    index: torch.Tensor | None  # None: the router is the caller's too
    shares: torch.Tensor | None


@dataclass(frozen=True)
class Computed:
    """MoE layers whose experts the library computed: whom it routed to, index and shares (layers, T, k).

    spans (layers, 4): how many experts they were, how many of them were there, the seconds of one of them, and the
    tokens that it ran for. slices (any, 4), in the order of time: the layer; 1 where its experts were waited for, 0
    where they were computed; the seconds from the start of the call until then; those that it took.
    """

    index: NDArray[np.int64]
    shares: NDArray[np.float32]
    spans: NDArray[np.float64]
    slices: NDArray[np.float64]


@dataclass
class Buffers:
    """Of one pass. ids (T,) of its tokens; x and normed (T, hidden); index and shares (MoE layers, T, k), spans
    (MoE layers, 4), slices (any, 4), logits (keep, vocabulary)."""

    ids: torch.Tensor
    x: torch.Tensor
    normed: torch.Tensor
    index: torch.Tensor
    shares: torch.Tensor
    spans: torch.Tensor
    slices: torch.Tensor
    logits: torch.Tensor
    order: PassOrder | None
    block: torch.Tensor | None = None  # what the caller computed last


class NativePass:
    """A window on its way through a ``NativeDecoder``, whose ``begin`` makes it."""

    def __init__(
        self, library: ctypes.CDLL, model: PassModel, experts: Experts, run: Run, buffers: Buffers
    ) -> None:
        self._call = library.moespac_pass
        self._held = (model, experts)
        self._addresses = [ctypes.addressof(part) for part in (model, experts, run)]
        self._run = run
        self._buffers = buffers
        self._told = 0  # MoE layers that the caller has computed or was told of
        self.over = self.broken = False

    @property
    def logits(self) -> torch.Tensor:
        """(keep, vocabulary), once it is over."""
        assert self.over
        return self._buffers.logits

    def advance(self, most: int | None = None) -> Routed | None:
        """Run until the pass is over, or the experts of ``most`` layers were computed, or those of a layer are the
        caller's: then ``give`` what they make of what is returned. It is ``broken`` if an expert could not be read:
        whose memory it is knows why. Raises MemoryError."""
        state = self._call(*self._addresses, most or _NO_LIMIT)
        if state == _FAILED:
            raise MemoryError("no memory for the activations of a pass")
        self.over, self.broken = state == _OVER, state == _BROKEN
        return self._asked() if state == _ASKS else None

    def give(self, block: torch.Tensor) -> None:
        """The output of the block that was asked for, (T, hidden) float32, contiguous."""
        self._buffers.block = block
        self._run.block = block.data_ptr()
        self._run.layer += 1
        self._run.row += 1
        self._told += 1

    def computed(self) -> Computed | None:
        """What the library has computed since this was asked last."""
        new = slice(self._told, self._run.row)
        if new.start == new.stop:
            return None
        self._told = new.stop
        buffers, slices = self._buffers, self._buffers.slices[: self._run.slice_count]
        layers = (part[new] for part in (buffers.index, buffers.shares, buffers.spans))
        return Computed(*(part.numpy() for part in (*layers, slices)))

    def _asked(self) -> Routed:
        buffers, row = self._buffers, self._run.row
        if not buffers.index.shape[2]:
            return Routed(self._run.layer, buffers.normed, None, None)
        return Routed(self._run.layer, buffers.normed, buffers.index[row], buffers.shares[row])
