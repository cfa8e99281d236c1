"""The doctor: what it finds, and that no machine is odd enough to end it with a traceback."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from typer.testing import CliRunner

from moespac import host_memory
from moespac.bench import compute_probe, storage_probe
from moespac.bench.storage_probe import StorageSpeed
from moespac.cli import app
from moespac.doctor import accelerator, memory, processor, software, storage
from moespac.doctor.examine import CHECKS, examine
from moespac.doctor.finding import Finding, Place, ok
from moespac.experts.cuda import page_lock
from tests.experts.fake_cuda import FakeRegistrar

HERE = Place(Path())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes have their own tests."""
    monkeypatch.setattr(compute_probe, "memory_bandwidth", lambda threads, config: 2e10)
    monkeypatch.setattr(
        storage_probe, "measure_storage", lambda *_: StorageSpeed({(1 << 20, 4): 2e9}, direct=True)
    )


def one(found: Iterator[Finding], topic: str) -> Finding:
    (finding,) = [each for each in found if each.topic == topic]
    return finding


def test_the_command_lists_everything(tmp_path: Path) -> None:
    file = tmp_path / "doctor.json"
    result = CliRunner().invoke(app, ["doctor", "--directory", str(tmp_path), "--json", str(file)])
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    topics = {finding["topic"] for finding in found}
    assert topics >= {
        "software", "extras", "processor", "threads", "kernel", "memory speed", "memory", "page lock",
        "accelerator", "storage", "direct reads", "cache",
    }  # fmt: skip
    for finding in found:
        assert finding["what"] and "\n" not in finding["what"] + finding["remedy"]
        assert bool(finding["remedy"]) == (finding["status"] != "ok")
        assert finding["topic"] in result.output


def test_an_examination_that_fails_is_a_finding_and_the_others_go_on() -> None:
    def check_teapot(place: Place) -> Iterator[Finding]:
        yield ok("teapot", "short")
        raise RuntimeError("and\nstout")

    told = []
    found = examine(HERE, lambda done, total: told.append((done, total)), [check_teapot, storage.check_cache])
    assert [finding.topic for finding in found] == ["teapot", "teapot", "cache"]
    assert told == [(1, 2), (2, 2)]
    assert any("could not be examined (RuntimeError: and stout)" in finding.what for finding in found)


def test_a_machine_that_says_nothing_gets_lines_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No psutil, no /proc, no metadata, no /dev to list, a directory that is none."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    for module, name in (
        (psutil, "virtual_memory"), (psutil, "swap_memory"), (Path, "read_text"), (Path, "glob"),
        (os, "sched_getaffinity"), (resource, "getrlimit"), (software.metadata, "requires"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, refuse)
    found = examine(Place(tmp_path / "nothing"), lambda done, total: None)
    assert {finding.status for finding in found} <= {"ok", "warn", "bad"} and len(found) >= len(CHECKS) - 2
    assert all("\n" not in finding.what for finding in found)


def test_slow_things_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compute_probe, "memory_bandwidth", lambda threads, config: 1e9)
    assert one(processor.check_bandwidth(HERE), "memory speed").status == "warn"
    monkeypatch.setattr(
        storage_probe, "measure_storage", lambda *_: StorageSpeed({(1 << 20, 4): 1e8}, direct=False)
    )
    assert one(storage.check_storage(Place(tmp_path)), "storage").status == "warn"
    assert one(storage.check_storage(Place(tmp_path)), "direct reads").status == "warn"
    assert one(storage.check_storage(Place(tmp_path / "no")), "storage").status == "bad"
    monkeypatch.setattr(host_memory, "container_limit", lambda: (1000, 990))
    assert one(memory.check_memory(HERE), "memory").status == "warn"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 999)
    assert one(processor.check_threads(HERE), "threads").status == "warn"


def test_a_gpu_without_a_cuda_build_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([self / "nvidia0"]))
    assert one(accelerator.check_accelerator(HERE), "accelerator").status == "bad"
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([]))
    assert one(accelerator.check_accelerator(HERE), "accelerator").status == "ok"


def test_a_page_lock_limit_matters_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (8 << 20, 8 << 20))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for limit, status in ((8 << 20, "warn"), (1 << 40, "ok")):
        monkeypatch.setattr(page_lock, "CudaRegistrar", partial(FakeRegistrar, limit))
        finding = one(memory.check_page_lock(HERE), "page lock")
        assert finding.status == status and "that were tried" in finding.what
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert one(memory.check_page_lock(HERE), "page lock").status == "ok"


def test_a_version_out_of_range_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software.metadata, "requires", lambda name: ["transformers>=99", "no-such-package"])
    found = [finding for finding in software.check_versions(HERE) if finding.status == "bad"]
    assert [finding.remedy for finding in found] == [
        "pip install 'transformers>=99'",
        "pip install 'no-such-package'",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("200000 100000\n", 2.0), ("max 100000\n", None), ("", None), (None, None)],
)
def test_a_containers_share_of_the_processor(text: str | None, expected: object, tmp_path: Path) -> None:
    file = tmp_path / "cpu.max"
    if text is not None:
        file.write_text(text)
    assert processor._quota(file) == expected
