"""What a plain decoder computes over a window, cut where its experts come in: pure work over static buffers.

A stretch goes from the end of one block of experts to the router of the next, over the dense layers between them if
there are any; the first begins with the embedding, the last ends with the head. A model without experts is one.
Whatever a stretch reads it leaves as it was, keys and values apart, which it writes anew: running it twice is
running it once, as recording needs.

T tokens of a window, H heads, G key and value heads, R = H / G, D width of a head, L tokens that attention reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from moespac.experts.kernels.decoder import DenseBlock, LayerWeights, Projection
from moespac.model.lean import LeanTrunk, dense_block
from moespac.model.static_cache import Arena


class DeviceExperts(Protocol):
    """The experts of all layers where all of them lie on the device: no word from the host is needed."""

    def __call__(
        self, layer: int, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """x (T, hidden), index (T, k) int64, weights (T, k) float32 -> (T, hidden), in work that can be recorded:
        no size depends on what the tensors say, and nothing waits for the device."""
        ...

    def ran(self, index: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
        """A pass is over: what its routers chose, a layer each, on the host, until the next pass."""


@dataclass(frozen=True)
class ExpertsBlock:
    """A block of experts, of which all but the experts is a stretch's."""

    gate: nn.Module  # the family's own router: x -> (logits, weights, index)
    experts: Any
    shared: DenseBlock | None
    shared_gate: Projection | None


@dataclass(frozen=True)
class Decoder:
    """All weights of a plain decoder, and its sizes."""

    embedding: torch.Tensor
    layers: list[LayerWeights]
    blocks: list[DenseBlock | ExpertsBlock]  # beside each layer
    norm: torch.Tensor
    head: Projection
    heads: int
    groups: int
    width: int
    scale: float
    epsilon: float

    @property
    def routed(self) -> list[ExpertsBlock]:
        """Its MoE layers' blocks."""
        return [block for block in self.blocks if isinstance(block, ExpertsBlock)]

    @property
    def top_k(self) -> int:
        """0 for a dense model."""
        return max((_route(block, self.embedding[:1])[0].shape[1] for block in self.routed), default=0)


def read_decoder(model: Any, lean: LeanTrunk) -> Decoder | None:
    """The parts of a model that ``lean`` runs, or None where a block of it is of no known kind."""
    layers = [layer.weights(routers=False) for layer in lean.layers]
    pairs = zip(layers, lean.layers, strict=True)
    blocks = [weights.block or _experts_block(layer.block) for weights, layer in pairs]
    if not all(isinstance(block, DenseBlock | ExpertsBlock) for block in blocks):
        return None
    body, attention = model.model, model.model.layers[0].self_attn
    heads, groups = (p.out_features // attention.head_dim for p in (attention.q_proj, attention.k_proj))
    return Decoder(
        embedding=body.embed_tokens.weight,
        layers=layers,
        blocks=blocks,  # type: ignore[arg-type]
        norm=body.norm.weight,
        head=Projection(model.lm_head.weight, model.lm_head.bias),
        heads=heads,
        groups=groups,
        width=attention.head_dim,
        scale=attention.scaling,
        epsilon=body.norm.variance_epsilon,
    )


class Buffers:
    """What all windows share, sized for the largest: where stretches leave what the next one reads."""

    def __init__(self, decoder: Decoder, most: int) -> None:
        hidden, like = decoder.embedding.shape[1], decoder.embedding
        self.inputs = like.new_zeros(2 + most, dtype=torch.int64)  # start, tokens drafted so far, token ids
        self.stream = like.new_zeros(2, most, hidden)  # the residual stream: one read, one written
        self.x = like.new_zeros(most, hidden)  # what experts are given ...
        self.block = like.new_zeros(most, hidden)  # ... and what came of it
        self.logits = like.new_zeros(most, decoder.head.weight.shape[0], dtype=torch.float32)
        self.drafted = like.new_zeros(most, dtype=torch.int64)

    @property
    def state(self) -> list[torch.Tensor]:
        """What a stretch may both read and write."""
        return [self.inputs, self.drafted]


class RoutingRow:
    """A layer's index (T, k) int64 and weights (T, k) float32 in one piece of memory: one copy brings both."""

    def __init__(self, row: torch.Tensor, tokens: int, top_k: int) -> None:
        """``row`` (bytes(tokens, top_k),) uint8."""
        numbers = tokens * top_k
        self.index = row[: 8 * numbers].view(torch.int64).view(tokens, top_k)
        self.weights = row[8 * numbers : 12 * numbers].view(torch.float32).view(tokens, top_k)

    @staticmethod
    def bytes(tokens: int, top_k: int) -> int:
        return -(-12 * tokens * top_k // 8) * 8  # the next row is aligned too


class Window:
    """The stretches of a window of T tokens whose attention reads L tokens of an arena."""

    def __init__(self, decoder: Decoder, buffers: Buffers, arena: Arena, tokens: int, bucket: int) -> None:
        like = decoder.embedding
        self.tokens = tokens
        self._decoder = decoder
        self._buffers = buffers
        self._store, self._cosines, self._sines = arena.store, arena.cos, arena.sin
        self._bucket = bucket
        self._positions = buffers.inputs.new_zeros(tokens)
        self._cos, self._sin = (like.new_zeros(tokens, 1, decoder.width) for _ in range(2))
        self._keys = torch.arange(bucket, device=like.device)
        self._mask = like.new_zeros(decoder.heads // decoder.groups * tokens, bucket)
        routed, size = len(decoder.routed), RoutingRow.bytes(tokens, decoder.top_k)
        self.routing = torch.zeros(routed, size, dtype=torch.uint8, device=like.device)
        self.rows = [RoutingRow(row, tokens, decoder.top_k) for row in self.routing]

    def stretch(self, number: int) -> None:
        """From the end of MoE layer ``number`` - 1 to the router of MoE layer ``number``, or to the logits."""
        buffers, x = self._buffers, self._entered(number)
        ends = [n for n, block in enumerate(self._decoder.blocks) if isinstance(block, ExpertsBlock)]
        first = ends[number - 1] + 1 if number else 0
        for layer in range(first, ends[number] if number < len(ends) else len(self._decoder.blocks)):
            block = self._decoder.blocks[layer]
            assert isinstance(block, DenseBlock)
            x = self._attended(layer, x)
            x = x + _dense(block, self._normed(x, self._decoder.layers[layer].norms[1]))
        if number < len(ends):
            self._to_the_router(number, ends[number], x)
        else:
            logits = _linear(self._normed(x, self._decoder.norm), self._decoder.head)
            buffers.logits[: self.tokens].copy_(logits)

    def whole(self, experts: DeviceExperts | None) -> None:
        """The whole pass to the logits; ``experts`` of a model that has any."""
        for number, row in enumerate(self.rows):
            self.stretch(number)
            assert experts is not None
            x = self._buffers.x[: self.tokens]
            self._buffers.block[: self.tokens].copy_(experts(number, x, row.index, row.weights))
        self.stretch(len(self.rows))

    def feed_back(self, vocabulary: int) -> None:
        """After the logits: the likeliest of the first ``vocabulary`` tokens is drafted, and the next window's."""
        inputs = self._buffers.inputs
        token = self._buffers.logits[self.tokens - 1, :vocabulary].argmax(dim=0, keepdim=True)
        self._buffers.drafted.index_copy_(0, inputs[1:2], token)
        inputs[2:3].copy_(token)
        inputs[0].add_(self.tokens)
        inputs[1].add_(1)

    def _entered(self, number: int) -> torch.Tensor:
        """The residual stream (T, hidden) at the begin of a stretch."""
        buffers, tokens = self._buffers, self.tokens
        if number:
            return buffers.stream[(number - 1) % 2, :tokens] + buffers.block[:tokens]
        torch.add(self._keys[:tokens], buffers.inputs[0], out=self._positions)
        torch.index_select(self._cosines, 0, self._positions, out=self._cos)
        torch.index_select(self._sines, 0, self._positions, out=self._sin)
        hidden = self._keys > self._positions[:, None]  # (T, L)
        mask = torch.zeros_like(hidden, dtype=self._mask.dtype).masked_fill_(hidden, -torch.inf)
        self._mask.view(-1, tokens, self._bucket).copy_(mask.expand(len(self._mask) // tokens, -1, -1))
        return F.embedding(buffers.inputs[2 : 2 + tokens], self._decoder.embedding)

    def _to_the_router(self, number: int, layer: int, x: torch.Tensor) -> None:
        buffers, tokens = self._buffers, self.tokens
        block = self._decoder.blocks[layer]
        assert isinstance(block, ExpertsBlock)
        x = self._attended(layer, x)
        normed = self._normed(x, self._decoder.layers[layer].norms[1])
        index, weights = _route(block, normed)
        if block.shared is not None and block.shared_gate is not None:
            x = x + torch.sigmoid(_linear(normed, block.shared_gate)) * _dense(block.shared, normed)
        buffers.stream[number % 2, :tokens].copy_(x)
        buffers.x[:tokens].copy_(normed)
        self.rows[number].index.copy_(index)
        self.rows[number].weights.copy_(weights)

    def _attended(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """x (T, hidden) with the layer's attention added; its keys and values join the store."""
        decoder, weights, tokens = self._decoder, self._decoder.layers[layer], self.tokens
        heads, groups, width = decoder.heads, decoder.groups, decoder.width
        turned, store = heads + groups, self._store[layer]
        qkv = _linear(self._normed(x, weights.norms[0]), weights.qkv).view(tokens, -1, width)
        qk = self._normed_heads(qkv[:, :turned], weights)
        qk = torch.addcmul(qk * self._cos, qk.roll(width // 2, -1), self._sin)
        store[0].index_copy_(1, self._positions, qk[:, heads:].transpose(0, 1))
        store[1].index_copy_(1, self._positions, qkv[:, turned:].transpose(0, 1))
        # The heads of a group read the same keys: as more rows of one head, nothing is repeated in memory.
        q = qk[:, :heads].view(tokens, groups, -1, width).permute(1, 2, 0, 3).reshape(1, groups, -1, width)
        keys, values = store[:, None, :, : self._bucket]  # (1, G, L, D) each
        mixed = F.scaled_dot_product_attention(q, keys, values, self._mask, scale=decoder.scale)
        mixed = mixed.view(groups, -1, tokens, width).permute(2, 0, 1, 3).reshape(tokens, heads * width)
        return x + _linear(mixed, weights.out)

    def _normed_heads(self, qk: torch.Tensor, weights: LayerWeights) -> torch.Tensor:
        """(T, H + G, D); normed head by head or over all heads, as the norms' widths say."""
        q_norm, k_norm = weights.norms[2:]
        if q_norm is None or k_norm is None:
            return qk
        whole = q_norm.numel() != self._decoder.width
        parts = zip(
            qk.split([self._decoder.heads, self._decoder.groups], dim=1), (q_norm, k_norm), strict=True
        )
        return torch.cat(
            [self._normed(p.flatten(1) if whole else p, norm).view(p.shape) for p, norm in parts], 1
        )

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self._decoder.epsilon)


def _route(block: ExpertsBlock, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index and weights (T, k) each."""
    _, weights, index = block.gate(x)
    return index, weights


def _dense(block: DenseBlock, x: torch.Tensor) -> torch.Tensor:
    gate, up = _linear(x, block.up).chunk(2, dim=-1)
    return _linear(block.activation(gate) * up, block.down)


def _linear(x: torch.Tensor, projection: Projection) -> torch.Tensor:
    return F.linear(x, projection.weight, projection.bias)


def _experts_block(block: Any) -> ExpertsBlock | None:
    """None where ``block`` is of another kind, or its router does not say who gets what."""
    children = {name for name, _ in block.named_children()}
    shared, shared_gate = getattr(block, "shared_expert", None), getattr(block, "shared_expert_gate", None)
    if children - {"shared_expert", "shared_expert_gate"} != {"gate", "experts"}:
        return None
    if (shared is None) != (shared_gate is None):
        return None
    weight = next(block.gate.parameters())
    answer = block.gate(weight.new_zeros(1, weight.shape[-1]))
    if not (isinstance(answer, tuple) and len(answer) == 3 and answer[2].dtype == torch.int64):
        return None
    if shared is None or shared_gate is None:
        return ExpertsBlock(block.gate, block.experts, None, None)
    dense = dense_block(shared)
    gate = Projection(shared_gate.weight, shared_gate.bias)
    return None if dense is None else ExpertsBlock(block.gate, block.experts, dense, gate)
