"""Packing: exact, atomic, resumable, in little memory."""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file

from moespac.config import PackConfig
from moespac.errors import CheckpointError, ConfigError, PackError
from moespac.experts.journal import Journal
from moespac.experts.manifest import read_manifest
from moespac.experts.pack import pack, print_report
from moespac.experts.store import CheckpointStore, PackedStore
from moespac.model.index import build_index
from tests.experts.reference import expected_weights, read_weights
from tests.families import save_checkpoint

# Every record is a batch of its own, so that a kill can fall between any two.
SMALL_BATCHES = PackConfig(commit_bytes=1, copy_bytes=1000)
SMALL_MODEL = {"num_experts": 3, "num_hidden_layers": 2, "num_experts_per_tok": 2}
IO_CALLS = ("open", "write", "pwrite", "fdatasync", "fsync", "replace", "unlink")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("qwen3_moe", tmp_path_factory.mktemp("checkpoint"), **SMALL_MODEL)


def files_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def read_all(directory: Path) -> list[bytes]:
    """Every record of the pack, verified by its checksum."""
    store = PackedStore(directory)
    buffer = np.empty(store.layout.nbytes, dtype=np.uint8)
    records = []
    for flat_id in range(store.shape.total):
        store.read_into(flat_id, buffer)
        records.append(buffer.tobytes())
    store.close()
    return records


# ---- what is written ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "granitemoe", "deepseek_v3"])
def test_a_float_pack_holds_exactly_the_model(family: str, tmp_path: Path) -> None:
    source = save_checkpoint(family, tmp_path / "source", shard_bytes="40KB")
    report = pack(source, tmp_path / "pack", "f32", progress=False)
    store = PackedStore(tmp_path / "pack")
    assert report.errors == (0.0,) * store.shape.layers and store.shape == report.shape
    for flat_id in (0, store.shape.experts, store.shape.total - 1):
        weights = read_weights(store, flat_id)
        expected = expected_weights(family, *divmod(flat_id, store.shape.experts))
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)

    index = build_index(source)
    with safe_open(store.trunk, framework="pt") as trunk:
        assert set(trunk.keys()) == set(index.trunk_keys)
        for key in index.trunk_keys:
            with safe_open(index.entries[key].file, framework="pt") as original:
                assert torch.equal(trunk.get_tensor(key), original.get_tensor(key))
    assert (tmp_path / "pack" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert not list((tmp_path / "pack").glob("*.partial")) + list((tmp_path / "pack").glob("*.journal"))


@pytest.mark.parametrize(
    ("format", "bounds"), [("bf16", (1e-4, 3e-3)), ("int8", (1e-3, 1e-2)), ("int4", (0.05, 0.09))]
)
def test_the_reported_error_is_the_error(
    checkpoint: Path, tmp_path: Path, format: str, bounds: tuple[float, float]
) -> None:
    report = pack(checkpoint, tmp_path / "pack", format, progress=False)
    stored, packed = CheckpointStore(build_index(checkpoint)), PackedStore(tmp_path / "pack")
    experts = stored.shape.experts
    for layer, error in enumerate(report.errors):
        total, squared = 0.0, 0.0
        for flat_id in range(layer * experts, (layer + 1) * experts):
            before, after = read_weights(stored, flat_id), read_weights(packed, flat_id)
            for name in before:
                total += float(before[name].double().square().sum())
                squared += float((before[name].double() - after[name].double()).square().sum())
        assert error == pytest.approx((squared / total) ** 0.5, rel=1e-4)
        assert bounds[0] < error < bounds[1]
    assert read_manifest(tmp_path / "pack").errors == report.errors


def test_tokenizer_and_template_come_along_and_other_weights_do_not(checkpoint: Path, tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "pytorch_model.bin").write_bytes(b"x")
    pack(source, tmp_path / "pack", "f32", progress=False)
    names = {file.name for file in (tmp_path / "pack").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= names
    assert "pytorch_model.bin" not in names and "model.safetensors" not in names


def test_progress_tells_all_bytes(checkpoint: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    report = pack(
        checkpoint, tmp_path / "pack", "int8", progress=lambda done, total: told.append((done, total))
    )
    assert told[-1] == (report.packed_bytes, report.packed_bytes)
    assert (report.trunk_bytes, report.packed_bytes) != (0, 0)


def test_the_report_prints_every_layer(checkpoint: Path, tmp_path: Path) -> None:
    report = pack(checkpoint, tmp_path / "pack", "int4", progress=False)
    text = io.StringIO()
    print_report(report, Console(file=text))
    assert all(f"{error:.2e}" in text.getvalue() for error in report.errors)
    assert report.worst_error == max(report.errors)


# ---- refusals ----------------------------------------------------------------------------------------


def test_what_cannot_be_packed_is_refused_in_one_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(
        error: type[Exception], match: str, source: Path, destination: Path, format: str = "f32"
    ) -> None:
        with pytest.raises(error, match=match) as caught:
            pack(source, destination, format, progress=False)
        assert "\n" not in str(caught.value)

    refused(ConfigError, "int3.*f32, bf16, int8, int4", checkpoint, tmp_path / "a", "int3")
    refused(PackError, "the same", checkpoint, checkpoint / "." / ".." / checkpoint.name)
    refused(
        PackError,
        "another model's model.safetensors",
        checkpoint,
        shutil.copytree(checkpoint, tmp_path / "b"),
    )
    (tmp_path / "file").write_text("")
    refused(PackError, "File exists", checkpoint, tmp_path / "file")
    pack(checkpoint, tmp_path / "c", "f32", progress=False)
    refused(PackError, "is a pack already", tmp_path / "c", tmp_path / "d")
    (tmp_path / "c" / "config.json").write_text("{}")
    refused(PackError, "another config.json", checkpoint, tmp_path / "c")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    refused(PackError, r"\d+ bytes are needed and 1000 are free", checkpoint, tmp_path / "e")


def test_weights_that_are_not_numbers_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "source")
    with safe_open(source / "model.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="expert 2 of MoE layer 1 has NaN"):
        pack(source, tmp_path / "pack", "int8", progress=False)


def test_two_packs_into_one_directory_do_not_meet(checkpoint: Path, tmp_path: Path) -> None:
    def pack_again(done: int, total: int) -> None:
        with pytest.raises(PackError, match="another pack is writing"):
            pack(checkpoint, tmp_path / "pack", "f32", progress=False)

    pack(checkpoint, tmp_path / "pack", "f32", progress=pack_again)


# ---- old pack or new pack, whole ---------------------------------------------------------------------


def test_a_new_pack_replaces_the_old_one_and_its_files(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "pack"
    pack(checkpoint, target, "f32", progress=False)
    names = set(files_of(target))
    for format in ("int8", "int8"):  # the second time under the twin name
        pack(checkpoint, target, format, progress=False)
        read_all(target)
        assert len(set(files_of(target))) == len(names)
        assert not {name for name in names & set(files_of(target)) if name.startswith(("experts-", "trunk-"))}
        names = set(files_of(target))


def run_killed(work: Callable[[], object], after: int) -> bool:
    """Run ``work`` in a child process that is killed at its ``after``-th call to the system; True: it was."""
    child = os.fork()
    if child == 0:
        calls = 0

        def killing(call: Callable[..., object]) -> Callable[..., object]:
            def counted(*args: object, **kwargs: object) -> object:
                nonlocal calls
                calls += 1
                if calls == after:
                    if call is os_write:  # torn: half of a journal line, or of a header, is on disk
                        call(args[0], args[1][: len(args[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return counted

        os_write = os.write
        for name in IO_CALLS:
            setattr(os, name, killing(getattr(os, name)))
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_at_any_moment_it_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    torch.set_num_threads(1)  # a forked child cannot use its parent's worker threads
    smallest = {"num_experts": 3, "num_hidden_layers": 1}
    checkpoint = save_checkpoint("qwen3_moe", tmp_path / "source", **smallest)
    pack(checkpoint, tmp_path / "old", "bf16", progress=False)
    old_records = read_all(tmp_path / "old")
    target = shutil.copytree(tmp_path / "old", tmp_path / "pristine")
    pack(checkpoint, target, "int4", progress=False, config=SMALL_BATCHES)
    new_files, new_records = files_of(target), read_all(target)

    after, moments = 0, 0
    while True:
        after += 1
        target = shutil.copytree(tmp_path / "old", tmp_path / f"killed-{after}")
        work = lambda target=target: pack(checkpoint, target, "int4", progress=False, config=SMALL_BATCHES)  # noqa: E731
        if not run_killed(work, after):
            break
        moments += 1
        switched = read_manifest(target).format == "int4"
        assert read_all(target) == (new_records if switched else old_records)
        work()
        if not switched:  # otherwise it was done, and a second pack takes the twin names
            assert files_of(target) == new_files
        assert read_all(target) == new_records
        shutil.rmtree(target)
    assert moments > 40  # the loop has seen the whole pack


def fill_disk_after(records: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The disk is full once so many records are written; returns the offsets that are, as they are."""
    written: list[int] = []
    real = getattr(os.pwrite, "real", os.pwrite)

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if len(written) == records:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(offset)
        return real(fd, data, offset)

    pwrite.real = real  # type: ignore[attr-defined]
    monkeypatch.setattr(os, "pwrite", pwrite)
    return written


def test_resuming_does_only_what_is_missing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def packing() -> int:
        return pack(checkpoint, tmp_path / "pack", "int8", False, SMALL_BATCHES).shape.record_bytes

    fill_disk_after(4, monkeypatch)
    with pytest.raises(PackError):
        packing()
    with next((tmp_path / "pack").glob("experts-*.journal")).open("ab") as stream:
        stream.write(b"[4, 12")  # torn by a kill; the next line must not be glued to it
    second = fill_disk_after(1, monkeypatch)
    with pytest.raises(PackError):
        packing()
    with next((tmp_path / "pack").glob("experts-*.bin.partial")).open("r+b") as stream:
        stream.write(b"damage")  # to the first record, meanwhile
    third = fill_disk_after(100, monkeypatch)
    nbytes = packing()
    assert second == [4 * nbytes]
    assert third == [0, 5 * nbytes]
    read_all(tmp_path / "pack")


def test_the_journal_never_runs_ahead_of_the_data(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def recording(name: str, owner: object) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: calls.append(name) or real(*args))

    recording("pwrite", os)
    recording("fdatasync", os)
    recording("append", Journal)
    pack(checkpoint, tmp_path / "pack", "int8", progress=False, config=SMALL_BATCHES)
    assert calls == ["pwrite", "fdatasync", "append"] * 6


@pytest.mark.parametrize("call", ["write", "pwrite"])
def test_a_full_disk_leaves_the_old_pack_usable(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    target = tmp_path / "pack"
    pack(checkpoint, target, "bf16", progress=False)
    before = read_all(target)
    real, room = getattr(os, call), 3

    def until_full(*args: object) -> int:
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, until_full)
        with pytest.raises(PackError, match="the disk is full") as caught:
            pack(checkpoint, target, "int4", progress=False, config=SMALL_BATCHES)
    assert "\n" not in str(caught.value)
    assert read_manifest(target).format == "bf16" and read_all(target) == before
    assert list(target.glob("*.partial"))
    pack(checkpoint, target, "int4", progress=False)
    pack(checkpoint, tmp_path / "fresh", "int4", progress=False)
    assert files_of(target) == files_of(tmp_path / "fresh")


def test_an_unfinished_pack_in_another_format_makes_way(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(PackError):
            pack(checkpoint, tmp_path / "pack", "int4", progress=False)
    pack(checkpoint, tmp_path / "pack", "int8", progress=False)
    pack(checkpoint, tmp_path / "fresh", "int8", progress=False)
    assert files_of(tmp_path / "pack") == files_of(tmp_path / "fresh")


def peak_growth(work: Callable[[], object]) -> int:
    """Bytes by which the memory of a child process grows while it does ``work``."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        os.write(writer, str(grown).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    return int(os.read(reader, 100))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    few, many, peaks = 12, 60, []
    for experts in (few, many):
        size = {
            "num_experts": experts,
            "num_hidden_layers": 1,
            "hidden_size": 256,
            "moe_intermediate_size": 340,
        }
        source = save_checkpoint("qwen3_moe", tmp_path / f"source-{experts}", **size)
        target = tmp_path / f"pack-{experts}"
        config = PackConfig(commit_bytes=1 << 30)  # all in one batch: a batch is no buffer
        peaks.append(peak_growth(lambda s=source, t=target, c=config: pack(s, t, "f32", False, c)))
        expert_bytes = read_manifest(target).layout.nbytes
    assert peaks[1] - peaks[0] < (many - few) * expert_bytes / 4
