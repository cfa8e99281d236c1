"""Runs side by side: read from what other commands wrote, drawn and tabulated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from moespac.cli import app
from moespac.report.runs import read_runs
from tests.test_cli import SUMMARY

SIMULATED = {
    "policy": "lru", "tokens": 20, "passes": 8, "tokens_per_second": 4.0, "seconds_per_token": 0.25, "drafted": 30,
    "accepted": 12, "mean_accepted": 2.5, "hit_rate": 0.5, "token_hit_rate": 0.6, "link_bytes": 700,
    "storage_bytes": 0, "seconds": {"trunk": 3.0, "accelerator_experts": 9.0, "total": 5.0, "draft": 2.0},
}  # fmt: skip


def report(*words: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, words)])


@pytest.fixture
def generated(tmp_path: Path) -> Path:
    file = tmp_path / "a|b.json"
    file.write_text(json.dumps(SUMMARY.to_dict()))
    return file


@pytest.fixture
def simulated(tmp_path: Path) -> Path:
    file = tmp_path / "sim.json"
    file.write_text(json.dumps([SIMULATED, SIMULATED | {"policy": "lfu", "drafted": 0}]))
    return file


def test_runs_of_both_commands(generated: Path, simulated: Path) -> None:
    run, lru, lfu = read_runs([generated, simulated])
    assert [run.name, lru.name, lfu.name] == ["a|b", "sim lru", "sim lfu"]
    assert run.tokens == 3 and run.tokens_per_second == 12.34 and run.acceptance == 0.8125
    assert lru.acceptance == 0.4 and lfu.acceptance is None and lru.bytes_read == {"storage": 0, "link": 700}
    assert lru.causes == {"trunk": 3.0, "draft": 2.0}  # the accelerator overlaps with them
    assert [each.name for each in read_runs([generated, generated])] == ["a|b", "a|b (2)"]


def test_the_command_draws_and_tabulates(generated: Path, simulated: Path, tmp_path: Path) -> None:
    place = tmp_path / "out"
    result = report(generated, simulated, "-o", place)
    assert result.exit_code == 0, result.output
    text = (place / "report.md").read_text()
    assert "| a\\|b | 3 | 12.3 | 75.0% | 81.2% | 2.50 | 1.5 MB | 0 B | 4.00 |" in text
    assert text.count("\n| ") == 4 + 1
    for name in ("speed", "rates", "time", "bytes"):
        assert (place / f"{name}.png").read_bytes().startswith(b"\x89PNG") and f"({name}.png)" in text


@pytest.mark.parametrize("content", ["{", "[]", "[1]", "{}", '{"token_ids": 3}', '{"link_bytes": 1}', None])
def test_what_is_no_run_is_one_line(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    if content is not None:
        file.write_text(content)
    result = report(file, "-o", tmp_path / "out")
    assert result.exit_code == 2 and result.output.startswith("error: ")
    assert len(result.output.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_is_one_line(generated: Path) -> None:
    result = report(generated, "-o", generated / "inside")
    assert result.exit_code == 2 and result.output.startswith("error: --output")
