"""What we write is what the safetensors library reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moespac.errors import CheckpointError
from moespac.model.safetensors import read_header
from moespac.model.safetensors_writer import copy_stream, write_safetensors


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = {
        "flags": torch.tensor([True, False, True]),
        "half": torch.arange(5).bfloat16(),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "wide": torch.arange(1000.0).view(10, 100),
        "empty": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "source.safetensors")
    return tmp_path / "source.safetensors"


def test_copies_are_equal_and_every_tensor_is_aligned_to_its_type(source: Path, tmp_path: Path) -> None:
    narrow_first = sorted(read_header(source).values(), key=lambda entry: entry.dtype.itemsize)
    told: list[int] = []
    target = tmp_path / "target.safetensors"
    write_safetensors(target, [copy_stream(entry, chunk_bytes=70) for entry in narrow_first], told.append)
    before, after = load_file(source), load_file(target)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(entry.offset % entry.dtype.itemsize == 0 for entry in read_header(target).values())
    assert sum(told) == sum(entry.nbytes for entry in narrow_first) and max(told) <= 70


def test_a_source_that_ends_early_is_told(source: Path, tmp_path: Path) -> None:
    streams = [copy_stream(entry, chunk_bytes=70) for entry in read_header(source).values()]
    with source.open("r+b") as stream:
        stream.truncate(source.stat().st_size - 100)
    with pytest.raises(CheckpointError, match="truncated in"):
        write_safetensors(tmp_path / "target.safetensors", streams, lambda _: None)
