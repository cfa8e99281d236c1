"""``moespac.json`` makes a directory a pack. It names the data files, so replacing it switches packs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moespac.atomic import write_atomically
from moespac.errors import CheckpointError
from moespac.experts.format import RecordLayout
from moespac.types import ModelShape

MANIFEST = "moespac.json"
SCHEMA = 1  # raised when a reader of the old schema would misread the new


@dataclass(frozen=True)
class Manifest:
    """All that is known of a pack. Records lie in ``records`` by flat expert id."""

    format: str  # one of format.PACK_FORMATS
    shape: ModelShape
    layout: RecordLayout
    records: str  # file name
    trunk: str  # file name
    trunk_bytes: int
    checksums: tuple[int, ...]  # xxh3_64 of each record
    errors: tuple[float, ...]  # ||W - Q(W)|| / ||W|| over each layer's experts
    fingerprint: str  # of the source checkpoint

    @property
    def records_bytes(self) -> int:
        return self.shape.total * self.layout.nbytes


def is_pack(path: Path) -> bool:
    """Whether ``path`` is a directory that ``moespac pack`` finished."""
    return (path / MANIFEST).is_file()


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Replace the manifest as a whole: from this moment on the directory is the new pack."""
    shape = manifest.shape
    data = {
        "schema": SCHEMA,
        "format": manifest.format,
        "shape": {"layers": shape.layers, "experts": shape.experts, "top_k": shape.top_k},
        "layout": manifest.layout.to_json(),
        "records": manifest.records,
        "trunk": manifest.trunk,
        "trunk_bytes": manifest.trunk_bytes,
        "checksums": [f"{checksum:016x}" for checksum in manifest.checksums],
        "errors": manifest.errors,
        "fingerprint": manifest.fingerprint,
    }
    write_atomically(directory / MANIFEST, json.dumps(data, indent=1).encode())


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a pack, its data files checked for presence and size.

    Raises CheckpointError when the manifest or a data file is missing, damaged or of another schema.
    """
    text = _read(directory)
    manifest = _parse(directory, text)
    try:
        _check_file(directory / manifest.trunk, manifest.trunk_bytes)
        _check_file(directory / manifest.records, manifest.records_bytes)
    except CheckpointError:
        if _read(directory) != text:  # packed again while we were looking
            return read_manifest(directory)
        raise
    return manifest


def _read(directory: Path) -> bytes:
    try:
        return (directory / MANIFEST).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{directory}: no readable {MANIFEST} ({error.strerror}); pack again") from None


def _parse(directory: Path, text: bytes) -> Manifest:
    try:
        data = json.loads(text)
        schema = data["schema"]
        if schema == SCHEMA:
            return _from_json(data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{directory / MANIFEST}: damaged ({error!r}); pack again") from None
    raise CheckpointError(
        f"{directory}: packed by another version (schema {schema}, not {SCHEMA}); pack again"
    )


def _from_json(data: dict[str, Any]) -> Manifest:
    layout = RecordLayout.from_json(data["layout"])
    manifest = Manifest(
        format=data["format"],
        shape=ModelShape(**data["shape"], record_bytes=layout.nbytes),
        layout=layout,
        records=data["records"],
        trunk=data["trunk"],
        trunk_bytes=data["trunk_bytes"],
        checksums=tuple(int(checksum, 16) for checksum in data["checksums"]),
        errors=tuple(data["errors"]),
        fingerprint=data["fingerprint"],
    )
    if len(manifest.checksums) != manifest.shape.total or len(manifest.errors) != manifest.shape.layers:
        raise ValueError("not one checksum for each expert and one error for each layer")
    return manifest


def _check_file(file: Path, size: int) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file}: named by {MANIFEST} but missing; pack again")
    if file.stat().st_size != size:
        raise CheckpointError(f"{file}: {file.stat().st_size} bytes where {size} belong; pack again")
