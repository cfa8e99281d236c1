"""Reading safetensors headers: which tensor lies at which bytes. No tensor data is touched.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header
{name: {dtype, shape, data_offsets}}, then the data that the offsets count into.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import torch

from moespac.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

_MAX_HEADER = 100 << 20  # the format's own limit: a larger length means that this is no safetensors file


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file; ``offset`` counts from the start of the file."""

    key: str
    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, in shard order.

    Raises CheckpointError when there are none or when the shard index names one that is missing.
    """
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"{index}: the shard index cannot be read ({error}); download it again"
            ) from None
        files = [directory / name for name in names]
    else:
        files = sorted(directory.glob("*.safetensors"))
    for file in files:
        if not file.exists():
            raise CheckpointError(f"{file}: named by {index.name} but missing; download the checkpoint again")
    if not files:
        raise CheckpointError(
            f"{directory}: no .safetensors files; convert the checkpoint to safetensors first"
        )
    return files


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one file by key. Raises CheckpointError when the file is truncated or corrupt."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER + 1
        if length > min(_MAX_HEADER, size):
            raise CheckpointError(f"{file}: not a safetensors file, or truncated; download it again")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = {key: _entry(key, file, 8 + length, item) for key, item in header.items()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"{file}: corrupt safetensors header ({error}); download it again"
            ) from None
    end = max((entry.offset + entry.nbytes for entry in entries.values()), default=8 + length)
    if size < end:
        raise CheckpointError(f"{file}: truncated, {size} bytes where {end} are needed; download it again")
    return entries


def _entry(key: str, file: Path, data_start: int, item: dict) -> TensorEntry:
    begin, end = item["data_offsets"]
    dtype, shape = DTYPES[item["dtype"]], tuple(item["shape"])
    elements = 1
    for size in shape:
        elements *= size
    if end - begin != elements * dtype.itemsize or begin < 0:
        raise ValueError(f"{key}: offsets do not match its shape")
    return TensorEntry(key, file, data_start + begin, end - begin, dtype, shape)


def read_checkpoint_headers(directory: Path) -> dict[str, TensorEntry]:
    """All tensors of a model directory by key, over all shards."""
    entries: dict[str, TensorEntry] = {}
    for file in checkpoint_files(directory):
        entries.update(read_header(file))
    return entries
