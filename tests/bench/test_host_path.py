"""The host's path as a command: parts, their sum and the aim; what cannot be measured is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from moespac.bench import host_path
from moespac.bench.host_path import HostTime
from moespac.cli import app
from moespac.config import HostPathConfig


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["bench", "host-path", *map(str, words)])


def test_parts_their_sum_and_the_aim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []

    def measured(windows: list[int]) -> list[HostTime]:
        asked.append(windows)
        return [HostTime(10.0, 41.0 * size, 30.5, (99.6 * size, 120.0)) for size in windows]

    monkeypatch.setattr(host_path, "measure", measured)
    file = tmp_path / "path.json"
    result = run("--windows", "1,4", "--json", file)
    assert result.exit_code == 0, result.output
    assert asked == [[1, 4]]
    cells = [line.replace("│", " ").replace("┃", " ").split() for line in result.output.splitlines()]
    assert ["us", "per", "layer", "1", "token", "4", "tokens"] in cells
    assert ["total", "82", "204"] in cells and ["aim", "150", "150"] in cells
    assert ["total", "with", "1", "copy", "100", "398"] in cells
    assert ["total", "with", "3", "copies", "120", "120"] in cells
    found = json.loads(file.read_text())
    assert found["aim"] == HostPathConfig().aim
    assert found["us_per_layer"][1] == {
        "tokens": 4, "trunk": 10.0, "decide": 164.0, "dispatch": 30.5, "total": 204.5,
        "copying": {"1": 398.4, "3": 120.0},
    }  # fmt: skip


def test_every_part_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_path, "LAYERS", 4)
    monkeypatch.setattr(host_path, "EXPERTS", 16)
    (time,) = host_path.measure([3], accelerator="25%", passes=2)
    assert time.trunk > 0 and time.decide > 0
    assert time.total == pytest.approx(time.trunk + time.decide + time.dispatch)
    assert all(spent > time.trunk for spent in time.copying) and len(time.copying) == len(host_path.COPIES)


@pytest.mark.parametrize("windows", ["", "0", "1,18", "one", "1,,2", "2.5"])
def test_windows_that_are_not_recorded_are_one_line(windows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_path, "measure", lambda windows: pytest.fail("nothing is measured"))
    result = run("--windows", windows)
    assert result.exit_code == 2 and len(result.output.strip().splitlines()) == 1
    assert "--windows" in result.output and "from 1 to 17" in result.output


def test_a_file_that_cannot_be_written_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_path, "measure", lambda windows: pytest.fail("nothing is measured"))
    result = run("--json", tmp_path / "nowhere" / "path.json")
    assert result.exit_code == 2 and "--json" in result.output
