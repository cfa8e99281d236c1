"""The figures of a trace by hand, and against plain replays."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from moespac.config import AnalysisConfig
from moespac.trace.analysis import analyse
from moespac.trace.plots import draw_all
from tests.trace.small import decoded, recorded

TEXTS = [[[0, 1], [0, 2], [3, 1], [3, 0]], [[0, 1], [4, 5]]]


def test_reuse_by_hand() -> None:
    found = analyse(decoded(TEXTS))
    # uses: 0 at 0, 1, 3; 1 at 0, 2; 2 at 1; 3 at 2, 3 / and in the second text nothing twice
    np.testing.assert_array_equal(found.reuse, [8, 2, 2])
    assert found.median_reuse == 1
    assert found.repeated_within(1) == pytest.approx(2 / 12)
    assert found.repeated_within(8) == pytest.approx(4 / 12)


def test_skew_by_hand() -> None:
    found = analyse(decoded(TEXTS, layers=2))
    np.testing.assert_allclose(found.frequency, [np.array([4, 3, 2, 1, 1, 1, 0, 0]) / 12] * 2)
    assert analyse(decoded([[[0, 1], [2, 3]]], experts=4)).entropy == pytest.approx(1)
    assert analyse(decoded([[[0], [0]]], experts=4)).entropy == pytest.approx(0)


def test_windows_by_hand() -> None:
    found = analyse(decoded(TEXTS), AnalysisConfig(lengths=(1, 2, 3, 5)))
    np.testing.assert_allclose(found.unique[:, 0], [2, (3 + 3 + 4) / 3, 4, np.nan])
    # after the first window of each text: {0, 2}, {3, 1}, {3, 0}, {4, 5}; {3, 1, 0} after {0, 1, 2}
    np.testing.assert_allclose(found.overlap[:, 0], [2 / 8, 2 / 3, np.nan, np.nan])


def test_lru_hits_are_those_of_a_plain_replay() -> None:
    trace, _ = recorded()
    routing = np.concatenate([trace.decode_tokens(sequence).routing for sequence in range(trace.sequences)])
    hits = analyse(trace).lru_hits
    for layer in range(trace.shape.layers):
        uses = [expert for expert in routing[:, layer].ravel().tolist() if expert >= 0]
        for slots in range(1, trace.experts + 1):
            assert hits[layer, slots - 1] == pytest.approx(_replay(uses, slots) / len(uses))


def _replay(uses: list[int], slots: int) -> int:
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for expert in uses:
        hits += expert in held
        held[expert] = None
        held.move_to_end(expert)
        if len(held) > slots:
            held.popitem(last=False)
    return hits


def test_a_layer_that_does_not_route_a_token_uses_nothing() -> None:
    found = analyse(decoded([[[0, -1], [-1, -1], [0, 1]]]))
    np.testing.assert_array_equal(found.reuse, [2, 0, 1])
    np.testing.assert_allclose(found.frequency[0, :3], [2 / 3, 1 / 3, 0])


def test_a_trace_that_repeats_nothing_has_no_median() -> None:
    assert analyse(decoded([[[0], [1]]])).median_reuse is None


def test_every_plot_is_drawn(tmp_path: Path) -> None:
    files = draw_all(analyse(decoded(TEXTS)), tmp_path / "new" / "plots")
    assert [file.name for file in files] == ["reuse.png", "skew.png", "windows.png", "lru.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
