from __future__ import annotations

import numpy as np
import pytest

from moespac.bench.coverage import ESTIMATORS, RoutingTrace, bound, coverage
from moespac.bench.decisions import measure, table


def _trace(sequences: int = 6, length: int = 40) -> RoutingTrace:
    """Routing that follows the token: token t goes to experts t and t + 1 of 16, in both layers."""
    tokens = np.random.default_rng(2).integers(0, 15, sequences * length)
    pair = np.stack([tokens, tokens + 1], axis=-1)
    return RoutingTrace(tokens, np.repeat(pair[:, None], 2, axis=1), np.arange(sequences + 1) * length, 16)


def test_the_bound_by_hand() -> None:
    tokens = np.array([0, 0, 3])
    trace = RoutingTrace(tokens, np.stack([tokens, tokens + 1], -1)[:, None], np.array([0, 3]), experts=8)
    # counts 2 2 . 1 1 . . .: two slots hold 4 of 6 routings and 2 of 4 experts
    assert bound(trace, residency=0.25, window=3) == pytest.approx((4 / 6, 2 / 4))


def test_what_the_tokens_tell_is_worth_more_than_history() -> None:
    trace = _trace()
    covered = {
        name: coverage(trace, make, residency=0.3, folds=3).tokens for name, make in ESTIMATORS.items()
    }
    best = bound(trace, residency=0.3).tokens
    assert covered["fused"] > covered["moving-average"] + 0.2
    assert covered["utility"] > covered["moving-average"] + 0.2
    assert all(share <= best for share in covered.values())


def test_nothing_is_known_of_the_sequences_that_are_judged() -> None:
    """With all knowledge left out (one fold, one window), even the best estimator is a guess."""
    trace = _trace(sequences=1, length=5)
    assert coverage(trace, ESTIMATORS["fused"], 0.25, folds=1).tokens < bound(trace, 0.25).tokens


def test_decisions_are_measured_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    times = measure(layers=2, experts=8, top_k=2, passes=2)
    assert times["total"] == pytest.approx(
        sum(times[call] for call in ("plan", "place", "retention", "observe"))
    )
    table(layers=2, experts=8, top_k=2, passes=1)
    assert "place" in capsys.readouterr().out
