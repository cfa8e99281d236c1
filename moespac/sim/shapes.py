"""Models as the simulator sees them: how many experts of how many bytes, and what else a token reads.

Everything follows from the dimensions in a checkpoint's config.json and a number format, so a model that is
not there can be simulated as exactly as one that is. Left out: norms and biases outside the experts (below
0.1% of any model here) and the KV cache (little beside the experts in the short contexts of the benchmarks).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moespac.errors import ConfigError, ModelError
from moespac.types import ModelShape

_FLOAT_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
_GROUP = 32  # weights that share a scale, in int4 and in MXFP4 (OCP Microscaling Formats v1.0)
_GROUP_BYTES = {
    "int4": 18,  # half a byte each, one byte of scale, one of minimum: moespac's packs; GGUF's Q4_K is as large
    "mxfp4": 17,  # half a byte each, one byte of exponent
}
_ROW_BYTES = {"int8": 4, "int4": 8}  # float32 scales of each output row, in moespac's packs
FORMATS = (*_FLOAT_BYTES, "int8", *_GROUP_BYTES)

_PAGE = 4096  # records fill whole pages, for direct reads

_EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "top_k")


@dataclass(frozen=True)
class SimModel:
    """What a simulated pass needs to know of a model. Bytes and weights; a weight costs two operations a token."""

    name: str
    format: str  # of the experts, one of FORMATS
    layers: int  # MoE layers
    experts: int  # routed experts in each of them
    top_k: int
    hidden: int
    shared_experts: int  # computed for every token; part of the trunk
    expert_weights: int  # parameters of one routed expert
    expert_bytes: int  # its record
    trunk_weights: int  # parameters that every token reads: attention, routers, shared and dense FFNs, head
    trunk_bytes: int
    embedding_weights: (
        int  # the input embedding where the head has its own: held, but one row a token is read
    )
    embedding_bytes: int
    drafter_bytes: int = 0  # read for each drafted token; 0: no draft model

    @property
    def total_weights(self) -> int:
        """All parameters of the target."""
        return self.layers * self.experts * self.expert_weights + self.trunk_weights + self.embedding_weights

    @property
    def resident_bytes(self) -> int:
        """What a device must hold beside experts: trunk, embedding and drafter."""
        return self.trunk_bytes + self.embedding_bytes + self.drafter_bytes

    def to_model_shape(self) -> ModelShape:
        """The part that policies know."""
        return ModelShape(self.layers, self.experts, self.top_k, self.expert_bytes)


@dataclass(frozen=True)
class _Named:
    """A model that has a name here: whose dimensions, which formats, which drafter."""

    config: str
    format: str
    trunk_format: str
    drafter_bytes: int


# The public config.json of each checkpoint, as far as sizes follow from it.
_CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-30B-A3B": {
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "intermediate_size": 6144,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "openai/gpt-oss-20b": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "intermediate_size": 2880,
        "vocab_size": 201088,
        "tie_word_embeddings": False,
    },
    "deepseek-ai/DeepSeek-V2-Lite": {
        "hidden_size": 2048,
        "num_hidden_layers": 27,
        "first_k_dense_replace": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1408,
        "intermediate_size": 10944,
        "vocab_size": 102400,
        "tie_word_embeddings": False,
    },
    "mistralai/Mixtral-8x7B-v0.1": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 14336,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
}

# Drafters, as bytes that one drafted token reads (docs/hardware.md).
_QWEN3_4B_FP8 = 3_634_000_000 + 2 * 151936 * 2560  # the paper's: a byte a weight, the tied embedding in bf16
_QWEN3_06B_INT8 = 596_000_000
_SEVEN_B_INT4 = 7_000_000_000 * 18 // 32  # of the target's family and vocabulary: DeepSeek-LLM 7B, Mistral 7B

_NAMED = {
    "qwen3-30b-a3b-f16": _Named("Qwen/Qwen3-30B-A3B", "f16", "f16", _QWEN3_4B_FP8),
    "qwen3-30b-a3b-q4": _Named("Qwen/Qwen3-30B-A3B", "int4", "int4", _QWEN3_06B_INT8),
    "gpt-oss-20b-f16": _Named(
        "openai/gpt-oss-20b", "f16", "f16", _QWEN3_4B_FP8
    ),  # a stand-in of the paper's size
    "gpt-oss-20b-mxfp4": _Named("openai/gpt-oss-20b", "mxfp4", "bf16", _QWEN3_06B_INT8),
    "deepseek-v2-lite-f16": _Named("deepseek-ai/DeepSeek-V2-Lite", "f16", "f16", _SEVEN_B_INT4),
    "mixtral-8x7b-f16": _Named("mistralai/Mixtral-8x7B-v0.1", "f16", "f16", _SEVEN_B_INT4),
}
MODEL_NAMES = tuple(_NAMED)


def find_model(source: str, format: str | None = None) -> SimModel:
    """A model by name (one of ``MODEL_NAMES``), or by the path of a config.json, or of its directory.

    ``format`` is that of the experts and belongs to a path: a name has its own; without it, bf16. Raises
    ConfigError for a format that cannot be used, ModelError for a file that is no configuration of a MoE model.
    """
    if source in _NAMED:
        if format is not None:
            raise ConfigError(f"--format {format}: {source} has its own; leave it out, or name a config.json")
        return named_model(source)
    return read_model(Path(source), format or "bf16")


def named_model(name: str) -> SimModel:
    """One of ``MODEL_NAMES``. Raises ConfigError for another name."""
    if name not in _NAMED:
        raise ConfigError(
            f"unknown model shape {name!r}; choose one of {', '.join(_NAMED)}, or a config.json"
        )
    named = _NAMED[name]
    return model_from_config(
        name, _CONFIGS[named.config], named.format, named.trunk_format, named.drafter_bytes
    )


def read_model(path: Path, format: str) -> SimModel:
    """The model of a Hugging Face config.json (or its directory), its experts stored in ``format``.

    Raises ConfigError for an unknown format, ModelError for a file that cannot be read or is no MoE's.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_bytes())
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror}); name a config.json, or one of {', '.join(_NAMED)}"
        ) from None
    except ValueError:
        raise ModelError(f"{file}: is not JSON; name the config.json of a checkpoint") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file}: is not a configuration; name the config.json of a checkpoint")
    try:
        return model_from_config(f"{file.resolve().parent.name}-{format}", config, format)
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from None


def model_from_config(
    name: str, config: Mapping[str, Any], format: str, trunk_format: str | None = None, drafter_bytes: int = 0
) -> SimModel:
    """The sizes that follow from a Hugging Face configuration, read as data.

    Experts are gated FFNs of three matrices. The trunk is in ``trunk_format``; by default 16 bits, as packs
    leave it, or 32 if the experts have them. Raises ConfigError for an unknown format, ModelError for a key
    that is missing or no size.
    """
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}; choose one of {', '.join(FORMATS)}")
    trunk_format = trunk_format or ("f32" if format == "f32" else "bf16")
    dims = _Dimensions(config.get("text_config") or config)
    hidden, width, vocabulary = dims.hidden, dims.expert_width, dims.size("vocab_size")
    experts, moe_layers = dims.experts, dims.moe_layers
    expert = [(2 * width, hidden), (hidden, width)]
    bias = (
        2 * width + hidden if dims.get("model_type") == "gpt_oss" else 0
    )  # the one family with biased experts
    ffns = (
        3
        * hidden
        * (moe_layers * dims.shared_width + dims.dense_layers * (dims.get("intermediate_size") or 0))
    )
    trunk = dims.attention_weights + moe_layers * hidden * experts + ffns + vocabulary * hidden
    embedding = 0 if dims.get("tie_word_embeddings", False) else vocabulary * hidden
    return SimModel(
        name=name,
        format=format,
        layers=moe_layers,
        experts=experts,
        top_k=dims.size(*_TOP_K_KEYS),
        hidden=hidden,
        shared_experts=dims.shared_experts,
        expert_weights=3 * hidden * width + bias,
        expert_bytes=-(-(sum(_bytes(*shape, format) for shape in expert) + 2 * bias) // _PAGE) * _PAGE,
        trunk_weights=trunk,
        trunk_bytes=_bytes(trunk // hidden, hidden, trunk_format),
        embedding_weights=embedding,
        embedding_bytes=_bytes(embedding // hidden, hidden, trunk_format),
        drafter_bytes=drafter_bytes,
    )


class _Dimensions:
    """A configuration's sizes under the keys of the several families."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.get = config.get
        self.hidden = self.size("hidden_size")
        self.experts = self.size(*_EXPERTS_KEYS)
        self.expert_width = self.size("moe_intermediate_size", "intermediate_size")

    def size(self, *keys: str) -> int:
        """The value of the first of ``keys`` that is there."""
        value = next((self.get(key) for key in keys if self.get(key) is not None), None)
        if not isinstance(value, int) or value < 1:
            raise ModelError(f"has no {' or '.join(keys)}; moespac simulates Mixture-of-Experts decoders")
        return value

    @property
    def layers(self) -> int:
        return self.size("num_hidden_layers")

    @property
    def moe_layers(self) -> int:
        first, step = self.get("first_k_dense_replace") or 0, self.get("decoder_sparse_step") or 1
        dense = self.get("mlp_only_layers") or []
        return sum(i >= first and (i + 1) % step == 0 and i not in dense for i in range(self.layers))

    @property
    def dense_layers(self) -> int:
        return self.layers - self.moe_layers

    @property
    def shared_experts(self) -> int:
        return self.get("n_shared_experts") or int(self.shared_width > 0)

    @property
    def shared_width(self) -> int:
        """The shared experts of a layer, side by side."""
        together = self.get("shared_expert_intermediate_size") or self.get("shared_intermediate_size")
        return together or (self.get("n_shared_experts") or 0) * self.expert_width

    @property
    def attention_weights(self) -> int:
        """Of all layers; with kv_lora_rank, multi-head latent attention (DeepSeek-V2)."""
        heads = self.size("num_attention_heads")
        if self.get("kv_lora_rank"):
            return self.layers * self._latent_attention(heads)
        kv_heads = self.get("num_key_value_heads") or heads
        head = self.get("head_dim") or self.hidden // heads
        return self.layers * self.hidden * head * (2 * heads + 2 * kv_heads)

    def _latent_attention(self, heads: int) -> int:
        rank, rope = self.size("kv_lora_rank"), self.size("qk_rope_head_dim")
        nope, value = self.size("qk_nope_head_dim"), self.size("v_head_dim")
        q_rank = self.get("q_lora_rank")
        query = heads * (nope + rope)
        queries = q_rank * (self.hidden + query) if q_rank else self.hidden * query
        keys_values = self.hidden * (rank + rope) + rank * heads * (nope + value)
        return queries + keys_values + heads * value * self.hidden


def _bytes(rows: int, columns: int, format: str) -> int:
    """A matrix as it is stored: values, and the scales of its groups and rows."""
    if format in _FLOAT_BYTES:
        return rows * columns * _FLOAT_BYTES[format]
    groups = -(-columns // _GROUP)
    values = groups * _GROUP_BYTES[format] if format in _GROUP_BYTES else columns
    return rows * (values + _ROW_BYTES.get(format, 0))
