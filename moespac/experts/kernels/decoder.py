"""The plain decoder's layers for a few tokens, without torch in between."""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moespac.experts.kernels.gates import find_gate
from moespac.experts.kernels.library import (
    FORMATS,
    DecoderLayer,
    DecoderShape,
    Experts,
    Matrix,
    PassModel,
    Run,
    Weights,
    chosen_isa,
    load_library,
)
from moespac.experts.kernels.passes import Buffers, HostExperts, NativePass, PassOrder

MAX_TOKENS = 32  # of a call, as in kernels.h
HEAD_PAD = 16  # a head's keys and values are filled up with zeros to a multiple of this, as in decoder.h
_SLICES = 64  # of time that a layer's experts may take apart: a batch computed, a wait for a read, and so on
_FORMATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class Projection:
    """A matrix (out, in), contiguous, and its bias (out,) or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class DenseBlock:
    """gate|up (2 I, hidden), down (hidden, I), and the activation of the gate."""

    up: Projection
    down: Projection
    activation: nn.Module


@dataclass(frozen=True)
class Router:
    """Softmax over all experts, the largest ``top_k`` of it, made to add up to 1 where ``renormalise``."""

    weight: Projection
    top_k: int
    renormalise: bool


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. ``norms``: before attention, before the block, of q, of k (these two may be None)."""

    qkv: Projection
    out: Projection
    norms: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]
    block: DenseBlock | Router | None  # None where all of the block is the caller's


class NativeDecoder:
    """Computes in float32, whatever float the weights are. A token's result does not depend, bit by bit, on threads
    or on the tokens beside it. Uses the tensors it is given in place; keep no other thread in a call."""

    def __init__(
        self,
        layers: list[LayerWeights],
        embedding: torch.Tensor,
        head: Projection,
        norm: torch.Tensor,
        shape: DecoderShape,
        threads: int,
    ) -> None:
        """Raises NotServed when this machine or one of the layers cannot be served."""
        library = load_library()
        isa = chosen_isa(library) if library else None
        if library is None or isa is None:
            raise NotServed("no native kernel")
        self._held: list[Any] = []  # tensors whose addresses the library has
        self._layers = (DecoderLayer * len(layers))(
            *(self._describe(layer, shape.width, library, isa) for layer in layers)
        )
        self._head, self._norm = self._weights(head), self._vector(norm)
        self._embedding = self._weights(Projection(embedding)).base
        self._hidden, self._vocabulary = shape.hidden, head.weight.shape[0]
        self._threads, self._isa = max(1, threads), isa.decode()
        self._library = library
        self._decoder = library.moespac_decoder_new(ctypes.addressof(shape), self._threads, isa)
        if not self._decoder:
            raise MemoryError("no memory for the native decoder")
        weakref.finalize(self, library.moespac_decoder_free, self._decoder).atexit = False
        self._routed = sum(not layer.up.matrix.rows for layer in self._layers)
        self._top_k = self._common_top_k()
        self._model = self._pass_model(max((layer.router.matrix.rows for layer in self._layers), default=0))
        self._experts: tuple[HostExperts | None, Experts] = (None, Experts())

    def begin(
        self,
        tokens: torch.Tensor,
        keep: int,
        store: torch.Tensor,
        start: int,
        rotary: tuple[torch.Tensor, torch.Tensor],
        experts: HostExperts | None,
        order: PassOrder | None = None,
    ) -> NativePass:
        """A pass of ``tokens`` (T,), int64, to give the logits of the last ``keep`` of them.

        ``store`` (layers, 2, G, room, padded D) has keys and values up to ``start``; ``rotary`` are cosines and
        sines, (T, D), the sines of the first half negative. ``experts``: a layer of which all that are routed to
        are ready needs no caller, and none does if ``order`` says what makes way for those that are not.
        """
        assert tokens.dtype == torch.int64 and tokens.is_contiguous()
        count = len(tokens)
        routings = (self._routed, count, self._top_k)
        x, normed = torch.empty(2, count, self._hidden)
        index, shares = torch.empty(routings, dtype=torch.int64), torch.empty(routings)
        spans = torch.empty(self._routed, 4, dtype=torch.float64)
        slices = torch.empty(_SLICES * self._routed, 4, dtype=torch.float64)
        logits = torch.empty(keep, self._vocabulary)
        run = Run(
            *(part.data_ptr() for part in (tokens, x, normed)),
            *(count, keep, store.data_ptr(), store.shape[3], start),
            *(part.data_ptr() for part in (*rotary, index, shares, spans, slices)),
            *(0, len(slices), logits.data_ptr(), order.address if order else None),
        )
        buffers = Buffers(tokens, x, normed, index, shares, spans, slices, logits, order)
        return NativePass(self._library, self._model, self._served(experts), run, buffers)

    def _served(self, experts: HostExperts | None) -> Experts:
        """What the library is told of ``experts``: nothing, where they or a router are not for it."""
        if experts is not self._experts[0]:
            kernel = experts.kernel if experts else None
            fit = kernel and self._top_k and (kernel.isa, kernel.threads) == (self._isa, self._threads)
            self._experts = (experts, experts.describe() if experts and fit else Experts())
        return self._experts[1]

    def _common_top_k(self) -> int:
        """Of all layers with experts, or 0 where their routers are the caller's."""
        top_ks = {int(layer.top_k) for layer in self._layers if not layer.up.matrix.rows}
        if len(top_ks) > 1:
            raise NotServed("its layers choose different numbers of experts")
        return top_ks.pop() if top_ks else 0

    def _pass_model(self, experts: int) -> PassModel:
        routings = MAX_TOKENS * self._top_k
        scratch = [
            torch.empty(MAX_TOKENS, self._hidden),
            torch.empty(routings, self._hidden),
            torch.empty(experts + 8 * routings, dtype=torch.int64),
            torch.empty(routings, dtype=torch.float64),
        ]
        self._held += scratch
        layers = ctypes.addressof(self._layers)
        addresses = [part.data_ptr() for part in scratch]
        head = ctypes.addressof(self._head)
        count, vectors = len(self._layers), (self._norm, self._embedding)
        return PassModel(self._decoder, layers, count, self._top_k, head, *vectors, *addresses)

    def _describe(self, layer: LayerWeights, width: int, library: ctypes.CDLL, isa: bytes) -> DecoderLayer:
        described = DecoderLayer(qkv=self._weights(layer.qkv), out=self._weights(layer.out))
        before, between, q_norm, k_norm = layer.norms
        described.before, described.between = self._vector(before), self._vector(between)
        if q_norm is not None and k_norm is not None:
            described.q_norm, described.k_norm = self._vector(q_norm), self._vector(k_norm)
            described.whole_norms = int(q_norm.numel() != width)
        if isinstance(layer.block, DenseBlock):
            gate = find_gate(_DenseGate(layer.block.activation), library, isa)
            if gate is None:
                raise NotServed("the native kernel does not know the gate of its dense layers")
            described.gate = gate
            described.up, described.down = self._weights(layer.block.up), self._weights(layer.block.down)
        elif isinstance(layer.block, Router):
            described.router, described.top_k = self._weights(layer.block.weight), layer.block.top_k
            described.renormalise = int(layer.block.renormalise)
        return described

    def _weights(self, projection: Projection) -> Weights:
        parts = [part for part in (projection.weight, projection.bias) if part is not None]
        assert all(part.is_contiguous() and part.device.type == "cpu" for part in parts)
        self._held += parts
        base = min(part.data_ptr() for part in parts)
        matrix = Matrix(*projection.weight.shape, scales=-1, minima=-1, row_scales=-1, bias=-1)
        matrix.values = projection.weight.data_ptr() - base
        matrix.format = FORMATS.index(_FORMATS[projection.weight.dtype])
        if projection.bias is not None:
            matrix.bias, matrix.bias_format = projection.bias.data_ptr() - base, matrix.format
        return Weights(matrix, base)

    def _vector(self, weight: torch.Tensor) -> int:
        vector = weight.float().contiguous()
        self._held.append(vector)
        return vector.data_ptr()


class NotServed(Exception):
    """This decoder runs in torch. Its text says why."""


class _DenseGate(nn.Module):
    """A dense block's gate, as ``find_gate`` asks an experts module for its own."""

    has_gate = is_concatenated = True

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.act_fn = activation

    def _apply_gate(self, up: torch.Tensor) -> torch.Tensor:
        gate, up = up.chunk(2, dim=-1)
        return self.act_fn(gate) * up
