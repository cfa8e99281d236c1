"""``moespac bench validate`` on a model too small to take time: that it compares, not how near it comes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moespac.bench import validate
from moespac.bench.validate import Agreement, Case, median_error
from moespac.cli import app
from moespac.config import MeasureConfig

TINY = MeasureConfig(
    memory_bytes=1 << 20,
    storage_bytes=1 << 20,
    storage_seconds=0.01,
    depths=(1, 2),
    expert_tokens=(1, 4),
    records_bytes=1 << 18,
    repeats=2,
    decode_tokens=3,
)


def test_the_error_is_relative_to_what_was_measured() -> None:
    case = Case("lru", "50%", "none", 0)
    found = [Agreement(case, 10.0, simulated, 0.5, 0.5) for simulated in (8.0, 10.0, 15.0)]
    assert [each.error for each in found] == pytest.approx([-0.2, 0.0, 0.5])
    assert median_error(found) == pytest.approx(0.2)


def test_at_least_six_settings_are_compared() -> None:
    for field in ("policy", "host_memory", "draft", "window"):
        assert len({getattr(case, field) for case in validate.CASES}) >= 3
    assert len(set(validate.CASES)) == len(validate.CASES) >= 6


def test_both_worlds_run_the_same_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MeasureConfig, "quick", lambda: TINY)
    cases = (Case("lru", "50%", "none", 0), Case("moe-spac", "25%", "auto", 2))
    monkeypatch.setattr(validate, "CASES", cases)
    file, disk = tmp_path / "validate.json", tmp_path / "disk"
    disk.mkdir()
    flags = ["--quick", "--factor", "1", "--tokens", "6", "--rounds", "2", "--directory", str(disk)]
    result = CliRunner().invoke(
        app, ["bench", "validate", *flags, "--json", str(file)], env={"COLUMNS": "120"}
    )
    assert result.exit_code == 0, result.output
    records = json.loads(file.read_text())
    assert [(record["policy"], record["window"]) for record in records] == [("lru", 0), ("moe-spac", 2)]
    for record in records:
        assert record["measured_tokens_per_second"] > 0 and record["simulated_tokens_per_second"] > 0
        assert f"{record['error']:+.1%}" in result.stdout
    # LRU decides by the order of use alone, so its hits do not depend on time.
    assert records[0]["simulated_hit_rate"] == pytest.approx(records[0]["measured_hit_rate"])
    assert "median error" in result.stdout
    assert not list(disk.iterdir())


def test_a_bad_place_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "validate", "--directory", str(tmp_path / "no")])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "--directory" in result.stderr
