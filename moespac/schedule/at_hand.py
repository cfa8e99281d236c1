"""TAKE what a layer needs of both tiers, if all of it is there: the common case, in one native call."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moespac.experts.kernels.library import Share as NativeShare
from moespac.experts.kernels.library import address, known_address, load_library
from moespac.policy.base import Turns
from moespac.policy.cost import CostModel, Seconds
from moespac.schedule.tiers import Tier
from moespac.types import NO_IDS, Ids, Placement, Plan


class Share(NamedTuple):
    """Experts of one device in a layer, all (n,): pinned in its tier."""

    experts: Ids
    slots: NDArray[np.int64]
    tokens: NDArray[np.int64]  # of each
    total: int  # tokens of all
    taken_natively: bool = False


class Hits(NamedTuple):
    """Of the experts placed on each device, those that were ready there."""

    host: int
    accelerator: int


class Taken(NamedTuple):
    hits: Hits
    host: Share | None  # None: something is missing, or more is asked for, and nothing is pinned
    accelerator: Share | None


class Reserved(NamedTuple):
    """What a layer can begin with, copies of what it misses being on their way."""

    host: Share
    accelerator: Share  # what is there already
    copies: list[tuple[int, int, int]]  # experts to be copied, the slot of each, and that in host memory
    missing: list[int]  # experts for whom there is no slot yet


_NO_PLAN = Plan()
NOTHING = Share(NO_IDS, NO_IDS, NO_IDS, 0)


class AtHand:
    """Takes shares of a host tier, and of an accelerator's where there is one."""

    def __init__(self, host: Tier, accelerator: Tier | None, experts: int) -> None:
        """``experts`` of a layer."""
        self._tiers = [host] if accelerator is None else [host, accelerator]
        self._experts = experts
        self._numbers = [np.empty(experts, np.int64) for _ in range(4)]  # slots and tokens, the host's first
        library = load_library()
        self._take = library.moespac_take if library else None
        self._place_and_take = library.moespac_place_and_take if library else None
        self._take_and_reserve = library.moespac_take_and_reserve if library else None
        self._computed = library.moespac_computed if library else None
        self._devices = len(self._tiers)
        shelves = [tier.shelf_address for tier in self._tiers] + [None]
        where = [address(part) for part in self._numbers]
        self._shares = (NativeShare * 2)(
            NativeShare(shelf=shelves[0], slots=where[0], tokens=where[1]),
            NativeShare(shelf=shelves[1], slots=where[2], tokens=where[3]),
        )
        self._views = list(self._shares)  # each access makes one
        self._address = ctypes.addressof(self._shares)

    def take(self, placement: Placement, counts: NDArray[np.int64], first_id: int) -> Taken:
        """``counts`` (experts,) tokens of each expert of the layer, whose expert 0 has the flat id ``first_id``.

        Slots and tokens of what is taken are the next layer's when that is asked for.
        """
        host, accelerator = placement.host, placement.accelerator
        if self._take is None or placement.load.size:
            return self.take_in_python(placement, counts, first_id)
        here, there = host.size, accelerator.size
        mine, its = self._views
        mine.ids, mine.n = address(host), here
        its.ids, its.n = address(accelerator), there
        assert here + there <= len(counts) == self._experts
        assert self._devices == 2 or not there, "no accelerator to compute on"
        all_there = self._take(self._address, self._devices, known_address(counts), first_id)
        hits = Hits(mine.ready, its.ready)
        return self._taken(placement, hits) if all_there else Taken(hits, None, None)

    def place_and_take(
        self, places: int, counts: NDArray[np.int64], first_id: int
    ) -> tuple[Placement, Taken]:
        """Who computes what by ``places`` (``Policy.places``), and ``take`` of it."""
        assert self._place_and_take is not None and self._devices == 2 and len(counts) == self._experts
        order = np.empty(self._experts, np.int64)
        all_there = self._place_and_take(
            places, self._address, known_address(counts), first_id, address(order)
        )
        mine, its = self._views
        there = its.n
        placement = Placement(order[there : there + mine.n], order[:there], _NO_PLAN)
        hits = Hits(mine.ready, its.ready)
        return placement, self._taken(placement, hits) if all_there else Taken(hits, None, None)

    def _taken(self, placement: Placement, hits: Hits) -> Taken:
        """All of it, natively."""
        host, accelerator = placement.host, placement.accelerator
        slots, tokens, its_slots, its_tokens = self._numbers
        mine, its = self._views
        here, there = host.size, accelerator.size
        return Taken(
            hits,
            Share(host, slots[:here], tokens[:here], mine.all_tokens, True) if here else NOTHING,
            Share(accelerator, its_slots[:there], its_tokens[:there], its.all_tokens) if there else NOTHING,
        )

    def take_and_reserve(
        self, placement: Placement, counts: NDArray[np.int64], first_id: int, retention: Turns
    ) -> Reserved | None:
        """Where the host has all that it computes, and what the accelerator misses: what is there is taken, and
        slots for copies of the others are reserved. None: that is not so, or there is no native code, and nothing
        has changed."""
        if self._take_and_reserve is None or self._devices < 2:
            return None
        host, accelerator = placement.host, placement.accelerator
        count = accelerator.size
        numbers = np.empty((3, count), np.int64)
        first = address(numbers)
        mine, its = self._views
        mine.ids, mine.n = address(host), host.size
        its.ids, its.n = address(accelerator), count
        reserved = self._take_and_reserve(
            *(self._address, known_address(counts), first_id, self._tiers[1].native_retention(retention)),
            *(first, first + 8 * count, first + 16 * count),
        )
        if reserved < 0:
            return None
        there = its.n
        ids, slots, sources = numbers.tolist()
        taken = self._taken(Placement(host, numbers[0, :there], _NO_PLAN), Hits(mine.n, there))
        assert taken.host is not None and taken.accelerator is not None
        copies = list(zip(ids[there : there + reserved], slots, sources, strict=False))
        return Reserved(taken.host, taken.accelerator, copies, ids[there + reserved :])

    def computed(self, share: Share, seconds: Seconds, costs: CostModel) -> None:
        """The host has computed the ``share`` that was taken last, each expert in so many ``seconds``: that is
        learned, and it is released."""
        if self._computed is None or not share.taken_natively:
            costs.observe_host_experts(share.tokens, seconds)
            self._tiers[0].release_all(share.experts)
            return
        assert seconds.size == share.experts.size
        all_pinned = self._computed(self._address, costs.host_curve, address(seconds))
        assert all_pinned, "only pinned records are released"

    def take_in_python(self, placement: Placement, counts: NDArray[np.int64], first_id: int) -> Taken:
        wanted = [placement.host, placement.accelerator]
        found = [int(np.count_nonzero(t.ready[ids])) for t, ids in zip(self._tiers, wanted, strict=False)]
        hits = Hits(*[*found, 0][:2])
        if placement.load.size or hits != (len(placement.host), len(placement.accelerator)):
            return Taken(hits, None, None)
        shares = [NOTHING, NOTHING]
        for number, (tier, ids) in enumerate(zip(self._tiers, wanted, strict=False)):
            if len(ids):
                tier.pin_all(ids)
                tokens = counts[ids - first_id]
                shares[number] = Share(ids, tier.slots_of[ids], tokens, int(tokens.sum()))
        return Taken(hits, *shares)
