"""This machine is measured once, and again when something is no longer what it was measured with."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import psutil
import pytest
import torch

from moespac import host_memory
from moespac.plan import kept, machine
from moespac.plan.machine import this_machine
from moespac.sim.hardware import HardwareProfile, find_profile


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Directories that the machine was measured in; nothing is measured really."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 3.0)
    places: list[Path] = []

    def measure(directory: Path, progress: object) -> HardwareProfile:
        places.append(directory)
        return find_profile("laptop-cpu-nvme")

    monkeypatch.setattr(machine, "_measure", measure)
    return places


def found(anew: bool = False) -> machine.Machine:
    return this_machine(Path(), anew, lambda done, total: None)


def test_it_is_measured_once(measured: list[Path]) -> None:
    first, second = found(), found()
    assert len(measured) == 1 and first.hardware == second.hardware
    assert first.measured == "" and second.measured == f"{date.today():%Y-%m-%d}"
    assert found(anew=True).measured == "" and len(measured) == 2


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (kept, "describe_processor", lambda: ["another"]),
        (kept, "chosen_isa", lambda library: None),
        (kept, "library_name", lambda: "of other sources"),
        (torch, "get_num_threads", lambda: 99),
        (host_memory, "total_bytes", lambda: 1 << 50),
        (torch, "__version__", "0.0"),
    ],
)
def test_what_it_depends_on_has_changed(
    owner: object, name: str, value: object, measured: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found()
    monkeypatch.setattr(owner, name, value)
    found()
    assert len(measured) == 2
    found()
    assert len(measured) == 2


def test_what_a_busy_machine_measures_is_not_kept(
    measured: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 65.0)
    found()
    assert "other programs took 65% of the processor" in caplog.text
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 3.0)
    found()
    found()
    assert len(measured) == 2


@pytest.mark.parametrize("damage", ["", "[1]", '{"key": 1}', '{"name": "an older layout"}'])
def test_a_file_that_cannot_be_used_is_measured_again(
    damage: str, measured: list[Path], tmp_path: Path
) -> None:
    found()
    (tmp_path / "moespac" / "hardware.json").write_text(damage)
    assert found().measured == "" and len(measured) == 2


def test_a_tenth_is_left_to_others(measured: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "total_bytes", lambda: 10 << 30)
    monkeypatch.setattr(host_memory, "free_bytes", lambda: 8 << 30)
    assert found().host_bytes == 7 << 30 and "less 10%" in found().host_source
