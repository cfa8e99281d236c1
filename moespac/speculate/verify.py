"""VERIFY: which drafted tokens the target keeps, and the one token it adds. Pure functions.

K drafted tokens, V vocabulary entries. The target has seen the last accepted token and then the K drafts, so
row j of its K+1 rows says what belongs where draft j stands; the last row is the bonus position. K = 0 is
plain decoding.

The sampled rule is speculative sampling (Leviathan et al., arXiv 2211.17192, algorithm 1): the tokens that
come out are distributed exactly as if the target had drawn them one by one, whatever the drafter is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile

import torch

from moespac.speculate.sampling import draw


@dataclass(frozen=True)
class Verdict:
    """``tokens``: the accepted drafts, then exactly one of the target's own, a correction or the bonus."""

    accepted: int  # 0..K
    tokens: list[int]  # accepted + 1 of them


def verify_greedy(draft_tokens: list[int], target_logits: torch.Tensor) -> Verdict:
    """Keep the drafts that are the argmax of ``target_logits`` (K+1, V), up to the first that is not."""
    assert len(target_logits) == len(draft_tokens) + 1
    choices = target_logits.argmax(dim=-1).tolist()
    accepted = _leading(draft == choice for draft, choice in zip(draft_tokens, choices[:-1], strict=True))
    return Verdict(accepted, choices[: accepted + 1])


def verify_sampled(
    draft_tokens: list[int],
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    generator: torch.Generator,
) -> Verdict:
    """Keep draft x with probability min(1, p(x) / q(x)); after the first rejection draw from max(p - q, 0).

    ``target_probs`` (K+1, V) is p. ``draft_probs`` (K, V) is q, what each draft was drawn from; None for a
    drafter that does not draw: q is then 1 on the draft, and 0 elsewhere. K = 0 spends exactly one draw.
    """
    assert len(target_probs) == len(draft_tokens) + 1
    p = _chances(target_probs, draft_tokens)
    q = [1.0] * len(draft_tokens) if draft_probs is None else _chances(draft_probs, draft_tokens)
    u = torch.rand(len(draft_tokens), generator=generator, device=generator.device).tolist()  # in [0, 1)

    # u < p/q without the division. Strictly: a draft that the target excludes (p = 0) is never kept.
    accepted = _leading(u_j * q_j < p_j for u_j, p_j, q_j in zip(u, p, q, strict=True))
    own = target_probs[accepted]
    if accepted < len(draft_tokens):
        own = _residual(own, draft_tokens[accepted], None if draft_probs is None else draft_probs[accepted])
    return Verdict(accepted, [*draft_tokens[:accepted], draw(own, generator)])


def _residual(p: torch.Tensor, draft: int, q: torch.Tensor | None) -> torch.Tensor:
    """max(p - q, 0) normalised, (V,): what the target wanted and the draft had not already offered."""
    if q is None:
        rest = p.index_fill(0, torch.tensor([draft], device=p.device), 0.0)
    else:
        rest = (p - q.to(p.device)).clamp(min=0.0)
    total = rest.sum()
    # p = q up to rounding: a rejection then has probability ~0, and p itself is the limit of the residual.
    return rest / total if total > 0 else p


def _chances(probs: torch.Tensor, tokens: list[int]) -> list[float]:
    """What each row of ``probs`` (>= K, V) gave to its token."""
    return probs[range(len(tokens)), tokens].tolist()


def _leading(verdicts: Iterable[bool]) -> int:
    """How many are true before the first that is false."""
    return sum(takewhile(bool, verdicts))
