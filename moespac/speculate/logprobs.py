"""What the target thought of the tokens it emitted: log-probabilities, for those who ask. Pure functions.

They are the model's own, before temperature and filters: what evaluation and reranking want, and the same whether
a token was drafted, drawn or greedy. T tokens, V vocabulary entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenLogprob:
    token: int
    logprob: float  # natural logarithm, at most 0
    top: tuple[tuple[int, float], ...]  # the likeliest tokens at this place, best first


def token_logprobs(tokens: list[int], logits: torch.Tensor, top: int) -> list[TokenLogprob]:
    """One for each of ``tokens``; row j of ``logits`` (>= T, V) is what the target said where token j stands.

    ``top``: alternatives with each, at most V.
    """
    rows = logits[: len(tokens)].float().log_softmax(dim=-1)
    chosen = rows[range(len(tokens)), tokens].tolist()
    best = rows.topk(min(top, rows.shape[-1]), dim=-1)
    alternatives = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        TokenLogprob(token, logprob, tuple(zip(ids, values, strict=True)))
        for token, logprob, (ids, values) in zip(tokens, chosen, alternatives, strict=True)
    ]
