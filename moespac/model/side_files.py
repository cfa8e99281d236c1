"""The small files beside the weights: configuration, generation defaults, tokenizer, chat template."""

from __future__ import annotations

from pathlib import Path

_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken"}


def side_files(directory: Path) -> list[Path]:
    """What a copy of the model needs besides its weights."""
    return sorted(
        file
        for file in directory.iterdir()
        if file.is_file() and file.suffix in _SUFFIXES and not file.name.endswith(".index.json")
    )
