"""Synthetic routing behaves as Qwen3-30B-A3B was seen to behave, and is the same each time."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from moespac.config import SyntheticConfig
from moespac.errors import ConfigError
from moespac.sim.shapes import named_model
from moespac.sim.synthetic import SyntheticRouting, synthetic_routing
from moespac.types import ModelShape

SMALL = ModelShape(layers=3, experts=16, top_k=4, record_bytes=1)
WARM = 100  # tokens before caches are full and every expert in use was seen


@pytest.fixture(scope="module")
def active() -> NDArray[np.bool_]:
    """(tokens, layers, experts) of Qwen3-30B-A3B's shape: who is routed to."""
    shape = named_model("qwen3-30b-a3b-f16").to_model_shape()
    return _active(synthetic_routing(shape, [1000], seed=5), shape)


def test_reuse_distances(active: NDArray[np.bool_]) -> None:
    """Published: median 2 tokens, 45% at the next token, 80% within 8."""
    distances = np.concatenate([at - last[active[at]] for at, last in _last_use(active)])
    assert np.median(distances) == 2
    assert (distances == 1).mean() == pytest.approx(0.45, abs=0.02)
    assert (distances <= 8).mean() == pytest.approx(0.80, abs=0.02)


def test_hit_rate_of_a_large_lru(active: NDArray[np.bool_]) -> None:
    """Published: 90 to 95% at 40% residency."""
    hits = demand = 0
    for at, last in _last_use(active):
        held = np.zeros_like(active[at])
        recent = np.argsort(-last, axis=1, kind="stable")[:, : round(0.4 * last.shape[1])]
        np.put_along_axis(held, recent, True, axis=1)
        hits += np.count_nonzero(held & active[at])
        demand += np.count_nonzero(active[at])
    assert 0.90 <= hits / demand <= 0.95


def test_overlap_of_windows(active: NDArray[np.bool_]) -> None:
    """Published: windows of 24 tokens overlap by 74 to 80%."""
    windows = [active[at : at + 24].any(axis=0) for at in range(WARM, len(active) - 23, 24)]
    overlap = np.mean([(a & b).sum() / b.sum() for a, b in pairwise(windows)])
    assert 0.73 <= overlap <= 0.80


def test_windows_touch_as_many_experts_as_the_reuse_distances_allow(active: NDArray[np.bool_]) -> None:
    """Published: 51 to 65% in 24 tokens. With the published distances at most 48% can be: see docs/hardware.md."""
    touched = np.mean([active[at : at + 24].any(axis=0).mean() for at in range(WARM, len(active) - 23)])
    further = [
        np.concatenate([at - last[active[at]] for at, last in _last_use(active)]) > j for j in range(24)
    ]
    k, experts = 8, active.shape[2]
    assert touched == pytest.approx(k * np.sum([share.mean() for share in further]) / experts, rel=0.02)
    assert touched == pytest.approx(0.34, abs=0.03)


def test_layout_is_that_of_traces() -> None:
    routing = synthetic_routing(SMALL, [5, 9])
    assert routing.experts.shape == routing.probs.shape == (14, 3, 4)
    assert (routing.experts.dtype, routing.probs.dtype) == (np.uint8, np.float16)
    assert (routing.tokens.dtype, routing.offsets.dtype) == (np.int32, np.int64)
    assert routing.offsets.tolist() == [0, 5, 14] and routing.tokens.shape == (14,)
    assert routing.experts.max() < 16
    assert (np.diff(np.sort(routing.experts.astype(int), axis=2), axis=2) > 0).all()  # distinct
    assert (np.diff(routing.probs.astype(float), axis=2) <= 0).all()  # the likeliest first
    assert routing.probs.astype(float).sum(axis=2) == pytest.approx(1, abs=2e-3)


def test_wide_layers_need_wider_numbers() -> None:
    assert synthetic_routing(ModelShape(1, 512, 10, 1), [2]).experts.dtype == np.uint16


def test_seeds() -> None:
    one = synthetic_routing(SMALL, [40], seed=1)
    assert _equal(one, synthetic_routing(SMALL, [40], seed=1))
    assert not _equal(one, synthetic_routing(SMALL, [40], seed=2))
    assert not _equal(one, synthetic_routing(SMALL, [40], seed=1, model_seed=1))


def test_experts_keep_their_liking_for_a_token_in_other_texts() -> None:
    """By tokens alone, a token goes to the same experts whatever the text; not so in another model."""
    only_tokens = SyntheticConfig(popularity=0, topic=0, phrase=0, vocabulary=20)
    seen: dict[int, list[int]] = {}
    for seed in (0, 1):
        routing = synthetic_routing(SMALL, [50], seed, config=only_tokens)
        for token, experts in zip(routing.tokens.tolist(), routing.experts.tolist(), strict=True):
            assert seen.setdefault(token, experts) == experts
    other = synthetic_routing(SMALL, [50], 0, model_seed=1, config=only_tokens)
    assert any(seen[t] != e for t, e in zip(other.tokens.tolist(), other.experts.tolist(), strict=True))


def test_sequences_do_not_know_of_each_other() -> None:
    """A topic ends with its sequence: what repeats across the border repeats by popularity only."""
    topics = SyntheticConfig(popularity=0, token=0, phrase=0, topic_tokens=1e9)
    experts = synthetic_routing(SMALL, [3, 3], config=topics).experts
    assert (experts[0] == experts[2]).all() and (experts[3] == experts[5]).all()
    assert (experts[2] != experts[3]).any()


def test_text_follows_zipf_and_repeats_itself() -> None:
    shape, length = ModelShape(1, 2, 1, 1), 6_000
    tokens = synthetic_routing(shape, [length]).tokens
    counts = np.bincount(tokens)
    assert 6 < counts[0] / counts[9] < 14  # the tenth token comes a tenth as often
    own = SyntheticConfig(vocabulary=10**6, zipf=0.0)  # no token comes twice but by repeating
    distinct = len(np.unique(synthetic_routing(shape, [length], config=own).tokens))
    assert 1 - distinct / length == pytest.approx(own.repeat, abs=0.02)


@pytest.mark.parametrize("shape", [ModelShape(1, 4, 5, 1), ModelShape(1, 4, 0, 1)])
def test_top_k_must_be_possible(shape: ModelShape) -> None:
    with pytest.raises(ConfigError, match="cannot be routed"):
        synthetic_routing(shape, [1])


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_sequences_must_have_tokens(lengths: list[int]) -> None:
    with pytest.raises(ConfigError, match="1 token or more"):
        synthetic_routing(SMALL, lengths)


def _active(routing: SyntheticRouting, shape: ModelShape) -> NDArray[np.bool_]:
    active = np.zeros((len(routing.tokens), shape.layers, shape.experts), np.bool_)
    np.put_along_axis(active, routing.experts.astype(np.int64), True, axis=2)
    return active


def _last_use(active: NDArray[np.bool_]):  # type: ignore[no-untyped-def]
    """Yields each token after the warm-up, and (layers, experts) when each expert was used last before it."""
    last = np.full(active.shape[1:], -(10**6))
    for at, now in enumerate(active):
        if at >= WARM:
            yield at, last
        last[now] = at


def _equal(one: SyntheticRouting, other: SyntheticRouting) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
