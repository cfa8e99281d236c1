"""What runs in every layer, in native code: a tenth of its twins' time, and the same decisions to the last bit."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moespac.experts.kernels.library import load_library
from moespac.policy.cost import CostModel, Seconds
from moespac.types import Ids, Residency

if TYPE_CHECKING:
    from moespac.policy.split import Stakes


_MOST_KNOWN = 32  # arrays: they are kept from being freed


class _Layer(ctypes.Structure):
    """``Layer`` of place.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("total", "experts", "first_id", "slots")),
        *((name, ctypes.c_void_p) for name in ("counts", "host", "accelerator", "arriving")),
        *((name, ctypes.c_void_p) for name in ("by_host", "by_accelerator")),
        ("table", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("link", "storage", "toll")),
        *((name, ctypes.c_void_p) for name in ("worth", "given_up")),
        ("victims", ctypes.c_int64),
        ("order", ctypes.c_void_p),
        ("active", ctypes.c_int64),
    ]


def place(
    layer: int,
    counts: NDArray[np.int64],
    residency: Residency,
    costs: CostModel,
    stakes: Stakes | None,
) -> tuple[Ids, int] | None:
    """What ``split.place_in_python`` returns; None: there is no native code, or a prefill is too long for it."""
    library = load_library()
    if library is None:
        return None
    experts, first_id = len(counts), layer * len(counts)
    by_host, by_accelerator = costs.tables()
    order = np.empty(experts, np.int64)
    asked = _Layer(
        residency.host.size,
        experts,
        first_id,
        residency.capacity.accelerator,
        _address(counts),
        _address(residency.host) + first_id,
        _address(residency.accelerator) + first_id,
        _address(residency.arriving_accelerator) + first_id,
        _address(by_host),
        _address(by_accelerator),
        len(by_host),
        costs.link,
        costs.storage,
        costs.copy_toll,
        order=order.ctypes.data,
    )
    if stakes is not None:
        asked.worth = _address(stakes.worth) + first_id * stakes.worth.itemsize
        asked.given_up, asked.victims = _address(stakes.given_up), len(stakes.given_up)
    there = library.moespac_place(ctypes.byref(asked))
    return None if there < 0 else (order[: asked.active], there)


def freshen(
    layer: int,
    counts: NDArray[np.int64],
    tokens: float,
    step: float,
    curve: Seconds,
    lasting: NDArray[np.float32],
    saved: Seconds,
) -> bool:
    """What ``balance.freshen_in_python`` does; False: there is no native code."""
    library = load_library()
    if library is None:
        return False
    first_id = layer * len(counts)
    library.moespac_freshen(
        _address(counts),
        len(counts),
        tokens,
        step,
        _address(curve),
        len(curve) - 1,
        _address(lasting) + first_id * lasting.itemsize,
        _address(saved) + first_id * saved.itemsize,
    )
    return True


_known: dict[int, tuple[NDArray[Any], int]] = {}  # arrays, and where they lie


def _address(array: NDArray[Any]) -> int:
    """Of an array that is likely to be asked for again: numpy takes more than a microsecond to say it."""
    known = _known.get(id(array))
    if known is None:
        assert array.flags.c_contiguous
        if len(_known) == _MOST_KNOWN:
            _known.clear()
        known = _known[id(array)] = (array, array.ctypes.data)
    return known[1]
