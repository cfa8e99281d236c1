from __future__ import annotations

import numpy as np
import pytest

from moespac.bench.coverage import ESTIMATORS, bound, compare, coverage, warm
from moespac.trace import Trace
from tests.trace.small import decoded


def _trace(sequences: int, seed: int, length: int = 40) -> Trace:
    """Routing that follows the token: token t goes to experts t and t + 1 of 16, in both layers."""
    tokens = np.random.default_rng(seed).integers(0, 15, (sequences, length))
    return decoded(np.stack([tokens, tokens + 1], axis=-1).tolist(), experts=16, layers=2)


def _all(trace: Trace) -> list[tuple[Trace, int]]:
    return [(trace, sequence) for sequence in range(trace.sequences)]


def test_the_bound_by_hand() -> None:
    trace = decoded([[[0, 1], [0, 1], [3, 4]]])
    # counts 2 2 . 1 1 . . .: two slots hold 4 of 6 routings and 2 of 4 experts
    assert bound(_all(trace), residency=0.25, window=3) == pytest.approx((4 / 6, 2 / 4))


def test_an_incomplete_window_is_not_judged() -> None:
    trace = decoded([[[0, 1], [0, 1], [3, 4], [6, 7]], [[5, 6]]])
    assert bound(_all(trace), residency=0.25, window=3) == pytest.approx((4 / 6, 2 / 4))


def test_what_the_tokens_tell_is_worth_more_than_history() -> None:
    found = {record["estimator"]: record for record in compare(_trace(4, 1), 0.3, 5, [_trace(8, 2)])}
    assert list(found) == ["moe-spac", "reference", "moving-average", "known-next-window"]
    covered = {name: float(record["coverage_tokens"]) for name, record in found.items()}
    assert covered["moe-spac"] > covered["moving-average"] + 0.2
    assert max(covered.values()) == covered["known-next-window"]


def test_warming_teaches_what_the_tokens_mean() -> None:
    judged, known = _trace(1, 1, length=10), _trace(8, 2)
    cold, warmed = (ESTIMATORS["moe-spac"](judged.shape, 0.3) for _ in range(2))
    warm(warmed, _all(known))
    assert coverage(warmed, _all(judged), 0.3).tokens > coverage(cold, _all(judged), 0.3).tokens + 0.2


def test_progress_counts_every_replay() -> None:
    told: list[tuple[int, int]] = []
    compare(_trace(2, 1), 0.3, 5, [_trace(3, 2)], lambda done, total: told.append((done, total)))
    assert told == [(done, 17) for done in range(1, 18)]  # 3 estimators x 5 sequences, and the bound's 2
