"""The tiers together: what is resident where, and what is in flight between them.

storage --read--> host --copy--> accelerator. The decode thread decides and keeps the books; workers move
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
from moespac.errors import StorageError
from moespac.experts.accelerator import Accelerator
from moespac.experts.store import ExpertStore
from moespac.experts.tiers import Tier, host_arena
from moespac.experts.workers import Bell, Priority, Ticket, Workers
from moespac.policy.base import TierName
from moespac.policy.cost import CostModel
from moespac.types import Capacity, Ids, Plan, Residency

log = logging.getLogger(__name__)

Retention = Callable[[TierName], NDArray[np.float64]]


@dataclass
class Flight:
    """One record on its way into a filling slot of ``tier``."""

    tier: Tier
    expert: int
    ticket: Ticket
    demanded: bool  # a layer waits for it: an error is raised there, not only logged
    load: int  # flights of its kind at once when it took off, itself included: they share the bandwidth


class ExpertMemory:
    """Storage, host and (where present) accelerator tier of one model's experts."""

    def __init__(
        self,
        store: ExpertStore,
        host_slots: int,
        accelerator: Accelerator | None,
        config: MemoryConfig,
        costs: CostModel,
        bell: Bell,
    ) -> None:
        self.store = store
        self.accelerator = accelerator
        self.bell = bell
        self.host = Tier("host", host_arena(host_slots, store.layout.nbytes), store.shape.total)
        self.bytes_read = {"storage": 0, "link": 0}
        self._config = config
        self._costs = costs
        self._readers = Workers("reader", config.readers if config.asynchronous else 0, bell)
        self._flights: dict[tuple[TierName, int], Flight] = {}
        self._ahead: dict[TierName, deque[int]] = {"host": deque(), "accelerator": deque()}
        self.residency = self._residency()

    # ---- ahead of need -------------------------------------------------------------------------------

    def follow(self, plan: Plan) -> None:
        """Make ``plan`` the prefetches to come; what an earlier plan left undone is forgotten."""
        self._ahead["host"] = deque(plan.host.tolist())
        self._ahead["accelerator"] = deque(plan.accelerator.tolist())

    def pump(self, retention: Retention) -> None:
        """Start prefetches, best first, as far as the queue depth allows. Cheap when there is nothing to do."""
        if self.accelerator is not None:
            self._pump_accelerator(self.accelerator.tier, retention)
        queue = self._ahead["host"]
        while queue and self._in_flight("host") < self._config.queue_depth:
            expert = queue.popleft()
            if not self._held(self.host, expert):
                self._read(expert, retention, speculative=True)

    def start_layer(self, layer: int, active: Ids) -> None:
        """The layer's routing is known: prefetches of its other experts are useless now and are dropped."""
        experts = self.store.shape.experts
        wanted = set(active.tolist())
        for name, queue in self._ahead.items():
            if queue:
                self._ahead[name] = deque(e for e in queue if e // experts > layer)
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
            self._readers.hurry(flight.ticket)
        return True

    def demand_accelerator(self, expert: int, retention: Retention) -> bool:
        """Have the expert copied to the accelerator, from storage if need be. False: ask again later."""
        assert self.accelerator is not None
        flight = self._flights.get(("accelerator", expert))
        if flight is not None:
            flight.demanded = True
            return True
        if not self.host.ready[expert]:
            self.demand_host(expert, retention)
            return False
        return self._copy(self.accelerator, expert, retention, speculative=False)

    def settle(self) -> list[tuple[TierName, int]]:
        """Enter the completed flights in the books; returns what has become ready.

        Raises StorageError or CheckpointError when a flight that a layer waits for failed.
        """
        arrived: list[tuple[TierName, int]] = []
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
                log.warning("expert %d: %s", flight.expert, flight.ticket.error)
                failed = flight.ticket.error if flight.demanded else failed
        if failed is not None:
            raise failed
        return arrived

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

    def close(self) -> None:
        """Stop all threads. The memory is not usable afterwards."""
        self._readers.close()
        if self.accelerator is not None:
            self.accelerator.close()
        self.store.close()

    def check_integrity(self) -> None:
        """Assert that the books of all tiers and of the flights agree."""
        tiers = [self.host] + ([self.accelerator.tier] if self.accelerator is not None else [])
        for tier in tiers:
            tier.check_integrity()
            flying = {expert for name, expert in self._flights if name == tier.name}
            assert flying == set(np.flatnonzero(tier.filling).tolist()), (
                "a filling slot has exactly one flight"
            )

    # ---- within --------------------------------------------------------------------------------------

    def _read(self, expert: int, retention: Retention, speculative: bool) -> bool:
        if not self._reserve(self.host, expert, retention, speculative):
            return False
        buffer = self.host.record(expert).numpy()
        priority = Priority.SPECULATIVE if speculative else Priority.DEMAND
        load = min(self._in_flight("host") + 1, self._config.readers)
        ticket = self._readers.submit(lambda: self._read_with_retries(expert, buffer), priority)
        self._flights["host", expert] = Flight(self.host, expert, ticket, not speculative, load)
        return True

    def _read_with_retries(self, expert: int, buffer: NDArray[np.uint8]) -> None:
        for attempts_left in range(self._config.read_retries, -1, -1):
            try:
                self.store.read_into(expert, buffer)
                return
            except OSError as error:
                if attempts_left == 0:
                    layer, number = divmod(expert, self.store.shape.experts)
                    raise StorageError(
                        f"reading expert {number} of MoE layer {layer} failed {self._config.read_retries + 1} "
                        f"times ({error}); check the disk, then try again"
                    ) from error

    def _copy(self, accelerator: Accelerator, expert: int, retention: Retention, speculative: bool) -> bool:
        if not self._reserve(accelerator.tier, expert, retention, speculative):
            return False
        self.host.pin(expert)
        ticket = accelerator.copy_in(self.host.record(expert), accelerator.tier.record(expert))
        self._flights["accelerator", expert] = Flight(accelerator.tier, expert, ticket, not speculative, 1)
        return True

    def _pump_accelerator(self, tier: Tier, retention: Retention) -> None:
        """Copies whose record is in host memory start now; for the others the read comes first."""
        assert self.accelerator is not None
        queue = self._ahead["accelerator"]
        later: list[int] = []
        while queue and self._in_flight("accelerator") < self._config.queue_depth:
            expert = queue.popleft()
            if self._held(tier, expert):
                continue
            if self.host.ready[expert]:
                self._copy(self.accelerator, expert, retention, speculative=True)
            elif self.host.filling[expert] or (
                self._in_flight("host") < self._config.queue_depth
                and self._read(expert, retention, speculative=True)
            ):
                later.append(expert)
            if len(later) >= self._config.queue_depth:
                break
        queue.extendleft(reversed(later))

    def _reserve(self, tier: Tier, expert: int, retention: Retention, speculative: bool) -> bool:
        values = retention(tier.name)
        return tier.reserve(expert, values, worth=values[expert] if speculative else np.inf)

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
            self._costs.observe_link(flight.ticket.seconds)

    def _residency(self) -> Residency:
        """Live views: the arrays change under the policy's eyes, the object stays."""
        grid = (self.store.shape.layers, self.store.shape.experts)
        none = np.zeros(grid, dtype=bool)
        tier = self.accelerator.tier if self.accelerator is not None else None
        return Residency(
            host=self.host.ready.reshape(grid),
            accelerator=tier.ready.reshape(grid) if tier else none,
            arriving_host=self.host.filling.reshape(grid),
            arriving_accelerator=tier.filling.reshape(grid) if tier else none,
            capacity=Capacity(self.host.slots, tier.slots if tier else 0),
        )
