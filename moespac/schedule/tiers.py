"""Slots of one fast memory: which expert is in which slot, what is being filled, what is pinned.

A slot is free, filling (its bytes are in flight) or ready; only a ready slot that nobody has pinned can be
evicted. Weights are read-only, so eviction drops a copy and writes nothing back. All methods are called from
the deciding thread; movers only ever write the bytes of a filling slot.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moespac.experts.kernels.library import Retention as NativeRetention
from moespac.experts.kernels.library import Shelf, address, known_address, load_library
from moespac.policy.base import TierName, Turns
from moespac.policy.cost import CostModel

FREE, FILLING, READY = 0, 1, 2
NOWHERE = -1


class Move(NamedTuple):
    """A record goes from one slot of a tier to another."""

    source: int
    target: int


class Books(NamedTuple):
    """The arrays of a tier, live: for native code that keeps them too. csrc/host_memory.h has the same names."""

    ready: NDArray[np.bool_]
    filling: NDArray[np.bool_]
    slot_of: NDArray[np.int64]
    expert_in: NDArray[np.int64]
    state: NDArray[np.uint8]
    pins: NDArray[np.int64]
    free: NDArray[np.int64]
    counts: NDArray[np.int64]


class Tier:
    """The books of ``slots`` records. ``total`` experts exist in the model.

    ``ready`` and ``filling`` are (total,) flags by flat expert id, kept current at every change.
    """

    def __init__(self, name: TierName, slots: int, record_bytes: int, total: int) -> None:
        self.name = name
        self.slots = slots
        self.record_bytes = record_bytes
        self.ready = np.zeros(total, dtype=bool)
        self.filling = np.zeros(total, dtype=bool)
        self._most_slots = slots  # the budget, before any of it was given back
        self._slot_of = np.full(total, NOWHERE, dtype=np.int64)
        self._expert_in = np.full(self.slots, NOWHERE, dtype=np.int64)
        self._state = np.full(self.slots, FREE, dtype=np.uint8)
        self._pins = np.zeros(self.slots, dtype=np.int64)
        self._free = np.arange(self.slots - 1, -1, -1, dtype=np.int64)  # the first ``_counts[0]`` of them
        self._counts = np.array([self.slots, 0], dtype=np.int64)  # slots free; the most that were in use
        self._library = load_library()
        self._shelf = Shelf(slots, *(address(part) for part in self.books))
        self._worth = NativeRetention()
        self.shelf_address = ctypes.addressof(self._shelf)  # for native code that pins: it stays where it is

    @property
    def books(self) -> Books:
        """Until it shrinks."""
        lists = (self._slot_of, self._expert_in, self._state, self._pins, self._free, self._counts)
        return Books(self.ready, self.filling, *lists)

    @property
    def peak_slots(self) -> int:
        return int(self._counts[1])

    @property
    def peak_bytes(self) -> int:
        return self.peak_slots * self.record_bytes

    @property
    def slots_of(self) -> NDArray[np.int64]:
        """(total,) where each expert lies, or NOWHERE: a live view."""
        return self._slot_of

    def slot(self, expert: int) -> int:
        """Where a ready or filling record lies; the caller has it pinned or is filling it."""
        slot = int(self._slot_of[expert])
        assert slot != NOWHERE
        return slot

    def reserve(self, expert: int, retention: NDArray[np.float64], worth: float | None = None) -> bool:
        """Take a slot for ``expert`` and mark it filling; the least retained record makes way.

        False when every slot is in use, or when the victim is worth ``worth`` or more (None: it has to go).
        """
        assert self._slot_of[expert] == NOWHERE, "an expert has at most one slot"
        if not self._counts[0]:
            victim = self._victim(retention)
            if victim == NOWHERE or (worth is not None and retention[victim] >= worth):
                return False
            self.evict(victim)
        free = self._counts[0] = self._counts[0] - 1
        slot = int(self._free[free])
        self._slot_of[expert] = slot
        self._expert_in[slot] = expert
        self._state[slot] = FILLING
        self.filling[expert] = True
        self._counts[1] = max(self._counts[1], self.slots - free)
        return True

    def reserve_all(self, experts: list[int], source: Tier, retention: Turns) -> list[tuple[int, int]]:
        """``reserve`` one after the other, as far as there are slots, for records that are ready in ``source`` and
        are pinned there; returns the slot of each, and that in ``source``."""
        if self._library is None:
            return self.reserve_all_in_python(experts, source, retention)
        count, ids = len(experts), np.array(experts, np.int64)
        where = np.empty((2, count), np.int64)
        first = address(where)
        taken = self._library.moespac_reserve(
            *(self.shelf_address, source.shelf_address, address(ids), count),
            *(self.native_retention(retention), first, first + 8 * count),
        )
        assert taken >= 0, "what is copied is ready, and has no slot"
        slots, sources = where.tolist()
        return list(zip(slots[:taken], sources, strict=False))

    def native_retention(self, turns: Turns) -> int:
        """Where native code finds it, until this is asked again."""
        worth = self._worth
        worth.ran, worth.to_come = known_address(turns.ran), known_address(turns.to_come)
        worth.first = turns.first
        return ctypes.addressof(worth)

    def reserve_all_in_python(
        self, experts: list[int], source: Tier, retention: Turns
    ) -> list[tuple[int, int]]:
        values = np.concatenate([retention.ran[: retention.first], retention.to_come[retention.first :]])
        places = []
        for expert in experts:
            if not self.reserve(expert, values):
                break
            source.pin(expert)
            places.append((self.slot(expert), source.slot(expert)))
        return places

    def sort_out(self, experts: NDArray[np.int64]) -> tuple[list[int], list[int]]:
        """Those that are ready, in their order, are pinned; the others, in theirs."""
        if self._library is None:
            there = self.ready[experts]
            resident = experts[there]
            self.pin_all(resident)
            return resident.tolist(), experts[~there].tolist()
        found = np.empty_like(experts)
        ready = self._library.moespac_sort_out(
            self.shelf_address, address(experts), experts.size, address(found)
        )
        every = found.tolist()
        return every[:ready], every[ready:]

    def look_up(
        self, experts: NDArray[np.int64], counts: NDArray[np.int64], first_id: int
    ) -> tuple[NDArray[np.int64], int]:
        """Their slots, and the tokens of all together; ``counts`` are those of the experts from ``first_id`` on."""
        if self._library is None:
            return self._slot_of[experts], int(counts[experts - first_id].sum())
        slots = np.empty_like(experts)
        tokens = self._library.moespac_look_up(
            *(self.shelf_address, address(experts), experts.size),
            *(known_address(counts), first_id, address(slots)),
        )
        return slots, tokens

    def commit(self, expert: int) -> None:
        """The bytes of a filling slot are complete."""
        slot = self._slot_of[expert]
        assert self._state[slot] == FILLING
        self._state[slot] = READY
        self.filling[expert] = False
        self.ready[expert] = True

    def abort(self, expert: int) -> None:
        """The transfer into a filling slot failed or was cancelled."""
        assert self._state[self._slot_of[expert]] == FILLING
        self.filling[expert] = False
        self._vacate(expert)

    def evict(self, expert: int) -> None:
        slot = self._slot_of[expert]
        assert self._state[slot] == READY and self._pins[slot] == 0, "only idle records are evicted"
        self.ready[expert] = False
        self._vacate(expert)

    def pin(self, expert: int) -> None:
        """Keep a ready record in place until ``release``; pins count."""
        slot = self._slot_of[expert]
        assert self._state[slot] == READY
        self._pins[slot] += 1

    def release(self, expert: int) -> None:
        slot = self._slot_of[expert]
        assert self._pins[slot] > 0
        self._pins[slot] -= 1

    def pin_all(self, experts: NDArray[np.int64]) -> None:
        """``pin`` for several at once, all different."""
        if self._library is None:
            assert False not in self.ready[experts].tolist()
            self._pins[self._slot_of[experts]] += 1
            return
        assert experts.dtype == np.int64
        all_ready = self._library.moespac_pin(self.shelf_address, address(experts), experts.size)
        assert all_ready, "only ready records are pinned"

    def release_all(self, experts: NDArray[np.int64]) -> None:
        """``release`` for several at once, all different."""
        if self._library is None:
            pins = self._pins[self._slot_of[experts]]
            assert 0 not in pins.tolist()
            self._pins[self._slot_of[experts]] = pins - 1
            return
        assert experts.dtype == np.int64
        all_pinned = self._library.moespac_release(self.shelf_address, address(experts), experts.size)
        assert all_pinned, "only pinned records are released"

    def job_is_over(self, experts: NDArray[np.int64], tokens: int, seconds: float, costs: CostModel) -> None:
        """A job of the accelerator's took so long over ``experts``, with so many ``tokens`` together: that is
        learned, and they are released."""
        if self._library is None:
            costs.observe_accelerator(max(1, round(tokens / len(experts))), seconds / len(experts))
            self.release_all(experts)
            return
        assert experts.dtype == np.int64
        all_pinned = self._library.moespac_job_is_over(
            self.shelf_address, address(experts), experts.size, costs.accelerator_curve, tokens, seconds
        )
        assert all_pinned, "only pinned records are released"

    def shrink(self, slots: int, retention: NDArray[np.float64]) -> list[Move]:
        """Go on with the first ``slots`` slots, 1 or more: the least retained records go, and those that stay in a
        slot beyond move to a free one. Nothing is filling or pinned. The bytes are the caller's to move, at once.
        """
        assert 1 <= slots < self.slots
        assert not np.any(self._state == FILLING) and not np.any(self._pins), "nothing is in flight or in use"
        for _ in range(int(np.count_nonzero(self._state == READY)) - slots):
            self.evict(self._victim(retention))
        free = np.flatnonzero(self._state[:slots] == FREE).tolist()
        moves = [
            Move(int(source), target)
            for source, target in zip(
                slots + np.flatnonzero(self._state[slots:] == READY), free, strict=False
            )
        ]
        for source, target in moves:
            expert = self._expert_in[source]
            self._slot_of[expert] = target
            self._expert_in[target], self._state[target] = expert, READY
        self.slots = slots
        self._expert_in = self._expert_in[:slots].copy()
        self._state = self._state[:slots].copy()
        self._pins = self._pins[:slots].copy()
        free_now = np.flatnonzero(self._state == FREE)[::-1]
        self._free[: free_now.size], self._counts[0] = free_now, free_now.size
        shelf = self._shelf
        shelf.slots, shelf.expert_in = slots, address(self._expert_in)
        shelf.state, shelf.pins = address(self._state), address(self._pins)
        return moves

    def check_integrity(self) -> None:
        """Assert every invariant of the bookkeeping."""
        held = np.flatnonzero(self._expert_in != NOWHERE)
        assert np.array_equal(self._slot_of[self._expert_in[held]], held), "slot and expert name each other"
        assert np.count_nonzero(self._slot_of != NOWHERE) == held.size, "no expert has two slots"
        assert sorted(self._free[: self._counts[0]]) == np.flatnonzero(self._state == FREE).tolist(), (
            "the free list is the free slots"
        )
        assert np.array_equal(self._state != FREE, self._expert_in != NOWHERE), (
            "a slot in use names its expert"
        )
        assert self._expert_in.size == self._state.size == self._pins.size == self.slots
        assert not np.any(self._pins[self._state != READY]), "only ready slots are pinned"
        assert np.all(self._pins >= 0)
        for flags, state in ((self.ready, READY), (self.filling, FILLING)):
            expected = np.zeros_like(flags)
            expected[self._expert_in[self._state == state]] = True
            assert np.array_equal(flags, expected), "the flags mirror the slots"
        assert self.peak_slots <= self._most_slots, "the budget is never exceeded"

    def _victim(self, retention: NDArray[np.float64]) -> int:
        if self._library is None or retention.dtype != np.float64:
            return self._victim_in_python(retention)
        return self._library.moespac_victim(self.shelf_address, address(retention))

    def _victim_in_python(self, retention: NDArray[np.float64]) -> int:
        evictable = np.flatnonzero((self._state == READY) & (self._pins == 0))
        if evictable.size == 0:
            return NOWHERE
        experts = self._expert_in[evictable]
        return int(experts[np.argmin(retention[experts])])

    def _vacate(self, expert: int) -> None:
        slot = int(self._slot_of[expert])
        self._slot_of[expert] = NOWHERE
        self._expert_in[slot] = NOWHERE
        self._state[slot] = FREE
        self._free[self._counts[0]] = slot
        self._counts[0] += 1
