"""How large the KV cache of a model grows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KVCache:
    """Bytes that a token takes in all layers, and how many tokens the model was made for (None: not said)."""

    token_bytes: int
    longest: int | None

    def nbytes(self, tokens: int) -> int:
        """For a text of so many tokens, or as many of them as the model takes."""
        return self.token_bytes * (tokens if self.longest is None else min(tokens, self.longest))


def kv_cache(config: Any, element_bytes: int) -> KVCache:
    """Of a model, from its ``config``."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return KVCache(kv_bytes_per_token(config, element_bytes), longest or None)


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
