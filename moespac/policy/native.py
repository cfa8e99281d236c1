"""What runs in every layer, in native code: a tenth of its twins' time, and the same decisions to the last bit."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moespac.experts.kernels.library import Places, Showing, address, known_address, load_library
from moespac.policy.cost import CostModel
from moespac.types import Ids, Residency

if TYPE_CHECKING:
    from moespac.policy.balance import Freshening
    from moespac.policy.split import Stakes


class Placer:
    """``split.place_in_python`` for all layers of a pass, after what the layer shows is learned
    (``balance.freshen_in_python``) where the stakes say so."""

    def __init__(
        self, library: ctypes.CDLL, residency: Residency, costs: CostModel, stakes: Stakes | None
    ) -> None:
        self._asked_about = (residency, costs, stakes)
        self._place = library.moespac_place
        grids = (residency.host, residency.accelerator, residency.arriving_accelerator)
        assert all(grid.flags.c_contiguous for grid in grids)
        self._experts = residency.host.shape[1]
        places = Places(residency.host.size, self._experts, residency.capacity.accelerator)
        places.host, places.accelerator, places.arriving = (address(grid) for grid in grids)
        places.by_host, places.by_accelerator = costs.host_curve, costs.accelerator_curve
        places.rates = address(costs.rates)
        if stakes is not None:
            places.worth, places.given_up = address(stakes.worth), address(stakes.given_up)
            places.victims = stakes.given_up.size
            if stakes.freshening is not None:
                self._showing = _showing(stakes.freshening, stakes.worth)
                places.showing = ctypes.addressof(self._showing)
        self._places, self.address = places, ctypes.addressof(places)

    def asks_about(self, residency: Residency, costs: CostModel, stakes: Stakes | None) -> bool:
        known = self._asked_about
        return known[0] is residency and known[1] is costs and known[2] is stakes

    def __call__(self, layer: int, counts: NDArray[np.int64]) -> tuple[Ids, int] | None:
        """None: the prefill is too long for it; what the layer shows is learned then too."""
        order = np.empty(self._experts, np.int64)
        first_id = layer * self._experts
        there = self._place(self.address, first_id, known_address(counts), address(order))
        return None if there < 0 else (order[: self._places.active], there)


_latest: list[Placer] = []  # at most one


def placer(residency: Residency, costs: CostModel, stakes: Stakes | None) -> Placer | None:
    """None: there is no native code. Who decides asks about the same records in all layers of a pass."""
    latest = _latest[0] if _latest else None
    if latest is not None and latest.asks_about(residency, costs, stakes):
        return latest
    library = load_library()
    if library is None:
        return None
    _latest[:] = [made := Placer(library, residency, costs, stakes)]  # another thread may put its own here
    return made


def freshen(
    layer: int, counts: NDArray[np.int64], freshening: Freshening, saved: NDArray[np.float64]
) -> bool:
    """What ``balance.freshen_in_python`` does; False: there is no native code."""
    library = load_library()
    if library is None:
        return False
    showing = _showing(freshening, saved)
    experts = len(counts)
    library.moespac_freshen(known_address(counts), layer * experts, experts, ctypes.addressof(showing))
    return True


def _showing(freshening: Freshening, saved: NDArray[np.float64]) -> Showing:
    tokens, step, curve, lasting = freshening
    values = curve.curve
    return Showing(tokens, step, address(values), len(values) - 1, address(lasting), address(saved))
