"""The storage tier: what is read is what was stored, and damage is told, never computed with."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from moespac.errors import CheckpointError
from moespac.experts.manifest import MANIFEST, is_pack
from moespac.experts.pack import pack
from moespac.experts.store import CheckpointStore, PackedStore
from moespac.model.index import build_index
from tests.experts.reference import expected_weights, page_aligned, read_weights
from tests.families import save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("qwen3_moe", tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def packed(checkpoint: Path, tmp_path: Path) -> Path:
    pack(checkpoint, tmp_path / "pack", "f32", progress=False)
    return tmp_path / "pack"


def records_file(packed: Path) -> Path:
    return next(packed.glob("experts-*.bin"))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_checkpoint_store_reads_what_transformers_loads(family: str, tmp_path: Path) -> None:
    store = CheckpointStore(build_index(save_checkpoint(family, tmp_path, shard_bytes="30KB")))
    for flat_id in (0, store.shape.experts + 1, store.shape.total - 1):
        weights = read_weights(store, flat_id)
        expected = expected_weights(family, *divmod(flat_id, store.shape.experts))
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
    store.close()


def test_packed_store_reads_from_several_threads(packed: Path) -> None:
    store, data = PackedStore(packed), records_file(packed).read_bytes()
    nbytes = store.layout.nbytes
    wrong: list[int] = []

    def read_all(first: int) -> None:
        buffer = page_aligned(nbytes)
        for step in range(store.shape.total):
            flat_id = (first + step) % store.shape.total
            store.read_into(flat_id, buffer)
            if buffer.tobytes() != data[flat_id * nbytes : (flat_id + 1) * nbytes]:
                wrong.append(flat_id)

    threads = [threading.Thread(target=read_all, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    store.close()


def test_a_buffer_that_is_not_page_aligned_is_filled_all_the_same(packed: Path) -> None:
    store = PackedStore(packed)
    aligned, shifted = page_aligned(store.layout.nbytes), page_aligned(store.layout.nbytes + 4096)[64:]
    store.read_into(3, aligned)
    store.read_into(3, shifted[: store.layout.nbytes])
    assert np.array_equal(aligned, shifted[: store.layout.nbytes])


def test_without_direct_reads_the_page_cache_serves(
    packed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real_open = os.open

    def refuse_direct(path: str, flags: int, *args: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *args)

    monkeypatch.setattr(os, "open", refuse_direct)
    with caplog.at_level(logging.INFO, logger="moespac"):
        store = PackedStore(packed)
    assert not store.direct and "buffered" in store.describe()
    assert len([record for record in caplog.records if "page cache" in record.message]) == 1
    weights, expected = read_weights(store, 0), expected_weights("qwen3_moe", 0, 0)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("aligned", [True, False])
def test_a_flipped_bit_is_found_and_named(packed: Path, aligned: bool) -> None:
    probe = PackedStore(packed)
    victim = probe.shape.experts + 2
    with records_file(packed).open("r+b") as stream:
        stream.seek(victim * probe.layout.nbytes + 100)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))
    store = PackedStore(packed)
    buffer = page_aligned(store.layout.nbytes + 4096)[0 if aligned else 64 :][: store.layout.nbytes]
    store.read_into(victim - 1, buffer)
    for _ in range(2):  # a damaged record never counts as verified
        with pytest.raises(CheckpointError, match="expert 2 of MoE layer 1 is corrupt; pack again"):
            store.read_into(victim, buffer)


def test_a_file_that_shrinks_while_open_is_a_checkpoint_error(packed: Path) -> None:
    store = PackedStore(packed)
    os.truncate(records_file(packed), store.layout.nbytes // 2 // 4096 * 4096)
    with pytest.raises(CheckpointError, match="truncated in expert 0 of MoE layer 0"):
        store.read_into(0, page_aligned(store.layout.nbytes))


def test_a_failing_disk_is_an_os_error(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PackedStore(packed)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match="Input/output"):
        store.read_into(0, page_aligned(store.layout.nbytes))


def test_reads_after_close_fail(packed: Path, checkpoint: Path) -> None:
    for store in (PackedStore(packed), CheckpointStore(build_index(checkpoint))):
        store.close()
        store.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            store.read_into(0, page_aligned(store.layout.nbytes))


def test_is_pack(packed: Path, checkpoint: Path) -> None:
    assert is_pack(packed) and not is_pack(checkpoint) and not is_pack(packed / "nothing")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": 1}', '{"schema": 99}'])
def test_a_damaged_manifest_is_a_checkpoint_error(packed: Path, text: str) -> None:
    (packed / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match="pack again") as caught:
        PackedStore(packed)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_contradicts_itself_is_a_checkpoint_error(packed: Path) -> None:
    data = json.loads((packed / MANIFEST).read_text())
    data["checksums"].pop()
    (packed / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="pack again"):
        PackedStore(packed)


@pytest.mark.parametrize("pattern", ["experts-*.bin", "trunk-*.safetensors"])
def test_missing_and_truncated_data_files_are_checkpoint_errors(packed: Path, pattern: str) -> None:
    file = next(packed.glob(pattern))
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"bytes where \d+ belong"):
        PackedStore(packed)
    file.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        PackedStore(packed)
