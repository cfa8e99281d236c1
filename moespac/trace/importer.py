"""Traces of others: one array of routed experts over all decoded tokens, as published for GPT-OSS-20B."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moespac.errors import CheckpointError
from moespac.trace.files import from_arrays, is_trace, read_arrays
from moespac.trace.schema import MOST_EXPERTS, Trace, check, compact


def load(path: Path) -> Trace:
    """A trace of our own format, or of the one that ``import_trace`` reads. Raises CheckpointError."""
    arrays = read_arrays(path)
    return from_arrays(path, arrays) if is_trace(arrays) else _from_decode_arrays(path, arrays)


def import_trace(path: Path, meta: Path | None = None) -> Trace:
    """Read an .npz of plain decoding: each token becomes a pass of its own, with no drafts.

    Its arrays: ``experts`` (tokens, layers, k); ``tokens`` (tokens,) ids; ``offsets`` (sequences + 1,) into them;
    ``probs``, shaped as ``experts``, may be missing. ``meta`` is a .jsonl that has a line for each sequence, of
    which ``category_of`` takes the category. Raises CheckpointError.
    """
    categories = None if meta is None else [category_of(line) for line in _lines(meta)]
    return _from_decode_arrays(path, read_arrays(path), categories)


def category_of(line: Mapping[str, object]) -> str:
    """What kind of text a line of a .jsonl is: its benchmark or data set, and its category within that."""
    names = (line.get("benchmark") or line.get("dataset"), line.get("category"))
    return "/".join(str(name) for name in names if name)


def _from_decode_arrays(path: Path, arrays: dict[str, NDArray], categories: list[str] | None = None) -> Trace:
    try:
        trace = _convert(arrays, categories, source=f"imported from {path.name}")
        check(trace)
    except KeyError as missing:
        raise CheckpointError(
            f"{path}: is neither a moespac trace nor one to import ({missing} is missing)"
        ) from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be imported ({error}); correct it") from None
    return trace


def _convert(arrays: dict[str, NDArray], categories: list[str] | None, source: str) -> Trace:
    """Raises KeyError for what is missing, ValueError or TypeError for what does not fit."""
    chosen, tokens, offsets = arrays["experts"], arrays["tokens"], arrays["offsets"]
    if chosen.dtype.kind not in "iu" or chosen.size == 0 or not 0 <= int(chosen.max()) < MOST_EXPERTS:
        raise ValueError(f"experts are not numbers from 0 to {MOST_EXPERTS - 1}")
    if categories is None:
        categories = [""] * (len(offsets) - 1)
    if len(categories) != len(offsets) - 1:
        raise ValueError(f"it has {len(offsets) - 1} sequences, its meta file {len(categories)} lines")
    experts = int(chosen.max()) + 1  # the layout does not say; some token used the last one
    return Trace(
        experts=experts,
        tokens=tokens.astype(np.int32),
        routing=compact(chosen, experts),
        weights=arrays["probs"].astype(np.float16) if "probs" in arrays else None,
        pass_offsets=np.arange(len(tokens) + 1),
        drafted=np.zeros(len(tokens), np.int32),
        accepted=np.zeros(len(tokens), np.int32),
        prefill=np.zeros(len(tokens), np.bool_),
        sequence_offsets=offsets.astype(np.int64),
        categories=tuple(categories),
        source=source,
    )


def _lines(path: Path) -> list[dict[str, object]]:
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as lines of JSON ({error})") from None
    if not all(isinstance(line, dict) for line in lines):
        raise CheckpointError(f"{path}: holds lines that are no JSON objects")
    return lines
