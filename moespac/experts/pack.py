"""PACK a checkpoint: every expert becomes one contiguous, aligned, optionally quantised record.

The destination is a complete model: configuration and tokenizer, ``trunk-<id>.safetensors`` with everything
but the experts, ``experts-<id>.bin`` with the records, and ``moespac.json``, which names them. Data files are
never overwritten; they appear under a new id, and replacing ``moespac.json`` switches from the old pack to
the new. A pack that is killed goes on from its journal.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from moespac.atomic import sync_directory, write_atomically
from moespac.config import PackConfig
from moespac.errors import PackError
from moespac.experts.convert import Converter
from moespac.experts.format import RecordLayout, packed_layout
from moespac.experts.journal import Done, Journal
from moespac.experts.manifest import Manifest, write_manifest
from moespac.experts.pack_files import (
    ANY,
    UNFINISHED,
    PackFiles,
    alone_in,
    check_destination,
    check_source,
    check_space,
    choose_files,
    partial,
    trunk_bytes,
)
from moespac.experts.store import CheckpointStore
from moespac.model.index import ExpertIndex, build_index
from moespac.model.safetensors_writer import copy_stream, write_safetensors
from moespac.model.side_files import side_files
from moespac.progress import ProgressOption, progress_over
from moespac.types import ModelShape


@dataclass(frozen=True)
class PackReport:
    """What a pack did."""

    destination: Path
    format: str
    shape: ModelShape
    source_bytes: int  # of the experts, before
    packed_bytes: int  # of the experts, after
    trunk_bytes: int
    errors: tuple[float, ...]  # ||W - Q(W)|| / ||W|| over each layer's experts

    @property
    def worst_error(self) -> float:
        return max(self.errors)


def pack(
    source: Path,
    destination: Path,
    format: str,
    progress: ProgressOption = True,
    config: PackConfig | None = None,
) -> PackReport:
    """Pack the checkpoint in ``source`` into the directory ``destination``, in one of ``PACK_FORMATS``.

    A pack that is there already stays usable until the new one is complete. After a failure or a kill, the
    same call goes on where this one stopped. Raises ConfigError for an unknown format, ModelError and
    CheckpointError for a source that cannot be packed, PackError when writing is impossible.
    """
    config = config or PackConfig()
    check_source(source, destination)
    index = build_index(source)
    layout = packed_layout(index.tensors, format)
    try:
        with alone_in(destination):
            check_destination(source, destination)
            files = choose_files(index, destination, format)
            files.clear(UNFINISHED, keep=files.all)
            check_space(index, layout, files)
            _write_trunk(index, files, progress, config)
            done = _write_records(index, layout, files, progress, config)
            return _publish(index, layout, files, done, format)
    except OSError as error:
        raise PackError(f"{destination}: {_explain(error)}") from error


def print_report(report: PackReport, console: Console | None = None) -> None:
    """The relative error that packing cost, layer by layer."""
    saved = report.packed_bytes / report.source_bytes
    table = Table(
        title=f"{report.shape.total} experts in {report.format}: {decimal(report.packed_bytes)}",
        caption=f"{saved:.0%} of the source's {decimal(report.source_bytes)}",
    )
    table.add_column("MoE layer", justify="right")
    table.add_column("relative error", justify="right")
    for layer, error in enumerate(report.errors):
        table.add_row(str(layer), f"{error:.2e}")
    (console or Console()).print(table)


def _explain(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space and run the same command again to go on"
    return f"packing stopped ({error}); solve that and run the same command again to go on"


def _write_trunk(index: ExpertIndex, files: PackFiles, progress: ProgressOption, config: PackConfig) -> None:
    if files.trunk.exists():  # renamed only once complete
        return
    streams = [copy_stream(index.entries[key], config.copy_bytes) for key in index.trunk_keys]
    with progress_over(trunk_bytes(index), "trunk", progress) as advance:
        write_safetensors(partial(files.trunk), streams, advance)
    os.replace(partial(files.trunk), files.trunk)


def _write_records(
    index: ExpertIndex, layout: RecordLayout, files: PackFiles, progress: ProgressOption, config: PackConfig
) -> list[Done]:
    """All records, in order of flat id; what the journal names and is intact is not done again."""
    if files.records.exists():  # killed between this file and the manifest
        os.replace(files.records, partial(files.records))
    total = index.layers * index.experts
    journal = Journal(files.journal)
    fd = os.open(partial(files.records), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        done = _intact(journal.read(), fd, layout.nbytes, total)
        journal.restart(done.values())
        with (
            closing(CheckpointStore(index)) as store,
            progress_over(total * layout.nbytes, "experts", progress) as advance,
        ):
            advance(len(done) * layout.nbytes)
            converter = Converter(store, layout)
            missing = [record for record in range(total) if record not in done]
            for batch in _batches(missing, max(1, config.commit_bytes // layout.nbytes)):
                written = [converter.write(record, fd, advance) for record in batch]
                os.fdatasync(fd)  # before the journal, which must never run ahead of the data
                journal.append(written)
                done.update({item.record: item for item in written})
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(partial(files.records), files.records)
    return [done[record] for record in range(total)]


def _intact(journalled: list[Done], fd: int, nbytes: int, total: int) -> dict[int, Done]:
    return {
        item.record: item
        for item in journalled
        if item.record < total
        and xxhash.xxh3_64_intdigest(os.pread(fd, nbytes, item.record * nbytes)) == item.checksum
    }


def _batches(records: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(records), size):
        yield records[start : start + size]


def _publish(
    index: ExpertIndex, layout: RecordLayout, files: PackFiles, done: list[Done], format: str
) -> PackReport:
    """Switch to the new pack, then remove the old one's files."""
    for file in side_files(index.source):
        write_atomically(files.directory / file.name, file.read_bytes())
    sync_directory(files.directory)
    manifest = Manifest(
        format=format,
        shape=ModelShape(index.layers, index.experts, index.top_k, layout.nbytes),
        layout=layout,
        records=files.records.name,
        trunk=files.trunk.name,
        trunk_bytes=files.trunk.stat().st_size,
        checksums=tuple(item.checksum for item in done),
        errors=_layer_errors(done, index.layers),
        fingerprint=index.fingerprint,
    )
    write_manifest(files.directory, manifest)
    sync_directory(files.directory)
    files.clear(ANY, keep=files.final)
    return PackReport(
        destination=files.directory,
        format=format,
        shape=manifest.shape,
        source_bytes=manifest.shape.total * index.expert_bytes,
        packed_bytes=manifest.records_bytes,
        trunk_bytes=manifest.trunk_bytes,
        errors=manifest.errors,
    )


def _layer_errors(done: list[Done], layers: int) -> tuple[float, ...]:
    squares = np.array([(item.squared_error, item.squared_norm) for item in done])
    error, norm = squares.reshape(layers, -1, 2).sum(axis=1).T  # (layers,) each
    return tuple(np.sqrt(error / np.where(norm > 0, norm, 1.0)).tolist())  # all-zero experts have no error
