"""A model of Qwen3-30B-A3B's shape with random weights: enough for speed, and nothing to download or to read.

All its experts are one random record. Each has its own copy in host memory and on the accelerator, so what is moved
and what is computed is as much as with a real model's; only the storage below is the same record again and again,
out of this process's memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig

from moespac.config import GpuBenchConfig
from moespac.experts.format import packed_layout
from moespac.experts.store import Buffer
from moespac.model.index import ExpertTensor
from moespac.model.skeleton import Skeleton, build_skeleton
from moespac.types import ModelShape

_CONTEXT = 4096  # tokens; the texts have some hundred


class RepeatedStore:
    """Implements ``ExpertStore``: every expert is the same record, in memory."""

    direct = False
    error = 0.0

    def __init__(self, skeleton: Skeleton, format: str, seed: int) -> None:
        """Raises ConfigError for an unknown format."""
        tensors = _expert_tensors(skeleton)
        self.layout = packed_layout(tensors, format)
        self.shape = ModelShape(
            len(skeleton.experts), skeleton.num_experts, skeleton.top_k, self.layout.nbytes
        )
        spread = skeleton.config.initializer_range
        generator = torch.Generator().manual_seed(seed)
        weights = {each.name: spread * torch.randn(each.shape, generator=generator) for each in tensors}
        record = torch.empty(self.layout.nbytes, dtype=torch.uint8)
        self.layout.encode(weights, record)
        self._record = record.numpy()

    def read_into(self, flat_id: int, buffer: Buffer) -> None:
        assert 0 <= flat_id < self.shape.total
        buffer[:] = self._record  # releases the GIL

    def close(self) -> None: ...

    def describe(self) -> str:
        return f"{self.shape.total} experts, one record of {self.layout.nbytes} bytes in memory"


def write_config(config: GpuBenchConfig, layers: int, folder: Path) -> Skeleton:
    """The shape's config.json with so many layers, in ``folder``, and the model of it without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_target_config(config, layers).to_dict(), indent=2))
    return build_skeleton(folder)


def record_bytes(config: GpuBenchConfig, format: str) -> int:
    """Of one expert."""
    tensors = [
        ExpertTensor("gate_up_proj", (2 * config.width, config.hidden), torch.bfloat16, False),
        ExpertTensor("down_proj", (config.hidden, config.width), torch.bfloat16, False),
    ]
    return packed_layout(tensors, format).nbytes


def draft_model(config: GpuBenchConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A dense model of the drafter's shape, to be run for its time."""
    dimensions = Qwen3Config(
        vocab_size=config.vocabulary,
        hidden_size=config.draft_hidden,
        intermediate_size=config.draft_width,
        num_hidden_layers=config.draft_layers,
        num_attention_heads=config.draft_heads,
        num_key_value_heads=config.draft_groups,
        head_dim=config.head_width,
        max_position_embeddings=_CONTEXT,
        tie_word_embeddings=False,  # as large in use: the head is read, an embedding is one row
    )
    with torch.device(device):
        model: Any = Qwen3ForCausalLM._from_config(dimensions, dtype=dtype)
    return model.requires_grad_(False).eval()


def _target_config(config: GpuBenchConfig, layers: int) -> PreTrainedConfig:
    return Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=config.vocabulary,
        hidden_size=config.hidden,
        intermediate_size=3 * config.hidden,
        num_hidden_layers=layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.groups,
        head_dim=config.head_width,  # type: ignore[call-arg]  # a key that the family reads without declaring it
        max_position_embeddings=_CONTEXT,
        moe_intermediate_size=config.width,
        num_experts=config.experts,
        num_experts_per_tok=config.top_k,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,  # no text ends
    )


def _expert_tensors(skeleton: Skeleton) -> list[ExpertTensor]:
    module = next(iter(skeleton.experts.values()))
    return [
        ExpertTensor(name, tuple(module.get_parameter(name).shape[1:]), torch.bfloat16, False)
        for name in skeleton.expert_parameters()
    ]
