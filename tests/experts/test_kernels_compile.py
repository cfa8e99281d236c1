"""Compiling the native kernel: where it lands, and what happens without a compiler."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from moespac.experts.kernels import compile as compiling
from moespac.experts.kernels import library


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing compiled yet, and ``tmp_path`` to compile into."""
    monkeypatch.setattr(library, "_directories", lambda: [tmp_path])
    monkeypatch.setattr(compiling, "_FLAGS", [*compiling._FLAGS, "-O0"])  # in a second instead of many
    library.load_library.cache_clear()
    yield tmp_path
    library.load_library.cache_clear()


def test_compiles_on_first_use_and_finds_it_again(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / f"moespac_kernels-{compiling._machine()}-of-older-sources.so").touch()
    assert library.load_library() is not None
    assert [file.name for file in fresh.iterdir()] == [compiling.library_name()]
    monkeypatch.setattr(library, "compile_library", None)  # not needed a second time
    library.load_library.cache_clear()
    assert library.load_library() is not None


def test_without_a_compiler_torch_does_it_and_the_log_says_so_once(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert library.load_library() is None and library.load_library() is None
    assert caplog.text.count("no C compiler found") == 1
    assert list(fresh.iterdir()) == []


def test_a_compiler_that_refuses_leaves_nothing_behind(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "false")
    assert library.load_library() is None
    assert "false: exit code 1" in caplog.text and list(fresh.iterdir()) == []


def test_name_follows_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = compiling.library_name()
    shutil.copytree(compiling.SOURCES, tmp_path / "csrc")
    monkeypatch.setattr(compiling, "SOURCES", tmp_path / "csrc")
    assert compiling.library_name() == name
    with (tmp_path / "csrc" / "pool.c").open("a") as file:
        file.write("\n")
    assert compiling.library_name() != name


def test_log_level_of_the_reason_is_seen_by_default(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    records: list[logging.LogRecord] = []
    monkeypatch.setattr(library.log, "handle", records.append)
    library.load_library()
    assert [record.levelno for record in records] == [logging.WARNING]
