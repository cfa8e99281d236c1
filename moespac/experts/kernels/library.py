"""The compiled kernels as Python sees them: found, or compiled on first use, and loaded with ctypes."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
from numpy.typing import NDArray

from moespac.errors import ConfigError
from moespac.experts.kernels.compile import CompileError, compile_library, library_name

log = logging.getLogger(__name__)

VARIABLE = "MOESPAC_KERNEL"  # names the instruction set to use, or TORCH; for tests and bug reports
TORCH = "torch"
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
FORMATS = ("f32", "bf16", "f16", "int8", "int4")


class Matrix(ctypes.Structure):
    """``Matrix`` of kernels.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        *((name, ctypes.c_int64) for name in ("values", "scales", "minima", "row_scales", "bias")),
        *((name, ctypes.c_int32) for name in ("format", "bias_format")),
    ]


class Gate(ctypes.Structure):
    """``Gate`` of kernels.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("has_gate", "interleaved", "activation")),
        *((name, ctypes.c_float) for name in ("alpha", "limit", "offset")),
    ]


class Expert(ctypes.Structure):
    """``Expert`` of kernels.h."""

    _fields_ = [("up", Matrix), ("down", Matrix), ("gate", Gate)]


class Weights(ctypes.Structure):
    """``Weights`` of decoder.c: a matrix, and the address that its offsets count from."""

    _fields_ = [("matrix", Matrix), ("base", ctypes.c_void_p)]


class DecoderLayer(ctypes.Structure):
    """``Layer`` of decoder.c."""

    _fields_ = [
        *((name, Weights) for name in ("qkv", "out", "up", "down")),
        ("gate", Gate),
        ("router", Weights),
        *((name, ctypes.c_int64) for name in ("top_k", "renormalise")),
        *((name, ctypes.c_void_p) for name in ("before", "between", "q_norm", "k_norm")),
        ("whole_norms", ctypes.c_int64),
    ]


class DecoderShape(ctypes.Structure):
    """``Shape`` of decoder.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("hidden", "heads", "groups", "width", "padded")),
        *((name, ctypes.c_float) for name in ("epsilon", "scale")),
    ]


class PassModel(ctypes.Structure):
    """``Model`` of pass.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("decoder", "layers")),
        *((name, ctypes.c_int64) for name in ("layer_count", "top_k")),
        *((name, ctypes.c_void_p) for name in ("head", "norm", "embedding")),
        *((name, ctypes.c_void_p) for name in ("block", "outputs", "numbers", "seconds")),
    ]


class Experts(ctypes.Structure):
    """``Experts`` of pass.h."""

    _fields_ = [
        ("kernel", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
        ("arena", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("record_bytes", "experts")),
        *((name, ctypes.c_void_p) for name in ("slots", "ready", "memory")),
    ]


class Order(ctypes.Structure):
    """``Order`` of host_memory.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("ran", "to_come")),
        ("runs", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("foresight", "value", "once_used")),
    ]


class Foresight(ctypes.Structure):
    """``Foresight`` of foresight.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("layers", "experts", "room")),
        *((name, ctypes.c_double) for name in ("least", "fade", "step")),
        *((name, ctypes.c_void_p) for name in ("weights", "worth")),
        ("end", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("soon", "urgency")),
        *((name, ctypes.c_int64) for name in ("first", "end_soon")),
        *((name, ctypes.c_void_p) for name in ("heard", "margins")),
    ]


class Known(ctypes.Structure):
    """``Known`` of foresight.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("ran", "to_come", "ready", "filling")]


class HostMemory(ctypes.Structure):
    """``HostMemory`` of host_memory.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("experts", "slots", "read_ahead")),
        *((name, ctypes.c_void_p) for name in ("ready", "filling", "slot_of")),
        *((name, ctypes.c_void_p) for name in ("expert_in", "state", "pins", "free", "counts")),
        *((name, ctypes.c_void_p) for name in ("reads", "ahead")),
        *((name, ctypes.c_int64) for name in ("first", "end")),
        ("landed", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("landings", "room")),
    ]


class Shelf(ctypes.Structure):
    """``Shelf`` of dispatch.c."""

    _fields_ = [
        ("slots", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("ready", "filling", "slot_of")),
        *((name, ctypes.c_void_p) for name in ("expert_in", "state", "pins", "free", "counts")),
    ]


class Retention(ctypes.Structure):
    """``Retention`` of dispatch.c."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("ran", "to_come")), ("first", ctypes.c_int64)]


class Share(ctypes.Structure):
    """``Share`` of dispatch.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("shelf", "ids")),
        *((name, ctypes.c_int64) for name in ("n", "ready", "all_tokens")),
        *((name, ctypes.c_void_p) for name in ("slots", "tokens")),
    ]


class Curve(ctypes.Structure):
    """``Curve`` of costs.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("buckets", "samples", "entries", "redraw", "measured", "due")),
        *((name, ctypes.c_double) for name in ("first", "further", "far")),
        *((name, ctypes.c_void_p) for name in ("shape", "prior", "latest", "seen", "seconds", "table")),
    ]


class Showing(ctypes.Structure):
    """``Showing`` of place.h."""

    _fields_ = [
        ("tokens", ctypes.c_double),
        ("step", ctypes.c_float),
        ("curve", ctypes.c_void_p),
        ("steps", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("lasting", "saved")),
    ]


class Places(ctypes.Structure):
    """``Places`` of place.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("total", "experts", "slots")),
        *((name, ctypes.c_void_p) for name in ("host", "accelerator", "arriving")),
        *((name, ctypes.c_void_p) for name in ("by_host", "by_accelerator", "rates", "worth", "given_up")),
        ("victims", ctypes.c_int64),
        ("showing", ctypes.c_void_p),
        ("active", ctypes.c_int64),
    ]


class Run(ctypes.Structure):
    """``Run`` of pass.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("ids", "x", "normed")),
        *((name, ctypes.c_int64) for name in ("tokens", "keep")),
        ("store", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("room", "start")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "index", "shares", "spans", "slices")),
        *((name, ctypes.c_int64) for name in ("slice_count", "slice_room")),
        *((name, ctypes.c_void_p) for name in ("logits", "order")),
        *((name, ctypes.c_int64) for name in ("layer", "row")),
        ("block", ctypes.c_void_p),
        ("began", ctypes.c_double),
    ]


_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64
_first_byte: Callable[[Any], ctypes.c_char] = ctypes.c_char.from_buffer
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "moespac_isa": (ctypes.c_char_p, [ctypes.c_char_p]),
    "moespac_gate": (None, [ctypes.c_char_p, _POINTER, _POINTER, _POINTER, _INT64]),
    "moespac_read": (_INT64, [ctypes.c_char_p, _POINTER, _INT64]),
    "moespac_kernel_new": (_POINTER, [_POINTER, ctypes.c_int, ctypes.c_char_p]),
    "moespac_kernel_free": (None, [_POINTER]),
    "moespac_kernel_run": (
        ctypes.c_int,
        [*(_POINTER, _POINTER, _INT64, _INT64, _POINTER, _INT64, _INT64), *[_POINTER] * 6],
    ),
    "moespac_decoder_new": (_POINTER, [_POINTER, ctypes.c_int, ctypes.c_char_p]),
    "moespac_decoder_free": (None, [_POINTER]),
    "moespac_join": (None, [_POINTER, _POINTER, _INT64, _INT64, _INT64, _POINTER]),
    "moespac_place": (_INT64, [_POINTER, _INT64, _POINTER, _POINTER]),
    "moespac_freshen": (None, [_POINTER, _INT64, _INT64, _POINTER]),
    "moespac_reads_new": (_POINTER, [ctypes.c_int, _POINTER, _POINTER, *[_INT64] * 4]),
    "moespac_reads_free": (None, [_POINTER]),
    "moespac_reads_serve": (ctypes.c_int, [_POINTER, _POINTER, _POINTER]),
    "moespac_reads_end": (None, [_POINTER, _INT64, ctypes.c_int]),
    "moespac_reads_close": (None, [_POINTER]),
    "moespac_reads_count": (_INT64, [_POINTER]),
    "moespac_reads_rings": (_INT64, [_POINTER]),
    "moespac_reads_wait": (None, [_POINTER, _INT64]),
    "moespac_memory_settle": (_INT64, [_POINTER]),
    "moespac_memory_start_layer": (None, [_POINTER, _INT64, _POINTER, _INT64]),
    "moespac_memory_pump": (None, [_POINTER, _POINTER, _INT64]),
    "moespac_memory_demand": (ctypes.c_int, [_POINTER, _POINTER, _INT64, _INT64]),
    "moespac_group": (_INT64, [_POINTER, _INT64, _INT64, _POINTER, _POINTER]),
    "moespac_pin": (ctypes.c_int, [_POINTER, _POINTER, _INT64]),
    "moespac_release": (ctypes.c_int, [_POINTER, _POINTER, _INT64]),
    "moespac_place_and_take": (ctypes.c_int, [_POINTER, _POINTER, _POINTER, _INT64, _POINTER]),
    "moespac_computed": (ctypes.c_int, [_POINTER, _POINTER, _POINTER]),
    "moespac_job_is_over": (
        ctypes.c_int,
        [_POINTER, _POINTER, _INT64, _POINTER, _INT64, ctypes.c_double],
    ),
    "moespac_sort_out": (_INT64, [_POINTER, _POINTER, _INT64, _POINTER]),
    "moespac_look_up": (_INT64, [_POINTER, _POINTER, _INT64, _POINTER, _INT64, _POINTER]),
    "moespac_victim": (_INT64, [_POINTER, _POINTER]),
    "moespac_take_and_reserve": (_INT64, [_POINTER, _POINTER, _INT64, *[_POINTER] * 4]),
    "moespac_reserve": (_INT64, [*[_POINTER] * 3, _INT64, *[_POINTER] * 3]),
    "moespac_make_jobs": (_INT64, [_POINTER, _POINTER, _POINTER, _POINTER, _INT64, _INT64, _POINTER]),
    "moespac_take": (ctypes.c_int, [_POINTER, _INT64, _POINTER, _INT64]),
    "moespac_run_share": (
        ctypes.c_int,
        [
            *(_POINTER, _POINTER, _INT64, _INT64, _POINTER, _INT64),
            *(_INT64, _POINTER, _POINTER, _INT64, _INT64, _POINTER, _POINTER, _POINTER),
        ],
    ),
    "moespac_observe": (None, [_POINTER, _POINTER, _POINTER, _INT64]),
    "moespac_draw": (None, [_POINTER]),
    "moespac_foresight_learn": (None, [*[_POINTER] * 2, _INT64, _POINTER, _INT64, _INT64]),
    "moespac_foresight_place": (_POINTER, [_POINTER, _INT64, _INT64]),
    "moespac_foresight_hear": (None, [_POINTER, _POINTER, *[_INT64] * 4]),
    "moespac_pass": (ctypes.c_int, [_POINTER, _POINTER, _POINTER, _INT64]),
}

# These keep the GIL: they take a microsecond or a few, and who gives it up may wait milliseconds to have it back.
_BRIEF = (
    "computed",
    "draw",
    "freshen",
    "group",
    "job_is_over",
    "look_up",
    "make_jobs",
    "observe",
    "pin",
    "place",
    "place_and_take",
    "release",
    "reserve",
    "sort_out",
    "take",
    "take_and_reserve",
    "victim",
)


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The library, or None where there is none and none can be compiled, which is said once."""
    try:
        file = str(_find() or _compile())
        library, holding = ctypes.CDLL(file), ctypes.PyDLL(file)
    except (CompileError, OSError) as error:
        log.warning(
            "no native kernel (%s): experts on the CPU run in torch, which is several times slower", error
        )
        return None
    for name in _BRIEF:
        setattr(library, f"moespac_{name}", getattr(holding, f"moespac_{name}"))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def address(array: NDArray[Any]) -> int:
    """Of a contiguous array's first number, 0 for none: in a third of the time that numpy takes to say it."""
    try:
        return ctypes.addressof(_first_byte(array)) if array.size else 0
    except TypeError:  # it is read-only
        assert array.flags.c_contiguous
        return array.ctypes.data


_known: dict[int, tuple[NDArray[Any], int]] = {}  # arrays, and where they lie
_MOST_KNOWN = 32  # they are kept from being freed


def known_address(array: NDArray[Any]) -> int:
    """Of an array that is asked for again and again."""
    known = _known.get(id(array))
    if known is None:
        if len(_known) == _MOST_KNOWN:
            _known.clear()
        known = _known[id(array)] = (array, address(array))
    return known[1]


def chosen_isa(library: ctypes.CDLL) -> bytes | None:
    """The instruction set to use: the fastest here, or the one that the environment names; None for torch.

    Raises ConfigError when this machine lacks the one named.
    """
    wanted = os.environ.get(VARIABLE) or None
    if wanted == TORCH:
        return None
    isa = library.moespac_isa(wanted.encode() if wanted else None)
    if isa is None:
        best = library.moespac_isa(None).decode()
        raise ConfigError(f"{VARIABLE}={wanted}: not on this machine; give {best}, portable or {TORCH}")
    return isa


def _find() -> Path | None:
    found = (directory / library_name() for directory in _directories())
    return next((library for library in found if library.exists()), None)


def _compile() -> Path:
    """Into the package (a source checkout), or where that cannot be written, into the user's cache."""
    directories = [directory for directory in _directories() if os.access(directory, os.W_OK)]
    if not directories:
        cache = _directories()[-1]
        cache.mkdir(parents=True, exist_ok=True)
        directories = [cache]
    return compile_library(directories[0])


def _directories() -> list[Path]:
    return [Path(__file__).parent, platformdirs.user_cache_path("moespac") / "kernels"]
