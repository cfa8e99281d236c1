"""The STORAGE tier: experts as files. One ``read_into`` brings one expert's record to host memory."""

from __future__ import annotations

import logging
import mmap
import os
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from moespac.errors import CheckpointError
from moespac.experts.format import RECORD_ALIGNMENT, RecordLayout, stored_layout
from moespac.experts.manifest import read_manifest
from moespac.model.index import ExpertIndex
from moespac.types import ModelShape

log = logging.getLogger(__name__)

Buffer = NDArray[np.uint8]


class ExpertStore(Protocol):
    """Where the experts come from."""

    layout: RecordLayout
    shape: ModelShape
    direct: bool  # reads bypass the page cache
    error: float  # relative error of the records against the original weights, in the worst layer

    def read_into(self, flat_id: int, buffer: Buffer) -> None:
        """Fill ``buffer`` (layout.nbytes,) with an expert's record; called from several threads at once.

        Raises CheckpointError when the record is truncated or corrupt, OSError when reading failed (a retry
        may help). The bytes between blocks are unspecified.
        """
        ...

    def close(self) -> None: ...

    def describe(self) -> str: ...


class PackedStore:
    """The records of a directory that ``pack`` wrote: one contiguous read each, past the page cache.

    Each record's checksum is verified the first time it is read. Raises CheckpointError when the pack is
    damaged.
    """

    def __init__(self, path: Path) -> None:
        self.manifest = read_manifest(path)
        self.layout = self.manifest.layout
        self.shape = self.manifest.shape
        self.error = max(self.manifest.errors)
        self.trunk = path / self.manifest.trunk  # a safetensors file with everything but the experts
        self._file = path / self.manifest.records
        self._fd = os.open(self._file, os.O_RDONLY)
        self._direct_fd = _open_direct(self._file)
        self.direct = self._direct_fd is not None
        # (layers * experts,) whose checksum was seen to be right; a race only verifies a record twice.
        self.verified = np.zeros(self.shape.total, dtype=bool)
        if not self.direct:
            log.info("%s: the file system has no direct reads; reading through the page cache", path)

    def read_into(self, flat_id: int, buffer: Buffer) -> None:
        view = buffer.data
        assert view.nbytes == self.layout.nbytes and 0 <= flat_id < self.shape.total
        fd = self._fd
        if self._direct_fd is not None and buffer.ctypes.data % RECORD_ALIGNMENT == 0:
            fd = self._direct_fd
        if _read(fd, view, int(flat_id) * self.layout.nbytes) < view.nbytes:
            raise CheckpointError(f"{self._file}: truncated in {_name(flat_id, self.shape)}; pack again")
        if not self.verified[flat_id]:
            self.verify(flat_id, buffer)

    def close(self) -> None:
        descriptors = [fd for fd in (self._fd, self._direct_fd) if fd is not None and fd >= 0]
        self._fd, self._direct_fd = -1, None  # a late read fails instead of meeting a reused descriptor
        for fd in descriptors:
            os.close(fd)

    def describe(self) -> str:
        how = "direct" if self.direct else "buffered"
        return f"{self.shape.total} packed {self.manifest.format} records of {_mib(self.layout)}, {how} reads"

    @property
    def descriptor(self) -> int:
        """Of the file of records, one after the other by flat id; reads into memory that is aligned to pages."""
        return self._fd if self._direct_fd is None else self._direct_fd

    def verify(self, flat_id: int, record: Buffer) -> None:
        """Look at a record that was read for the first time. Raises CheckpointError when it is corrupt."""
        if xxhash.xxh3_64_intdigest(record.data) != self.manifest.checksums[flat_id]:
            raise CheckpointError(f"{self._file}: {_name(flat_id, self.shape)} is corrupt; pack again")
        self.verified[flat_id] = True


class CheckpointStore:
    """Experts straight from an unpacked checkpoint, each gathered from the places where its tensors lie."""

    direct = False  # safetensors data starts at any byte
    error = 0.0

    def __init__(self, index: ExpertIndex) -> None:
        self.layout = stored_layout(index.tensors)
        self.shape = ModelShape(index.layers, index.experts, index.top_k, self.layout.nbytes)
        self._index = index
        files = {index.entries[key].file for key in index.roles}
        self._fds = {file: os.open(file, os.O_RDONLY) for file in sorted(files)}

    def read_into(self, flat_id: int, buffer: Buffer) -> None:
        view = buffer.data
        assert view.nbytes == self.layout.nbytes and 0 <= flat_id < self.shape.total
        places = self._index.parts(*divmod(int(flat_id), self.shape.experts))
        for tensor, parts in zip(self.layout.tensors, places, strict=True):
            start = tensor.blocks[0].offset
            for part in parts:
                fd = self._fds.get(part.file, -1)
                if _read(fd, view[start : start + part.nbytes], part.offset) < part.nbytes:
                    raise CheckpointError(f"{part.file}: truncated; download the checkpoint again")
                start += part.nbytes

    def close(self) -> None:
        descriptors, self._fds = self._fds, {}
        for fd in descriptors.values():
            os.close(fd)

    def describe(self) -> str:
        formats = "/".join(sorted({tensor.format for tensor in self.layout.tensors}))
        return f"{self.shape.total} unpacked {formats} experts of {_mib(self.layout)}, buffered reads"


def _read(fd: int, view: memoryview, offset: int) -> int:
    """Fill ``view`` from ``offset``; returns how many bytes there were before the file's end."""
    done = 0
    while done < view.nbytes:
        count = os.preadv(fd, [view[done:]], offset + done)  # releases the GIL
        if count == 0:
            break
        done += count
    return done


def _open_direct(file: Path) -> int | None:
    """A descriptor that reads past the page cache, or None where the system or its file system has none."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    try:
        with mmap.mmap(-1, RECORD_ALIGNMENT) as page:  # some file systems refuse at the first read only
            os.preadv(fd, [page], 0)
    except OSError:
        os.close(fd)
        return None
    return fd


def _name(flat_id: int, shape: ModelShape) -> str:
    layer, expert = divmod(int(flat_id), shape.experts)
    return f"expert {expert} of MoE layer {layer}"


def _mib(layout: RecordLayout) -> str:
    return f"{layout.nbytes / 2**20:.2f} MiB"
