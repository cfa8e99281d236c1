"""How large the KV cache of a model grows."""

from __future__ import annotations

from typing import Any


def kv_bytes_per_token(config: Any, element_bytes: int) -> int:
    """Of all layers, from a model's ``config``. Layers with a sliding window or a recurrent state are counted as if
    they kept every token: the estimate is never too small."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):  # latent attention is kept unpacked, per head
        width = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    else:
        width = 2 * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        heads = getattr(config, "num_key_value_heads", None) or heads
    return config.num_hidden_layers * heads * width * element_bytes
