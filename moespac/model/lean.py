"""A decoder's forward pass without transformers' layers of calls, on the very weights of the transformers modules.

transformers' forward costs some 0.5 ms of Python and small operations a layer, as much as computing its experts.
Most families are one plain decoder: pre-norm, grouped attention with rotary positions, and a block of experts that
stays transformers' own module. ``lean_trunk`` recognises it by its parts, then by its logits, and leaves all other
models to transformers. On a CPU, windows of a few tokens run in the native kernel; prompts, and other devices, in
torch over the same weights and the same cache.

T tokens of a window, L in the cache before them, H heads, G key and value heads, D width of a head.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from moespac.experts.kernels.decoder import (
    HEAD_PAD,
    MAX_TOKENS,
    DenseBlock,
    LayerWeights,
    NativeDecoder,
    NotServed,
    Projection,
    Router,
)
from moespac.experts.kernels.library import DecoderShape
from moespac.experts.kernels.passes import Computed, HostExperts, PassOrder, Routed

log = logging.getLogger(__name__)

_CHECKED = (
    (0, 40),
    (40, 41),
    (41, 46),
    (46, 80),
)  # a prompt, a token, a window, more prompt: all ways there are
_TOLERANCE = {torch.float32: 1e-3}  # of the logits' spread; rounding differs by some 1e-5
_COARSE = 0.05  # in 16 bits
_LEAST_ROOM = 256  # tokens that a cache begins with: doubling from there, a long answer copies it few times


class LeanCache:
    """Keys and values of one sequence; forgetting tokens is moving its end."""

    rewinds = True
    survives = True  # what a failed pass wrote lies beyond its end

    def __init__(self, layers: int, groups: int, width: int, like: torch.Tensor) -> None:
        self.length = 0
        self._store = like.new_zeros(layers, 2, groups, 0, width)

    def reserve(self, tokens: int) -> torch.Tensor:
        """(layers, 2, G, room, padded D) with room for ``tokens`` more; what fills a head up is zero."""
        room = self._store.shape[3]
        if self.length + tokens > room:
            grown = max(_LEAST_ROOM, 2 * room, self.length + tokens)
            larger = self._store.new_zeros(*self._store.shape[:3], grown, self._store.shape[4])
            larger[..., : self.length, :] = self._store[..., : self.length, :]
            self._store = larger
        return self._store

    def allow_rewind(self) -> None:
        """It always can."""

    def rewind(self, tokens: int) -> None:
        """Forget the last ``tokens``."""
        self.length -= tokens


class _Rotary:
    """Cosines and signed sines of all positions so far, from the model's own module."""

    def __init__(self, module: nn.Module, like: torch.Tensor) -> None:
        self._module: Any = module
        self._like = like
        self._cos = self._sin = like.new_empty(0)

    def at(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, 1, D) each; the sines of the first half are negative, as a rotation by roll() wants them."""
        if end > len(self._cos):
            positions = torch.arange(max(end, 2 * len(self._cos), _LEAST_ROOM), device=self._like.device)
            cos, sin = self._module(self._like, positions[None])
            sin = sin[0].clone()
            sin[:, : sin.shape[1] // 2].neg_()
            self._cos, self._sin = cos[0][:, None].contiguous(), sin[:, None].contiguous()
        return self._cos[start:end], self._sin[start:end]


class _Layer:
    """One decoder layer: attention over fused projections, then whatever block the family has."""

    def __init__(self, layer: Any) -> None:
        attention = layer.self_attn
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        self._width = attention.head_dim
        self._heads, self._groups = (p.out_features // self._width for p in projections[:2])
        self.qkv = _fused(projections)
        self.out = Projection(attention.o_proj.weight, attention.o_proj.bias)
        self._scale = attention.scaling
        self._norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self._before: Any = layer.input_layernorm
        self._between: Any = layer.post_attention_layernorm
        self.block = layer.mlp

    def __call__(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        store: torch.Tensor,
        start: int,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """x (T, hidden); ``store`` (2, G, room, D) of this layer, filled up to ``start``; -> (T, hidden)."""
        x = x + self._attend(_normed(x, self._before), rotary, store, start, mask)
        return x + self.block(_normed(x, self._between)[None])[0]

    def weights(self, routers: bool) -> LayerWeights:
        """For the native decoder, its router among them if it can be."""
        q_norm, k_norm = (None if norm is None else norm.weight for norm in self._norms)
        norms = (self._before.weight, self._between.weight, q_norm, k_norm)
        block = dense_block(self.block) or (_router(self.block) if routers else None)
        return LayerWeights(self.qkv, self.out, norms, block)

    def experts(self, routed: Routed) -> torch.Tensor:
        """The block's output (T, hidden), contiguous, where the native decoder left it to us."""
        if routed.index is None:
            return self.block(routed.x[None])[0].contiguous()
        return self.block.experts.forward(routed.x, routed.index, routed.shares).contiguous()

    def _attend(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        store: torch.Tensor,
        start: int,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        tokens, end, turned = len(x), start + len(x), self._heads + self._groups
        qkv = F.linear(x, self.qkv.weight, self.qkv.bias).view(tokens, -1, self._width)
        qk = self._normed_heads(qkv[:, :turned])
        cos, sin = rotary
        qk = torch.addcmul(qk * cos, qk.roll(self._width // 2, -1), sin)
        store = store[..., : self._width]
        store[0, :, start:end] = qk[:, self._heads :].transpose(0, 1)
        store[1, :, start:end] = qkv[:, turned:].transpose(0, 1)
        q = qk[:, : self._heads].transpose(0, 1)[None]  # (1, H, T, D)
        keys, values = store[:, None, :, :end]  # (1, G, L + T, D) each
        causal = mask is None and tokens > 1
        mixed = F.scaled_dot_product_attention(
            q, keys, values, mask, is_causal=causal, scale=self._scale, enable_gqa=self._heads > self._groups
        )
        return F.linear(mixed[0].transpose(0, 1).reshape(tokens, -1), self.out.weight, self.out.bias)

    def _normed_heads(self, qk: torch.Tensor) -> torch.Tensor:
        """(T, H + G, D); normed head by head or over all heads, as the norms' widths say."""
        if self._norms[0] is None:
            return qk
        parts = qk.split([self._heads, self._groups], dim=1)
        normed = []
        for part, norm in zip(parts, self._norms, strict=True):
            assert norm is not None
            whole = norm.weight.numel() != self._width
            normed.append(_normed(part.flatten(1) if whole else part, norm).view(part.shape))
        return torch.cat(normed, dim=1)


class ExpertsInMemory(Protocol):
    """Who has experts of all layers in host memory."""

    @property
    def layers_in_peace(self) -> int | None:
        """So many may be computed before transfers must be looked after; None: all."""

    def pass_order(self) -> PassOrder | None:
        """What makes way for experts that a layer of the pass to come misses; None: such a layer must ask."""

    def in_host_memory(self, order: PassOrder | None) -> HostExperts | None:
        """Where they are, in the pass with that order; None while every layer must ask."""

    def advanced(self, computed: Computed | None, began: float) -> None:
        """A call that began then on ``time.perf_counter`` computed these layers without asking."""


class LeanTrunk:
    """Runs a decoder over a window. Made by ``lean_trunk``."""

    def __init__(self, model: Any, threads: int, routers: bool = True) -> None:
        """``routers``: in the native kernel too, where they look like the usual one."""
        body = model.model
        self._embedding = body.embed_tokens.weight
        self.layers = [_Layer(layer) for layer in body.layers]
        self._norm = body.norm
        self._head = Projection(model.lm_head.weight, model.lm_head.bias)
        self.rotary = _Rotary(body.rotary_emb, self._embedding)
        attention = body.layers[0].self_attn
        self._width = attention.head_dim
        self._heads, self._groups = (
            p.out_features // self._width for p in (attention.q_proj, attention.k_proj)
        )
        self._scale = attention.scaling
        self._padded = -(-self._width // HEAD_PAD) * HEAD_PAD
        self._native = self._native_decoder(threads, routers)
        self._experts: ExpertsInMemory | None = None

    def attach(self, experts: ExpertsInMemory) -> None:
        """Layers whose experts are all there are computed without asking for each."""
        self._experts = experts

    def new_cache(self) -> LeanCache:
        return LeanCache(len(self.layers), self._groups, self._padded, self._embedding)

    def __call__(self, tokens: torch.Tensor, cache: LeanCache, keep: int) -> torch.Tensor:
        """As ``trunk.Trunk``."""
        start, count = cache.length, len(tokens)
        store, rotary = cache.reserve(count), self.rotary.at(start, start + count)
        native = self._native if count <= MAX_TOKENS else None
        if native is None:
            x = F.embedding(tokens.to(self._embedding.device), self._embedding)
            logits = self.in_torch(x, store, start, rotary, keep)
        else:
            logits = self._in_kernel(native, tokens, store, start, rotary, keep)
        cache.length += count
        return logits

    def in_torch(
        self,
        x: torch.Tensor,
        store: torch.Tensor,
        start: int,
        rotary: tuple[torch.Tensor, torch.Tensor],
        keep: int,
    ) -> torch.Tensor:
        """x (T, hidden), the tokens' embeddings, after ``start`` tokens in ``store`` -> logits as ``__call__``."""
        mask = _mask(len(x), start, x.device) if start and len(x) > 1 else None
        for number, layer in enumerate(self.layers):
            x = layer(x, rotary, store[number], start, mask)
        x = _normed(x[-keep:], self._norm)
        return F.linear(x, self._head.weight, self._head.bias).float().cpu()

    def _in_kernel(
        self,
        native: NativeDecoder,
        tokens: torch.Tensor,
        store: torch.Tensor,
        start: int,
        rotary: tuple[torch.Tensor, torch.Tensor],
        keep: int,
    ) -> torch.Tensor:
        experts = self._experts
        order = experts.pass_order() if experts else None
        found = experts.in_host_memory(order) if experts else None
        run = native.begin(tokens, keep, store, start, rotary, found, order)
        with _one_torch_thread():
            while not run.over:
                began = time.perf_counter()
                routed = run.advance(experts.layers_in_peace if experts else None)
                if experts:
                    experts.advanced(run.computed(), began)
                assert not run.broken, "whose experts they are has raised why"
                if routed is not None:
                    run.give(self.layers[routed.layer].experts(routed))
        return run.logits

    def _native_decoder(self, threads: int, routers: bool) -> NativeDecoder | None:
        if self._embedding.device.type != "cpu" or self._embedding.dtype != torch.float32:
            return None
        sizes = (self._embedding.shape[1], self._heads, self._groups, self._width, self._padded)
        shape = DecoderShape(*sizes, self._norm.variance_epsilon, self._scale)
        layers = [layer.weights(routers) for layer in self.layers]
        try:
            return NativeDecoder(layers, self._embedding, self._head, self._norm.weight, shape, threads)
        except NotServed as reason:
            log.info("the trunk runs in torch: %s", reason)
            return None


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """What is left to torch here is small; its threads would wait for one another, and for cores that read."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def lean_trunk(model: Any, threads: int) -> LeanTrunk | None:
    """A lean forward pass of ``model``, or None when it is not the plain decoder, by its parts or by its logits.

    ``threads`` for the native kernel. The experts must be callable; what they compute is compared too, so a
    stand-in does (transformers runs the same). Fuses the weights of the projections in place.
    """
    if not _has_the_parts(model):
        return None
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.arange(_CHECKED[-1][1]) * 7919 % vocabulary
    expected = model(input_ids=tokens[None].to(model.device), use_cache=False).logits[0].float()
    off = 0.0
    for routers in (True, False):
        lean = LeanTrunk(model, threads, routers)
        cache = lean.new_cache()
        logits = torch.cat([lean(tokens[a:b], cache, b - a) for a, b in _CHECKED])
        off = deviation(logits, expected.cpu())
        if off <= tolerance(model.dtype):
            return lean
    log.info("%s: transformers' own forward pass is used (%.1e off)", model.config.model_type, off)
    return None


def deviation(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in units of the spread of what is expected."""
    return float((logits - expected).abs().max() / expected.std().clamp(min=1e-6))


def tolerance(dtype: torch.dtype) -> float:
    """Deviation up to which two passes over the same weights are the same, but for rounding."""
    return _TOLERANCE.get(dtype, _COARSE)


def _has_the_parts(model: Any) -> bool:
    """Whether ``model`` is built of what the plain decoder is built of, no more and no less."""
    body = getattr(model, "model", None)
    if not isinstance(model, nn.Module) or not isinstance(body, nn.Module):
        return False
    config: Any = model.config
    config = config.get_text_config()
    if _children(model) != {"model", "lm_head"} or _children(body) != {
        "embed_tokens",
        "layers",
        "norm",
        "rotary_emb",
    }:
        return False
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return False
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return False
    # Frequencies that change with the length of the sequence have no one table.
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3", "yarn"):
        return False
    layers: Any = body.layers
    frequencies = getattr(body.rotary_emb, "inv_freq", None)
    if frequencies is None or not all(_is_plain(layer) for layer in layers):
        return False
    return all(layer.self_attn.head_dim == 2 * len(frequencies) for layer in layers)


def _is_plain(layer: nn.Module) -> bool:
    attention = getattr(layer, "self_attn", None)
    norms = {"input_layernorm", "post_attention_layernorm"}
    if attention is None or _children(layer) != {"self_attn", "mlp", *norms}:
        return False
    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    return (
        _children(attention) in (set(projections), {*projections, "q_norm", "k_norm"})
        and not list(attention.parameters(recurse=False))
        and all(type(getattr(attention, name)) is nn.Linear for name in projections)
        and all(hasattr(getattr(layer, name), "variance_epsilon") for name in norms)
        and hasattr(attention, "head_dim")
        and hasattr(attention, "scaling")
    )


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _normed(x: torch.Tensor, norm: Any) -> torch.Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _mask(tokens: int, start: int, device: torch.device) -> torch.Tensor:
    """(T, L + T), true where a token may look."""
    return torch.ones(tokens, start + tokens, dtype=torch.bool, device=device).tril(start)


def dense_block(block: Any) -> DenseBlock | None:
    """``block`` as the native decoder computes it, or None where it is anything else, experts above all."""
    names = ("gate_proj", "up_proj", "down_proj")
    if _children(block) != {*names, "act_fn"} or any(
        type(getattr(block, name)) is not nn.Linear or getattr(block, name).bias is not None for name in names
    ):
        return None
    return DenseBlock(
        _fused([block.gate_proj, block.up_proj]), Projection(block.down_proj.weight), block.act_fn
    )


def _router(block: Any) -> Router | None:
    """The router of a block that consists of a plain one and of experts; None leaves the block to its module."""
    gate: Any = getattr(block, "gate", None)
    if _children(block) != {"gate", "experts"} or list(gate.state_dict()) != ["weight"]:
        return None
    top_k = getattr(gate, "top_k", None)
    if not isinstance(top_k, int):
        return None
    return Router(Projection(gate.weight), top_k, bool(getattr(gate, "norm_topk_prob", True)))


def _fused(layers: list[nn.Linear]) -> Projection:
    """Several projections of one input as one; their own weights become views of it, so nothing is held twice."""
    biases = [layer.bias for layer in layers]
    return Projection(
        _joined([layer.weight for layer in layers]), None if biases[0] is None else _joined(biases)
    )


def _joined(parameters: list[Any]) -> torch.Tensor:
    joined = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, joined.split([len(p) for p in parameters]), strict=True):
        parameter.data = part
    return joined
