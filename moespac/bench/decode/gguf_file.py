"""A Qwen3 or Qwen3-MoE checkpoint as a GGUF file, for llama.cpp: the same weights, the same vocabulary.

Names and keys are those of the format's published description and of its ``gguf`` package. Matrices take the
wanted type, as with llama.cpp's own quantiser; norms and the router stay in float32. Rows of 192 weights are no
multiple of the 256 that the K-quants want, so experts of 4 bits are Q4_0.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moespac.errors import ConfigError, ModelError
from moespac.model.safetensors import TensorEntry, read_checkpoint_headers
from moespac.progress import ProgressOption, progress_over

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

GGUF_TYPES = {
    "f32": "F32",
    "bf16": "BF16",
    "int8": "Q8_0",
    "int4": "Q4_0",
}  # of experts, by the pack's format
_TRUNK_TYPES = GGUF_TYPES | {"int4": "Q8_0"}  # of the other matrices: small, and not worth an error

_ARCHITECTURES = {"qwen3_moe": "qwen3moe", "qwen3": "qwen3"}
_LAYER_NAMES = {  # of a layer's tensors, here -> there
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_MODEL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_EXPERT_NAMES = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
_EXACT = ("norm.weight", "ffn_gate_inp.weight")  # endings of what stays in float32


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file, put together from one or, for experts, several of the checkpoint's."""

    name: str
    parts: tuple[TensorEntry, ...]
    stacked: bool  # whether the parts get an axis in front

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.parts[0].shape
        return (len(self.parts), *shape) if self.stacked else shape

    @property
    def source_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def read(self) -> NDArray[np.float32]:
        arrays = [_read(part) for part in self.parts]
        return np.stack(arrays) if self.stacked else arrays[0]


def write_gguf(source: Path, file: Path, format: str, progress: ProgressOption = True) -> None:
    """Write the checkpoint in ``source`` to ``file``, which appears only once it is whole.

    ``format`` is one of ``GGUF_TYPES``. Raises ModelError for a family other than Qwen3's, ConfigError where the
    ``gguf`` package is missing.
    """
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise ConfigError(
            "GGUF files need the gguf package: install it with `pip install 'moespac[bench]'`"
        ) from None
    config = json.loads((source / "config.json").read_text())
    architecture = _ARCHITECTURES.get(config["model_type"])
    if architecture is None:
        raise ModelError(
            f"{source}: a {config['model_type']} cannot be written as GGUF here; take a Qwen3 or Qwen3-MoE"
        )
    tensors = list(_tensors(read_checkpoint_headers(source), config))
    partial = file.with_name(f"{file.name}.partial")
    writer = GGUFWriter(partial, architecture)
    _add_metadata(writer, config)
    _add_vocabulary(writer, source, config)
    _write_tensors(writer, tensors, format, progress)
    os.replace(partial, file)


def _tensors(entries: dict[str, TensorEntry], config: dict[str, Any]) -> Iterator[_Tensor]:
    for key, entry in entries.items():
        if key in _MODEL_NAMES:
            if key != "lm_head.weight" or not config.get("tie_word_embeddings"):
                yield _Tensor(_MODEL_NAMES[key], (entry,), stacked=False)
        elif ".experts." not in key:
            layer, name = _split(key)
            yield _Tensor(f"blk.{layer}.{_LAYER_NAMES[name]}.weight", (entry,), stacked=False)
    for layer in range(config["num_hidden_layers"]) if "num_experts_per_tok" in config else ():
        for name, there in _EXPERT_NAMES.items():
            keys = [f"model.layers.{layer}.mlp.experts.{e}.{name}.weight" for e in range(_experts(config))]
            yield _Tensor(
                f"blk.{layer}.{there}.weight", tuple(_entry(entries, key) for key in keys), stacked=True
            )


def _entry(entries: dict[str, TensorEntry], key: str) -> TensorEntry:
    if key not in entries:
        raise ModelError(f"the checkpoint has no {key}; take one that stores each expert by itself")
    return entries[key]


def _split(key: str) -> tuple[int, str]:
    """("model.layers.3.mlp.gate.weight") -> (3, "mlp.gate")."""
    _, _, layer, name = key.removesuffix(".weight").split(".", 3)
    if name not in _LAYER_NAMES:
        raise ModelError(f"{key}: has no place in a GGUF file of this family; take another model")
    return int(layer), name


def _read(entry: TensorEntry) -> NDArray[np.float32]:
    import torch  # numpy knows no bfloat16

    with entry.file.open("rb") as stream:
        stream.seek(entry.offset)
        data = bytearray(stream.read(entry.nbytes))
    return torch.frombuffer(data, dtype=entry.dtype).view(entry.shape).float().numpy()


def _experts(config: dict[str, Any]) -> int:
    return config.get("num_experts") or config["num_local_experts"]


def _add_metadata(writer: GGUFWriter, config: dict[str, Any]) -> None:
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_parameters") or config
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "num_experts_per_tok" in config:
        writer.add_expert_count(_experts(config))
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def _add_vocabulary(writer: GGUFWriter, source: Path, config: dict[str, Any]) -> None:
    """Byte-level BPE, as the checkpoint's tokenizer.json has it; ids without a token are unused ones."""
    from gguf import TokenType

    tokenizer = json.loads((source / "tokenizer.json").read_text())
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise ModelError(f"{source}: its tokenizer is no BPE; take another model")
    ids = {number: token for token, number in model["vocab"].items()}
    special = {added["id"]: added["content"] for added in tokenizer["added_tokens"]}
    ids |= special
    numbers = range(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([ids.get(number, f"[unused{number}]") for number in numbers])
    writer.add_token_types([_token_type(number, ids, special, TokenType) for number in numbers])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def _token_type(number: int, ids: dict[int, str], special: dict[int, str], types: Any) -> int:
    if number not in ids:
        return types.UNUSED
    return types.CONTROL if number in special else types.NORMAL


def _write_tensors(writer: GGUFWriter, tensors: list[_Tensor], format: str, progress: ProgressOption) -> None:
    """One after the other: together they are larger than memory."""
    from gguf import quant_shape_to_byte_shape
    from gguf.quants import quantize

    types = {tensor.name: _type(tensor, format) for tensor in tensors}
    for tensor in tensors:
        nbytes = math.prod(quant_shape_to_byte_shape(tensor.shape, types[tensor.name]))
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=types[tensor.name]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with progress_over(sum(tensor.source_bytes for tensor in tensors), "gguf", progress) as advance:
        for tensor in tensors:
            writer.write_tensor_data(quantize(tensor.read(), types[tensor.name]))
            advance(tensor.source_bytes)
    writer.close()


def _type(tensor: _Tensor, format: str) -> GGMLQuantizationType:
    from gguf import GGMLQuantizationType

    if tensor.name.endswith(_EXACT):
        return GGMLQuantizationType.F32
    return GGMLQuantizationType[(GGUF_TYPES if tensor.stacked else _TRUNK_TYPES)[format]]
