"""Where a pack is written: the names of its files, and what must hold before a byte is written there."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moespac.errors import CheckpointError, PackError
from moespac.experts.format import RecordLayout
from moespac.experts.manifest import SCHEMA, Manifest, is_pack, read_manifest
from moespac.model.index import ExpertIndex
from moespac.model.side_files import side_files


@dataclass(frozen=True)
class PackFiles:
    """The data files of one pack, under one id."""

    directory: Path
    id: str

    @property
    def trunk(self) -> Path:
        return self.directory / f"trunk-{self.id}.safetensors"

    @property
    def records(self) -> Path:
        return self.directory / f"experts-{self.id}.bin"

    @property
    def journal(self) -> Path:
        return self.directory / f"experts-{self.id}.journal"

    @property
    def final(self) -> set[Path]:
        return {self.trunk, self.records}

    @property
    def all(self) -> set[Path]:
        return self.final | {self.journal} | {partial(file) for file in self.final}

    def clear(self, patterns: tuple[str, ...], keep: set[Path]) -> None:
        """Remove files of other packs."""
        for pattern in patterns:
            for file in set(self.directory.glob(pattern)) - keep:
                file.unlink()


UNFINISHED = ("trunk-*.partial", "experts-*.partial", "experts-*.journal")
ANY = (*UNFINISHED, "trunk-*.safetensors", "experts-*.bin")


def choose_files(index: ExpertIndex, destination: Path, format: str) -> PackFiles:
    """Names that depend on the source and the format, so that a killed pack finds its own files again.

    The pack in use may be of the same source and format; then its twin name is taken, since a file in use is
    never overwritten, not even by the same bytes.
    """
    times = [file.stat().st_mtime_ns for file in sorted({entry.file for entry in index.entries.values()})]
    ids = [_digest(index.fingerprint, times, format, SCHEMA, twin) for twin in (0, 1)]
    current = _current(destination)
    taken = current is not None and current.records == PackFiles(destination, ids[0]).records.name
    return PackFiles(destination, ids[taken])


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def partial(file: Path) -> Path:
    return file.with_name(f"{file.name}.partial")


def _current(destination: Path) -> Manifest | None:
    """The usable pack in ``destination``, if there is one."""
    try:
        return read_manifest(destination)
    except CheckpointError:
        return None


def check_source(source: Path, destination: Path) -> None:
    if source.resolve() == destination.resolve():
        raise PackError(f"{destination}: source and destination are the same; name another directory")
    if is_pack(source):
        raise PackError(f"{source}: is a pack already; pack from the original checkpoint")


def check_destination(source: Path, destination: Path) -> None:
    weights = [file.name for file in destination.glob("*.safetensors") if not file.name.startswith("trunk-")]
    if weights:
        raise PackError(f"{destination}: holds another model's {weights[0]}; name an empty directory")
    if _current(destination) is None:
        return
    for file in side_files(source):  # several files cannot be switched at one moment, so they must agree
        there = destination / file.name
        if not there.exists() or there.read_bytes() != file.read_bytes():
            raise PackError(f"{destination}: holds a pack with another {file.name}; name an empty directory")


def check_space(index: ExpertIndex, layout: RecordLayout, files: PackFiles) -> None:
    total = index.layers * index.experts * layout.nbytes + trunk_bytes(index)
    kept = (file.stat().st_blocks * 512 for file in files.all if file.exists())
    needed, free = total - sum(kept), shutil.disk_usage(files.directory).free
    if needed > free:
        raise PackError(
            f"{files.directory}: {needed} bytes are needed and {free} are free; free {needed - free} bytes "
            "or name a directory on another disk"
        )


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Lock the directory against a second pack into it; the lock ends with the process."""
    directory.mkdir(parents=True, exist_ok=True)
    fd = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PackError(f"{directory}: another pack is writing there; wait until it has ended") from None
        yield
    finally:
        os.close(fd)


def trunk_bytes(index: ExpertIndex) -> int:
    return sum(index.entries[key].nbytes for key in index.trunk_keys)
