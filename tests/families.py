"""Tiny random checkpoints of the families we promise, saved by transformers itself."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 97
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_MLA: dict[str, Any] = {  # multi-head latent attention of the DeepSeek models
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "intermediate_size": 40,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "intermediate_size": 40,
        "head_dim": 8,
        "norm_topk_prob": True,
    },
    "qwen2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "intermediate_size": 40,
    },
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 24},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 24},
    "deepseek_v2": _MLA | {"topk_method": "greedy", "num_experts_per_tok": 2},
    "deepseek_v3": _MLA | {"q_lora_rank": 16, "num_experts_per_tok": 3},
    "glm4_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 24,
        "intermediate_size": 40,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "head_dim": 8,
    },
    "gpt_oss": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 24,
        "head_dim": 8,
        "sliding_window": 8,
    },
    "granitemoe": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 24},
    "phimoe": {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 24},
}

# Families whose cache or experts are of another kind than most.
UNUSUAL: dict[str, dict[str, Any]] = {
    "lfm2_moe": {  # short convolutions, which can be rewound
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "intermediate_size": 40,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "qwen3_next": {  # a recurrent state, which cannot
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "intermediate_size": 40,
        "head_dim": 8,
        "num_hidden_layers": 4,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "minimax": {  # a cache class of its own
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 24,
        "head_dim": 8,
    },
    "nemotron_h": {  # experts without a gate
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "intermediate_size": 40,
        "moe_shared_expert_intermediate_size": 24,
        "head_dim": 8,
        "hybrid_override_pattern": "M*E",
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "intermediate_size": 40,
    },
}


def build_model(family: str, **changes: Any) -> PreTrainedModel:
    """A random float32 model of ``family``, the same at every call."""
    config = AutoConfig.for_model(family, **(_COMMON | (FAMILIES | UNUSUAL)[family] | changes))
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers' initial weights are so small that all logits are nearly equal, and zero biases would
            # hide a bias that is dropped. Wide random weights make greedy decoding well determined.
            if parameter.dim() > 1 or "bias" in name:
                parameter.normal_(0.0, 0.6 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.3)
                if "embed" in name or "lm_head" in name:
                    parameter.mul_(4.0)
                if "experts" in name:
                    parameter.mul_(2.0)  # what the experts say must matter, or a wrong one goes unnoticed
    return model.eval()


def save_checkpoint(family: str, directory: Path, shard_bytes: str = "5GB", **changes: Any) -> Path:
    build_model(family, **changes).save_pretrained(directory, max_shard_size=shard_bytes)
    return directory


@functools.cache
def reference_tokens(family: str, prompt: tuple[int, ...], new_tokens: int) -> list[int]:
    """transformers' own greedy continuation."""
    ids = torch.tensor([prompt])
    out = build_model(family).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()
