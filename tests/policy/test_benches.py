from __future__ import annotations

import pytest

from moespac.bench.decisions import measure, table


def test_decisions_are_measured_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    times = measure(layers=2, experts=8, top_k=2, passes=2)
    assert times["total"] == pytest.approx(
        sum(times[call] for call in ("plan", "place", "retention", "observe"))
    )
    table(layers=2, experts=8, top_k=2, passes=1)
    assert "place" in capsys.readouterr().out
