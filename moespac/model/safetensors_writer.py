"""Writing safetensors files of any size in little memory: the header, then each tensor's bytes in turn."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moespac.atomic import write_all
from moespac.errors import CheckpointError
from moespac.model.safetensors import DTYPE_NAMES, TensorEntry


@dataclass(frozen=True)
class TensorStream:
    """A tensor to be written; ``chunks`` is called when its turn comes and yields its bytes in order."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes | memoryview]]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def copy_stream(entry: TensorEntry, chunk_bytes: int) -> TensorStream:
    """A tensor of another file, byte for byte."""
    return TensorStream(entry.key, entry.dtype, entry.shape, lambda: read_chunks(entry, chunk_bytes))


def write_safetensors(file: Path, tensors: Sequence[TensorStream], wrote: Callable[[int], None]) -> None:
    """Write ``file`` and sync it; ``wrote`` hears of every chunk's bytes. Raises OSError as it comes."""
    # Wide types first, as the safetensors library does it: then every tensor is aligned to its type.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_all(fd, _header(ordered))
        for tensor in ordered:
            left = tensor.nbytes
            for chunk in tensor.chunks():
                data = memoryview(chunk).cast("B")
                write_all(fd, data)
                wrote(data.nbytes)
                left -= data.nbytes
            assert left == 0, f"{tensor.key}: its bytes do not match its shape"
        os.fsync(fd)
    finally:
        os.close(fd)


def read_chunks(entry: TensorEntry, chunk_bytes: int) -> Iterator[bytes]:
    """The tensor's bytes, at most ``chunk_bytes`` at once. Raises CheckpointError when they end early."""
    with entry.file.open("rb", buffering=0) as stream:
        for start in range(0, entry.nbytes, chunk_bytes):
            size = min(chunk_bytes, entry.nbytes - start)
            chunk = os.pread(stream.fileno(), size, entry.offset + start)
            if len(chunk) != size:
                raise CheckpointError(
                    f"{entry.file}: truncated in {entry.key}; download the checkpoint again"
                )
            yield chunk


def _header(tensors: Sequence[TensorStream]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        header[tensor.key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
