"""The tiers together: what is resident where, and what is in flight between them.

storage --read--> host --copy--> accelerator. One thread decides and keeps the books; movers move
bytes. A flight is a filling slot with the ticket of the job that fills it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moespac.config import MemoryConfig
from moespac.policy.base import Policy, TierName, Turns
from moespac.policy.cost import CostModel
from moespac.schedule.at_hand import AtHand
from moespac.schedule.ports import Bell, Mover, Ticket
from moespac.schedule.tiers import Move, Tier
from moespac.types import Capacity, ModelShape, Placement, Plan, Residency

log = logging.getLogger(__name__)

Retention = Callable[[TierName], NDArray[np.float64]]


class LayerRetention:
    """A policy's eviction order while a layer runs (-1: between passes), asked for when a slot is needed."""

    __slots__ = ("_asked", "_layer", "_policy")

    def __init__(self, policy: Policy, layer: int) -> None:
        self._policy = policy
        self._layer = layer
        self._asked: dict[TierName, NDArray[np.float64]] | None = None  # mostly nobody does

    def __call__(self, tier: TierName) -> NDArray[np.float64]:
        asked = self._asked = self._asked or {}
        if tier not in asked:
            asked[tier] = self._policy.retention(tier, self._layer)
        return asked[tier]

    def turns(self, tier: TierName) -> Turns:
        return self._policy.turns(tier, self._layer) or _in_one_piece(self(tier))


def turns(retention: Retention, tier: TierName) -> Turns:
    return retention.turns(tier) if isinstance(retention, LayerRetention) else _in_one_piece(retention(tier))


def _in_one_piece(values: NDArray[np.float64]) -> Turns:
    values = np.ascontiguousarray(values, np.float64)
    return Turns(values, values, 0)


@dataclass
class Flight:
    """One record on its way into a filling slot of ``tier``."""

    tier: Tier
    expert: int
    ticket: Ticket
    demanded: bool  # a layer waits for it: an error is raised there, not only logged
    load: int  # flights of its kind that shared the bandwidth when it took off, itself included


class ExpertMemory:
    """Storage, host and (where present) accelerator tier of one model's experts."""

    def __init__(
        self,
        shape: ModelShape,
        capacity: Capacity,
        reader: Mover,
        link: Mover | None,
        config: MemoryConfig,
        costs: CostModel,
        bell: Bell,
    ) -> None:
        self.shape = shape
        self.reader = reader
        self.link = link
        self.bell = bell
        self.host = Tier("host", capacity.host, shape.record_bytes, shape.total)
        self.accelerator: Tier | None = None
        if capacity.accelerator:
            self.accelerator = Tier("accelerator", capacity.accelerator, shape.record_bytes, shape.total)
        assert (link is None) == (self.accelerator is None)
        self.at_hand = AtHand(self.host, self.accelerator, shape.experts)
        self.bytes_read = {"storage": 0, "link": 0}
        self.link_seconds = 0.0  # in which a copy ran; they run one after the other
        self._config = config
        self._costs = costs
        self._flights: dict[tuple[TierName, int], Flight] = {}
        self._ahead: dict[TierName, deque[int]] = {"host": deque(), "accelerator": deque()}
        self.residency = self._residency()

    # ---- ahead of need -------------------------------------------------------------------------------

    def follow(self, plan: Plan) -> None:
        """Make ``plan`` the prefetches to come; what an earlier plan left undone is forgotten, and of its copies
        those are taken back that nobody has begun."""
        listed = set(plan.accelerator.tolist())
        for (name, expert), flight in list(self._flights.items()):
            stale = name == "accelerator" and expert not in listed and not flight.demanded
            if stale and flight.ticket.cancel():
                del self._flights[name, expert]
                flight.tier.abort(expert)
                self.host.release(expert)
        self._ahead["host"] = deque(plan.host.tolist())
        self._ahead["accelerator"] = deque(plan.accelerator.tolist())

    def pump(self, retention: Retention) -> None:
        """Start prefetches, best first, as far as the queue depth allows. Cheap when there is nothing to do."""
        if self.accelerator is not None and self._ahead["accelerator"]:
            self._pump_accelerator(self.accelerator, retention)
        queue = self._ahead["host"]
        while queue and self._in_flight("host") < self._config.read_ahead:
            expert = queue.popleft()
            if not self._held(self.host, expert):
                self._read(expert, retention, speculative=True)

    def start_layer(self, layer: int, placement: Placement) -> None:
        """The layer's routing is known: prefetches of its other experts are useless now and are dropped, and
        what the placement wants ahead comes before the rest of the plan."""
        experts = self.shape.experts
        end = (layer + 1) * experts
        for name, queue in self._ahead.items():
            if queue:
                self._ahead[name] = deque([e for e in queue if e >= end])
        prefetch = placement.prefetch
        if prefetch.host.size:
            self._ahead["host"].extendleft(prefetch.host[::-1].tolist())
        if prefetch.accelerator.size:
            self._ahead["accelerator"].extendleft(prefetch.accelerator[::-1].tolist())
        if not self._flights:
            return
        wanted = {*placement.host.tolist(), *placement.accelerator.tolist(), *placement.load.tolist()}
        for (name, expert), flight in list(self._flights.items()):
            useless = expert // experts == layer and expert not in wanted and not flight.demanded
            if useless and name == "host" and flight.ticket.cancel():
                del self._flights[name, expert]
                flight.tier.abort(expert)

    # ---- on need -------------------------------------------------------------------------------------

    def demand_host(self, expert: int, retention: Retention) -> bool:
        """Have the expert read into host memory, before all prefetches. False: no slot is free for it yet."""
        flight = self._flights.get(("host", expert))
        if flight is None:
            return self._read(expert, retention, speculative=False)
        if not flight.demanded:
            flight.demanded = True
            flight.ticket.hurry()
        return True

    def demand_accelerator(self, expert: int, retention: Retention) -> bool:
        """Have the expert copied to the accelerator, from storage if need be. False: ask again later."""
        assert self.link is not None
        flight = self._flights.get(("accelerator", expert))
        if flight is not None:
            if not flight.demanded:
                flight.demanded = True
                flight.ticket.hurry()
            return True
        if not self.host.ready[expert]:
            self.demand_host(expert, retention)
            return False
        return self._copy(expert, retention, speculative=False)

    def begin_copies(self, experts: list[int], retention: Retention) -> int:
        """``demand_accelerator`` for experts that are all in host memory, while nothing is in flight; returns how
        many are on their way, the first ones. The others are to be asked for later."""
        assert self.accelerator is not None and not self._flights
        places = self.accelerator.reserve_all(experts, self.host, turns(retention, "accelerator"))
        self.copy_all([(expert, *where) for expert, where in zip(experts, places, strict=False)])
        return len(places)

    def copy_all(self, copies: list[tuple[int, int, int]]) -> None:
        """Experts that a layer waits for, the slot that is reserved for each, and that in host memory, pinned."""
        tier, link = self.accelerator, self.link
        assert tier is not None and link is not None
        for expert, slot, source in copies:
            ticket = link.move(expert, slot, source, speculative=False)
            flight = Flight(tier, expert, ticket, demanded=True, load=1)
            self._flights["accelerator", expert] = flight

    @property
    def flying(self) -> bool:
        """Whether anything is in flight."""
        return bool(self._flights)

    def settle(self) -> list[tuple[TierName, int]]:
        """Enter the completed flights in the books; returns what has become ready.

        Raises the mover's error (StorageError, CheckpointError) when a flight that a layer waits for failed.
        """
        arrived: list[tuple[TierName, int]] = []
        if not self._flights:
            return arrived
        failed: Exception | None = None
        for key, flight in list(self._flights.items()):
            if not flight.ticket.done:
                continue
            del self._flights[key]
            if key[0] == "accelerator":
                self.host.release(flight.expert)
            if flight.ticket.error is None:
                flight.tier.commit(flight.expert)
                self._account(key[0], flight)
                arrived.append(key)
            else:
                flight.tier.abort(flight.expert)
                if flight.demanded:
                    failed = flight.ticket.error
                else:
                    log.info("a prefetch failed: %s", flight.ticket.error)  # whoever needs it will try again
        if failed is not None:
            raise failed
        return arrived

    @property
    def copying(self) -> bool:
        """Whether a copy to the accelerator is running now."""
        return bool(self._flights) and any(
            name == "accelerator" and not flight.ticket.done for (name, _), flight in self._flights.items()
        )

    def quiesce(self) -> None:
        """Wait until nothing is in flight; a failed transfer only leaves its slot empty."""
        while True:
            seen = self.bell.count()
            for flight in self._flights.values():
                flight.demanded = False
            self.settle()
            if not self._flights:
                return
            self.bell.wait_beyond(seen)

    def shrink_accelerator(self, slots: int, retention: Retention, keep: bool) -> list[Move]:
        """Go on with the first ``slots`` slots there, 1 or more, once nothing is in flight.

        ``keep``: the records that are worth most stay, and the bytes follow the returned moves at once, before
        anything else is asked of the memory. Not ``keep``: all slots are empty then. Between passes only: no layer
        runs, so nothing is pinned.
        """
        tier = self.accelerator
        assert tier is not None
        self._ahead["accelerator"].clear()
        self.quiesce()
        if not keep:
            for expert in np.flatnonzero(tier.ready).tolist():
                tier.evict(expert)
        moves = tier.shrink(slots, retention("accelerator"))
        self.residency = self._residency()
        return moves

    def begin_anew(self, costs: CostModel) -> None:
        """Empty the accelerator, forget what was to be fetched, and report what transfers take to ``costs``."""
        self.quiesce()
        self._costs = costs
        for queue in self._ahead.values():
            queue.clear()
        if self.accelerator is not None:
            for expert in np.flatnonzero(self.accelerator.ready).tolist():
                self.accelerator.evict(expert)

    def close(self) -> None:
        """Stop all movers. The memory is not usable afterwards."""
        self.reader.close()
        if self.link is not None:
            self.link.close()

    @property
    def tiers(self) -> list[Tier]:
        """The fast tiers that exist."""
        return [self.host] if self.accelerator is None else [self.host, self.accelerator]

    @property
    def all_at_hand(self) -> bool:
        """Whether the fastest tier has every expert: nothing is left to decide, or to learn for deciding."""
        fastest = self.tiers[-1]
        return fastest.slots == self.shape.total and bool(fastest.ready.all())

    @property
    def moves(self) -> bool:
        """Whether anything is in flight, or is to be."""
        return bool(self._flights or any(self._ahead.values()))

    def check_integrity(self) -> None:
        """Assert that the books of all tiers and of the flights agree."""
        for tier in self.tiers:
            tier.check_integrity()
            flying = {expert for name, expert in self._flights if name == tier.name}
            assert flying == set(np.flatnonzero(tier.filling).tolist()), (
                "a filling slot has exactly one flight"
            )

    # ---- within --------------------------------------------------------------------------------------

    def _read(self, expert: int, retention: Retention, speculative: bool) -> bool:
        if not self._reserve(self.host, expert, retention, speculative):
            return False
        load = min(self._in_flight("host") + 1, self.reader.sharing)
        ticket = self.reader.move(expert, self.host.slot(expert), None, speculative)
        self._flights["host", expert] = Flight(self.host, expert, ticket, not speculative, load)
        return True

    def _copy(self, expert: int, retention: Retention, speculative: bool) -> bool:
        assert self.accelerator is not None and self.link is not None
        if not self._reserve(self.accelerator, expert, retention, speculative):
            return False
        self.host.pin(expert)
        slot, source = self.accelerator.slot(expert), self.host.slot(expert)
        ticket = self.link.move(expert, slot, source, speculative)
        flight = Flight(self.accelerator, expert, ticket, demanded=not speculative, load=1)
        self._flights["accelerator", expert] = flight
        return True

    def _pump_accelerator(self, tier: Tier, retention: Retention) -> None:
        """Copies whose record is in host memory start now; for the others the read comes first."""
        queue = self._ahead["accelerator"]
        later: list[int] = []
        while queue and self._in_flight("accelerator") < self._config.queue_depth:
            expert = queue.popleft()
            if self._held(tier, expert):
                continue
            if self.host.ready[expert]:
                self._copy(expert, retention, speculative=True)
            elif self.host.filling[expert] or (
                self._in_flight("host") < self._config.read_ahead
                and self._read(expert, retention, speculative=True)
            ):
                later.append(expert)
            if len(later) >= self._config.queue_depth:
                break
        queue.extendleft(reversed(later))

    def _reserve(self, tier: Tier, expert: int, retention: Retention, speculative: bool) -> bool:
        values = retention(tier.name)
        return tier.reserve(expert, values, worth=values[expert] if speculative else None)

    def _held(self, tier: Tier, expert: int) -> bool:
        return bool(tier.ready[expert] or tier.filling[expert])

    def _in_flight(self, name: TierName) -> int:
        return sum(1 for tier, _ in self._flights if tier == name)

    def _account(self, name: TierName, flight: Flight) -> None:
        if name == "host":
            self.bytes_read["storage"] += flight.tier.record_bytes
            self._costs.observe_storage(flight.ticket.seconds / flight.load)
        else:
            self.bytes_read["link"] += flight.tier.record_bytes
            self.link_seconds += flight.ticket.seconds
            self._costs.observe_link(flight.ticket.seconds)

    def _residency(self) -> Residency:
        """Live views: the arrays change under the policy's eyes, the object stays."""
        grid = (self.shape.layers, self.shape.experts)
        none = np.zeros(grid, dtype=bool)
        tier = self.accelerator
        return Residency(
            host=self.host.ready.reshape(grid),
            accelerator=tier.ready.reshape(grid) if tier else none,
            arriving_host=self.host.filling.reshape(grid),
            arriving_accelerator=tier.filling.reshape(grid) if tier else none,
            capacity=Capacity(self.host.slots, tier.slots if tier else 0),
        )
