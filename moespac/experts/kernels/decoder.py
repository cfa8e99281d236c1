"""The plain decoder's layers for a few tokens, without torch in between: the trunk's share of a pass."""

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
    Matrix,
    Weights,
    chosen_isa,
    load_library,
)

MAX_TOKENS = 32  # of a call, as in kernels.h
HEAD_PAD = 16  # a head's keys and values are filled up with zeros to a multiple of this, as in decoder.h
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
class Routed:
    """What a layer's experts are asked: x (T, hidden) for experts index (T, k) int64 with their shares (T, k)."""

    x: torch.Tensor
    index: torch.Tensor | None  # None: the router is the caller's too
    shares: torch.Tensor | None


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
        self._layers = [self._describe(layer, shape.width, library, isa) for layer in layers]
        self._head, self._norm = self._weights(head), self._vector(norm)
        self._layer_addresses = [ctypes.addressof(layer) for layer in self._layers]
        self._head_address = ctypes.addressof(self._head)
        self._hidden, self._vocabulary = shape.hidden, head.weight.shape[0]
        self._run_layer, self._run_head = library.moespac_decoder_layer, library.moespac_decoder_head
        self._decoder = library.moespac_decoder_new(ctypes.addressof(shape), max(1, threads), isa)
        if not self._decoder:
            raise MemoryError("no memory for the native decoder")
        weakref.finalize(self, library.moespac_decoder_free, self._decoder).atexit = False

    def layer(
        self,
        number: int,
        x: torch.Tensor,
        block: torch.Tensor | None,
        store: torch.Tensor,
        start: int,
        rotary: tuple[torch.Tensor, torch.Tensor],
    ) -> Routed | None:
        """Layer ``number``: x (T, hidden), the residual stream, in place, after ``block`` (T, hidden) was added.

        ``store`` (2, G, room, padded D) has keys and values up to ``start``; ``rotary`` are cosines and sines,
        (T, D), the sines of the first half negative. Returns what is left to the caller: nothing (None) where the
        block is dense.
        """
        routed = self._routed(self._layers[number], x)
        failed = self._run_layer(
            self._decoder,
            self._layer_addresses[number],
            x.data_ptr(),
            _address(block),
            x.shape[0],
            store.data_ptr(),
            store.shape[2],
            start,
            rotary[0].data_ptr(),
            rotary[1].data_ptr(),
            *(
                (None, None, None)
                if routed is None
                else map(_address, (routed.x, routed.index, routed.shares))
            ),
        )
        if failed:
            raise MemoryError("no memory for the activations of a pass")
        return routed

    def head(self, x: torch.Tensor, block: torch.Tensor | None) -> torch.Tensor:
        """Logits (T, vocabulary) of x (T, hidden) once ``block`` is added."""
        logits = torch.empty(x.shape[0], self._vocabulary)
        failed = self._run_head(
            self._decoder,
            self._head_address,
            self._norm,
            x.data_ptr(),
            _address(block),
            x.shape[0],
            logits.data_ptr(),
        )
        if failed:
            raise MemoryError("no memory for the activations of a pass")
        return logits

    def _routed(self, layer: DecoderLayer, x: torch.Tensor) -> Routed | None:
        """What layer will fill."""
        if layer.up.matrix.rows:
            return None
        if not layer.router.matrix.rows:
            return Routed(torch.empty_like(x), None, None)
        shape = (x.shape[0], layer.top_k)
        return Routed(torch.empty_like(x), torch.empty(shape, dtype=torch.int64), torch.empty(shape))

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


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


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
