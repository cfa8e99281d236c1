"""The governor against every fixed K: what is made of the seconds, and that the command runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moespac.bench.governor import GOVERNED, Comparison
from moespac.cli import app


def test_ratios_by_hand() -> None:
    """K = 1 is best over all texts, though not of each; the governed engine takes a quarter longer."""
    texts = ({0: 2.0, 1: 3.0, GOVERNED: 4.0}, {0: 9.0, 1: 5.0, GOVERNED: 6.0})
    found = Comparison(10, texts)
    assert found.tokens_per_second(0) == pytest.approx(20 / 11)
    assert found.best == 1
    assert found.ratio == pytest.approx(8 / 10)
    low, high = found.interval()
    assert low == pytest.approx(3 / 4) and high == pytest.approx(5 / 6)  # texts drawn twice: one or the other


def test_texts_that_all_fare_alike_leave_no_doubt() -> None:
    found = Comparison(10, ({0: 2.0, GOVERNED: 2.5},) * 5)
    assert found.interval() == pytest.approx((0.8, 0.8))


def test_the_command_runs_in_small(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in ("The sea", "She", "sea " * 2500))
    )
    arguments = ["--work", str(tmp_path / "work"), "--factor", "1", "--windows", "0,2", "--tokens", "8"]
    arguments += ["--prompts", str(prompts), "--texts", "3", "--json", str(tmp_path / "found.json")]
    result = CliRunner().invoke(app, ["bench", "governor", *arguments, "--host-memory", "50%"])
    assert result.exit_code == 0, result.output
    assert "governed over the best fixed K" in result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["tokens_per_second"]) == {"0", "2", "auto"} and len(found["seconds"]) == 2
    assert found["left_out"] == 1 and "left out: 1" in result.output
    assert found["tokens"] == 7 and found["host_memory"] == "50%"


@pytest.mark.parametrize("windows", ["", "two", "0,99", "-1"])
def test_windows_that_cannot_be_are_one_line(windows: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["bench", "governor", "--work", str(tmp_path / "work"), f"--windows={windows}"]
    )
    assert result.exit_code == 2 and "--windows" in result.output and "Traceback" not in result.output
    assert not (tmp_path / "work").exists()
