"""What is emitted must be the target's, whatever was drafted. Distributions are compared by chi-square with
fixed seeds, and the same comparison must convict two well-known wrong rules."""

import random
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare
from transformers.generation.utils import _speculative_sampling

from moespac.speculate import verify
from moespac.speculate.sampling import draw
from moespac.speculate.verify import Verdict, verify_greedy, verify_sampled

steady = settings(derandomize=True, deadline=None)
V = 3  # a vocabulary small enough to enumerate
LENGTH = 3  # tokens compared jointly: V ** LENGTH cells
DRAWS = 20_000


def generator(seed):
    return torch.Generator().manual_seed(seed)


# --- greedy


@steady
@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), min_size=7, max_size=7))
def test_greedy_emits_what_the_target_alone_would(drafts, choices):
    choices = choices[: len(drafts) + 1]
    verdict = verify_greedy(drafts, torch.eye(4)[choices])
    assert verdict.tokens == choices[: verdict.accepted + 1]
    assert drafts[: verdict.accepted] == choices[: verdict.accepted]
    assert verdict.accepted == len(drafts) or drafts[verdict.accepted] != choices[verdict.accepted]


def test_greedy_by_hand():
    target = torch.eye(5)[[1, 2, 3]]
    assert verify_greedy([1, 2], target) == Verdict(2, [1, 2, 3])
    assert verify_greedy([1, 4], target) == Verdict(1, [1, 2])
    assert verify_greedy([4, 2], target) == Verdict(0, [1])
    assert verify_greedy([], target[:1]) == Verdict(0, [1])


# --- sampled: the joint distribution of the first tokens


def random_table(seed):
    """A language model over V tokens: context (tuple) -> distribution (V,)."""
    rng = np.random.default_rng(seed)
    contexts = [context for n in range(LENGTH) for context in product(range(V), repeat=n)]
    return {context: torch.tensor(rng.dirichlet([1.5] * V), dtype=torch.float32) for context in contexts}


def sparse_table(seed):
    """The same with impossible tokens, as top-k leaves them."""
    table = random_table(seed)
    for i, (context, probs) in enumerate(table.items()):
        kept = probs.index_fill(0, torch.tensor([i % V]), 0.0)
        table[context] = kept / kept.sum()
    return table


def generate(target, draft, rng, torch_rng):
    """LENGTH tokens through windows of up to two drafts. ``draft`` None: a drafter that does not draw."""
    tokens = ()
    while len(tokens) < LENGTH:
        k = min(2, LENGTH - len(tokens) - 1)
        drafts = []
        for _ in range(k):
            q = torch.ones(V) if draft is None else draft[(*tokens, *drafts)]
            drafts.append(len(tokens) % V if draft is None else rng.choices(range(V), q.tolist())[0])
        contexts = [(*tokens, *drafts[:j]) for j in range(k + 1)]
        q = torch.stack([draft[context] for context in contexts[:-1]]) if draft is not None and k else None
        verdict = verify_sampled(drafts, q, torch.stack([target[context] for context in contexts]), torch_rng)
        assert verdict.tokens[: verdict.accepted] == drafts[: verdict.accepted]
        assert len(verdict.tokens) == verdict.accepted + 1
        tokens += tuple(verdict.tokens)
    return tokens


def p_value(target, draft, seed):
    """Of the hypothesis that speculation draws from the target's joint distribution."""
    rng, torch_rng = random.Random(seed), generator(seed)
    counts = Counter(generate(target, draft, rng, torch_rng) for _ in range(DRAWS))
    joint = {
        tokens: float(np.prod([float(target[tokens[:i]][tokens[i]]) for i in range(LENGTH)]))
        for tokens in product(range(V), repeat=LENGTH)
    }
    possible = [tokens for tokens, probability in joint.items() if probability > 0]
    if any(tokens not in possible for tokens in counts):
        return 0.0
    expected = np.array([joint[tokens] for tokens in possible])
    return chisquare([counts[tokens] for tokens in possible], DRAWS * expected / expected.sum()).pvalue


TARGET = random_table(1)
CASES = {
    "another model": (TARGET, random_table(2)),
    "the target itself": (TARGET, TARGET),
    "impossible tokens on both sides": (sparse_table(3), sparse_table(4)),
    "no draw": (TARGET, None),
    "no draw, impossible drafts": (sparse_table(5), None),
}


@pytest.mark.parametrize("case", CASES)
def test_speculation_draws_from_the_target(case):
    assert p_value(*CASES[case], seed=11) > 1e-3


@pytest.mark.parametrize("case", ["another model", "no draw"])
@pytest.mark.parametrize(
    ("part", "broken"),
    [
        ("_leading", lambda verdicts: len(list(verdicts))),  # every draft is accepted
        ("_residual", lambda p, draft, q: p),  # q is not subtracted
    ],
)
def test_the_comparison_convicts_wrong_rules(monkeypatch, case, part, broken):
    monkeypatch.setattr(verify, part, broken)
    assert p_value(*CASES[case], seed=11) < 1e-6


def test_same_distribution_as_transformers():
    draws, rng = 4_000, torch.Generator().manual_seed(0)
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]), torch.tensor([[0.2, 0.2, 0.6]])
    ours, theirs = Counter(), Counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for _ in range(draws):
            draft = draw(q[0], rng)
            ours[tuple(verify_sampled([draft], q, p, rng).tokens)] += 1
            tokens, _ = _speculative_sampling(torch.tensor([[draft]]), q.log()[None], 1, p.log()[None])
            theirs[tuple(tokens[0].tolist())] += 1
    outcomes = sorted(ours | theirs)
    table = [[counts[outcome] for outcome in outcomes] for counts in (ours, theirs)]
    assert chi2_contingency(table).pvalue > 1e-3


# --- sampled: the parts, exactly

WEIGHTS = st.lists(st.integers(0, 20), min_size=V, max_size=V).filter(any)


def normalised(weights):
    return torch.tensor(weights, dtype=torch.float64) / sum(weights)


@steady
@given(WEIGHTS, WEIGHTS)
def test_accepted_and_residual_mass_add_up_to_the_target(p, q):
    p, q = normalised(p), normalised(q)
    accepted = torch.minimum(p, q)  # q(x) min(1, p(x) / q(x))
    torch.testing.assert_close(accepted + (1 - accepted.sum()) * verify._residual(p, 0, q), p)


@steady
@given(WEIGHTS, st.integers(0, V - 1))
def test_the_same_for_a_drafter_that_does_not_draw(p, draft):
    p = normalised(p)
    accepted = torch.zeros_like(p)
    accepted[draft] = p[draft]
    torch.testing.assert_close(accepted + (1 - accepted.sum()) * verify._residual(p, draft, None), p)


def test_no_residual_left_by_rounding():
    p = torch.tensor([1 - 2**-24, 0.0, 0.0])
    for q in (None, torch.tensor([1.0, 0.0, 0.0])):
        assert verify._residual(p, 0, q).tolist() == p.tolist()


def test_an_excluded_draft_is_never_kept(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.zeros(*size))  # the luckiest draw
    p = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    for q in (None, torch.tensor([[1.0, 0.0, 0.0]])):
        assert verify_sampled([0], q, p, generator(0)) == Verdict(0, [1])


def test_a_certain_draft_is_always_kept(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, 1 - 2**-24))  # the unluckiest
    p = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    for q in (None, torch.tensor([[0.5, 0.5, 0.0]])):
        assert verify_sampled([1], q, p, generator(0)) == Verdict(1, [1, 2])


def test_without_drafts_it_is_plain_sampling():
    p = torch.tensor([[0.2, 0.3, 0.5]])
    plain, speculative = generator(5), generator(5)
    for _ in range(50):
        assert verify_sampled([], None, p, speculative) == Verdict(0, [draw(p[0], plain)])
