"""A trace in its file: one compressed .npz, written as a whole, checked when read. See docs/traces.md."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moespac.atomic import write_atomically
from moespac.errors import CheckpointError
from moespac.trace.schema import Trace, check

VERSION = 1
_FORMAT = "moespac-trace"
_ARRAYS = ("tokens", "routing", "pass_offsets", "drafted", "accepted", "prefill", "sequence_offsets")
_UNREADABLE = (  # what numpy and zipfile raise on bytes that are not theirs
    OSError, ValueError, EOFError, LookupError, NotImplementedError, RuntimeError, MemoryError, AttributeError,
    TypeError, OverflowError, SyntaxError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def write(path: Path, trace: Trace) -> None:
    """Replace ``path`` as a whole. Raises OSError."""
    write_atomically(path, to_bytes(trace))


def read(path: Path) -> Trace:
    """The trace in ``path``. Raises CheckpointError if it is missing, damaged or of another format."""
    return from_arrays(path, read_arrays(path))


def to_bytes(trace: Trace) -> bytes:
    """The file's content; the same trace gives the same bytes."""
    header = {
        "format": _FORMAT,
        "version": VERSION,
        "experts": trace.experts,
        "source": trace.source,
        "categories": trace.categories,
    }
    arrays = {name: getattr(trace, name) for name in _ARRAYS}
    if trace.weights is not None:
        arrays["weights"] = trace.weights
    content = io.BytesIO()
    np.savez_compressed(content, header=np.array(json.dumps(header)), **arrays)
    return content.getvalue()


def read_arrays(path: Path) -> dict[str, NDArray]:
    """All arrays of an .npz. Raises CheckpointError."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file; name a trace (.npz)") from None
    except _UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{path}: is damaged or not an .npz ({reason}); record or import it again"
        ) from None


def is_trace(arrays: dict[str, NDArray]) -> bool:
    return "header" in arrays


def from_arrays(path: Path, arrays: dict[str, NDArray]) -> Trace:
    """The trace that ``arrays``, read from ``path``, make. Raises CheckpointError."""
    if not is_trace(arrays):
        raise CheckpointError(f"{path}: is no moespac trace; `moespac trace import` makes one of other files")
    try:
        header: dict[str, Any] = json.loads(str(arrays["header"]))
        if (header["format"], header["version"]) != (_FORMAT, VERSION):
            raise ValueError(f"it is {header['format']} version {header['version']}, not {_FORMAT} {VERSION}")
        trace = Trace(
            experts=int(header["experts"]),
            weights=arrays.get("weights"),
            categories=tuple(map(str, header["categories"])),
            source=str(header["source"]),
            **{name: arrays[name] for name in _ARRAYS},
        )
        check(trace)
    except KeyError as missing:
        raise CheckpointError(f"{path}: is no whole trace ({missing} is missing); record it again") from None
    except (ValueError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path}: cannot be used ({error}); record or import it again") from None
    return trace
