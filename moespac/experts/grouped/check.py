"""Before the kernels are used: do they compute what ``ExpertMath`` computes? It compiles them all, too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from moespac.config import GroupedConfig
from moespac.experts.compute import ExpertMath
from moespac.experts.format import RecordLayout

if TYPE_CHECKING:
    from moespac.experts.grouped.experts import GroupedExperts


def disagreement(
    grouped: GroupedExperts,
    math: ExpertMath,
    layout: RecordLayout,
    device: torch.device,
    dtype: torch.dtype,
    config: GroupedConfig,
) -> str | None:
    """What is wrong, or None. Tries one random expert with one token, with a few, and with a prompt's."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    arena = torch.empty(1, layout.nbytes, dtype=torch.uint8, device=device)
    # Weights that drive a gate into its bounds.
    layout.encode({t.name: normal(*t.shape) * 4.0 / t.shape[-1] ** 0.5 for t in layout.tensors}, arena[0])
    for tokens in (1, 5, config.window_tokens + 1):
        x = normal(tokens, next(t.shape[0] for t in layout.tensors if t.name == "down_proj")).to(dtype)
        rows = grouped.layer(tokens, 1)
        one, all_tokens = np.zeros(1, np.int64), np.full(1, tokens)
        grouped.run(x, 1, arena, one, np.arange(tokens), one, all_tokens, rows.device)
        none = np.zeros(0, np.int64)
        found = grouped.join(rows, torch.ones(tokens, 1, device=device), x.float(), none, none)
        expected = math(x.float(), arena[0], None)
        error = float((found - expected).norm() / expected.norm())
        if not error <= config.tolerance:
            return f"the kernels compute something else (off by {error:.1e} of the norm for {tokens} tokens)"
    return None
