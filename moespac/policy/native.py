"""What runs in every layer, in native code: a tenth of its twins' time, and the same decisions to the last bit."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moespac.experts.kernels.library import address, load_library
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
    asked, host, accelerator, arriving = _asked_about(residency)
    by_host, by_accelerator = costs.tables()
    order = np.empty(experts, np.int64)
    asked.experts, asked.first_id, asked.counts = experts, first_id, _address(counts)
    asked.host, asked.accelerator, asked.arriving = (
        host + first_id,
        accelerator + first_id,
        arriving + first_id,
    )
    asked.by_host, asked.by_accelerator = _address(by_host), _address(by_accelerator)
    asked.table, asked.order = len(by_host), address(order)
    asked.link, asked.storage, asked.toll = costs.link, costs.storage, costs.copy_toll
    if stakes is None:
        asked.worth, asked.given_up, asked.victims = None, None, 0
    else:
        asked.worth = _address(stakes.worth) + first_id * stakes.worth.itemsize
        asked.given_up, asked.victims = _address(stakes.given_up), len(stakes.given_up)
    there = library.moespac_place(ctypes.addressof(asked))
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


_latest: list[tuple[Residency, _Layer, int, int, int]] = []  # at most one


def _asked_about(residency: Residency) -> tuple[_Layer, int, int, int]:
    """What is asked in all layers alike, and where the flags of all layers lie: who decides has one residency."""
    latest = _latest[0] if _latest else None
    if latest is None or latest[0] is not residency:
        asked = _Layer(total=residency.host.size, slots=residency.capacity.accelerator)
        flags = (residency.host, residency.accelerator, residency.arriving_accelerator)
        assert all(grid.flags.c_contiguous for grid in flags)
        host, accelerator, arriving = (address(grid) for grid in flags)
        latest = (residency, asked, host, accelerator, arriving)
        _latest[:] = [latest]  # another engine's thread may put its own here
    return latest[1:]


_known: dict[int, tuple[NDArray[Any], int]] = {}  # arrays, and where they lie


def _address(array: NDArray[Any]) -> int:
    """Of an array that is likely to be asked for again."""
    known = _known.get(id(array))
    if known is None:
        if len(_known) == _MOST_KNOWN:
            _known.clear()
        known = _known[id(array)] = (array, address(array))
    return known[1]
