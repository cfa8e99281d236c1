"""How well a model predicts a text: perplexity, the check that packed experts still say the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from moespac.errors import ConfigError


@dataclass(frozen=True)
class Perplexity:
    """How surprised a model was."""

    nats: float  # mean cross-entropy a token
    tokens: int  # predicted tokens

    @property
    def ppl(self) -> float:
        """exp(nats); infinite where that leaves a float."""
        return math.exp(self.nats) if self.nats < 709 else math.inf


@torch.inference_mode()
def perplexity(
    model: Callable[..., Any],
    token_ids: Sequence[int],
    context: int = 512,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """Teacher forcing over windows of ``context`` tokens that do not overlap; float32 log-softmax.

    model: a transformers model, or anything that maps ``input_ids`` (1, T) to an output with ``logits``
        (1, T, vocabulary); ``Engine.model`` runs over the tiers.
    token_ids: all but the first are predicted, each exactly once, from the tokens of its window before it.
    progress: called with (predicted tokens, tokens to predict in all).

    Raises ConfigError when there is nothing to predict.
    """
    if len(token_ids) < 2 or context < 1:
        raise ConfigError(
            f"{len(token_ids)} tokens in windows of {context} leave nothing to predict: give 2 tokens or more"
        )
    ids = torch.tensor(token_ids, device=getattr(model, "device", None)).unsqueeze(0)  # (1, N)
    inputs, targets = ids[:, :-1], ids[0, 1:]
    total, nats = len(targets), 0.0
    for start in range(0, total, context):
        window = slice(start, start + context)
        logits = model(input_ids=inputs[:, window], use_cache=False).logits[0].float()  # (T, vocabulary)
        # Summed in float64: the mean must not depend on how many windows came before.
        nats += cross_entropy(logits, targets[window], reduction="none").double().sum().item()
        progress(min(start + context, total), total)
    return Perplexity(nats / total, total)
