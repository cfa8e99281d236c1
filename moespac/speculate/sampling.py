"""From logits to a token, as transformers does it. Pure functions; T positions, V vocabulary entries.

Greedy decoding has no distribution to speak of: callers take the argmax (see ``verify.verify_greedy``).
"""

from __future__ import annotations

import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moespac.config import SamplingConfig


def probabilities(logits: torch.Tensor, sampling: SamplingConfig) -> torch.Tensor:
    """What ``sampling`` draws from, (T, V) in float32, given ``logits`` (T, V) of any float type."""
    assert not sampling.greedy, "greedy decoding takes the argmax, it does not draw"
    logits = logits.float()
    for warper in _warpers(sampling):
        logits = warper(None, logits)  # none of them looks at the token ids
    return logits.softmax(dim=-1)


def draw(probs: torch.Tensor, generator: torch.Generator) -> int:
    """One token from ``probs`` (V,). The draw happens where the generator lives: a seed fixes it."""
    return int(torch.multinomial(probs.to(generator.device), 1, generator=generator))


def _warpers(sampling: SamplingConfig) -> list[LogitsProcessor]:
    """In the order of ``GenerationMixin._get_logits_processor``: each filter sees what the last one left."""
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0.0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers
