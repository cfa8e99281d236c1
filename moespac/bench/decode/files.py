"""The same model for every contender, in a work folder: made once, found again by the next run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moespac.bench.decode.gguf_file import GGUF_TYPES, write_gguf
from moespac.engine.build import DEMO
from moespac.errors import ConfigError
from moespac.experts.manifest import is_pack, read_manifest
from moespac.experts.pack import pack
from moespac.model.index import build_index
from moespac.model.inflate import inflate
from moespac.types import ModelShape


@dataclass(frozen=True)
class ModelFiles:
    """Where each form of the model lies. The GGUF files are there only once a contender wanted them."""

    checkpoint: Path  # as Hugging Face lays it out: what transformers reads
    pack: Path
    gguf: Path
    draft: Path
    draft_gguf: Path
    offload: Path  # what accelerate writes to

    @property
    def shape(self) -> ModelShape:
        return read_manifest(self.pack).shape

    @property
    def records(self) -> Path:
        """The file of the pack's experts."""
        return self.pack / read_manifest(self.pack).records

    @property
    def expert_bytes(self) -> int:
        """Of all experts, packed: what a budget is a share of, for every contender."""
        return self.shape.total * self.shape.record_bytes


def make_files(work: Path, factor: int, format: str, gguf: bool) -> ModelFiles:
    """Inflate, pack and convert what is not there yet; ``gguf``: llama.cpp's files too.

    Raises ConfigError for a ``work`` that cannot be a folder, and what inflating and packing raise.
    """
    fingerprint = build_index(DEMO / "target").fingerprint[:8]
    place = work / f"{fingerprint}-x{factor}"  # another version of the embedded model is another model
    files = ModelFiles(
        checkpoint=place / "checkpoint",
        pack=place / format,
        gguf=place / f"target-{GGUF_TYPES[format]}.gguf",
        draft=DEMO / "draft",
        draft_gguf=place / f"draft-{GGUF_TYPES[format]}.gguf",
        offload=place / "offload",
    )
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--work {work}: cannot be used ({error.strerror}); name another folder") from None
    if not files.checkpoint.exists():
        inflate(DEMO / "target", files.checkpoint, factor)
    if not is_pack(files.pack):
        pack(files.checkpoint, files.pack, format)
    for source, file in ((files.checkpoint, files.gguf), (files.draft, files.draft_gguf)) if gguf else ():
        if not file.exists():
            write_gguf(source, file, format)
    shutil.rmtree(files.offload, ignore_errors=True)
    os.sync()  # what is not written yet cannot be dropped from the page cache
    return files


def drop_from_page_cache(files: ModelFiles) -> None:
    """Every contender finds the model on the disk, and nothing of it in memory."""
    for file in _regular_files(files.checkpoint.parent):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _regular_files(folder: Path) -> Iterator[Path]:
    return (file for file in folder.rglob("*") if file.is_file())
