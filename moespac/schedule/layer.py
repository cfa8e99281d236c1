"""One layer's experts: place -> fetch what is missing, compute what is there, on both devices at once -> JOIN.

The event loop of ``LayerRun`` is the asynchronous execution engine of the paper (section 3). Where all that is
needed is at hand there is nothing to wait for, and it comes down to one turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moespac.policy.base import TierName
from moespac.policy.cost import CostModel, Seconds
from moespac.schedule.at_hand import NOTHING, Hits, Share, Taken
from moespac.schedule.jobs import Jobs
from moespac.schedule.memory import ExpertMemory, Retention, turns
from moespac.schedule.ports import Devices
from moespac.schedule.stats import PassClock
from moespac.schedule.tiers import Tier
from moespac.timeline import expert_names
from moespac.types import Placement


@dataclass
class Side:
    """The experts that one device needs in this layer, from missing over flying to ready (and pinned)."""

    tier: Tier
    needed: NDArray[np.int64]
    missing: list[int] = field(default_factory=list)
    flying: set[int] = field(default_factory=set)
    ready: list[int] = field(default_factory=list)

    def sort_out(self) -> None:
        """What is resident already is pinned, so that fetching the rest cannot evict it."""
        if not self.needed.size:
            return
        self.ready, self.missing = self.tier.sort_out(self.needed)

    def arrived(self, expert: int) -> None:
        if expert in self.flying:
            self.flying.remove(expert)
            self._take(expert)

    def fetch(
        self,
        demand: Callable[[int, Retention], bool],
        retention: Retention,
        near: NDArray[np.bool_] | None = None,
    ) -> None:
        """Ask for what is missing, in order, as far as there are slots; what is ``near`` first.

        A record that was read for its copy to the accelerator must be copied before the reads for others may
        evict it, or small memories would read for ever.
        """
        if not self.missing:
            return
        waiting, self.missing = self.missing, []
        if near is not None:
            waiting.sort(key=lambda expert: not near[expert])
        for expert in waiting:
            if self.tier.ready[expert]:  # read for the other device in the meantime
                self._take(expert)
            elif demand(expert, retention):
                self.flying.add(expert)
            else:
                self.missing.append(expert)

    def _take(self, expert: int) -> None:
        self.tier.pin(expert)
        self.ready.append(expert)

    @property
    def outstanding(self) -> bool:
        return bool(self.missing or self.flying or self.ready)


class LayerRun:
    """The execution of one layer's experts in one pass.

    ``counts`` (experts,) tokens of each; ``first_id`` is the flat id of the layer's expert 0.
    """

    def __init__(
        self,
        memory: ExpertMemory,
        devices: Devices,
        costs: CostModel,
        clock: PassClock,
        jobs: Jobs,
        counts: NDArray[np.int64],
        first_id: int,
    ) -> None:
        self._memory = memory
        self._devices = devices
        self._jobs = jobs
        self._costs = costs
        self._clock = clock
        self._counts = counts
        self._first_id = first_id
        self._loaded_only: set[int] = set()

    def execute(self, placement: Placement, retention: Retention) -> Hits:
        """Have every active expert computed where it is placed; returns how many were there.

        Raises StorageError or CheckpointError when an expert cannot be had; nothing stays pinned then.
        """
        taken = self._memory.at_hand.take(placement, self._counts, self._first_id)
        return self.execute_taken(placement, taken, retention)

    def execute_taken(self, placement: Placement, taken: Taken, retention: Retention) -> Hits:
        """``execute`` of what has been taken already, as far as it could be."""
        hits, host, accelerator = taken
        if host is None or accelerator is None:
            self._fetch_and_compute(placement, hits, retention)
        else:
            self._compute(host, accelerator, retention)
        if not self._devices.in_order and self._jobs.in_flight:
            with self._clock.measure("wait_for_accelerator"):
                self._jobs.finish()
        self._jobs.check()
        return hits

    # ---- all is at hand --------------------------------------------------------------------------------

    def _compute(self, host: Share, accelerator: Share, retention: Retention) -> None:
        """What the loop of ``_run`` comes to then. The shares are pinned, and not when this returns or raises."""
        memory, jobs = self._memory, self._jobs
        try:
            memory.settle()
            jobs.reap()
            if accelerator.experts.size:
                self._launch_job(accelerator.experts, accelerator.slots, accelerator.total)
                accelerator = NOTHING  # its pins now belong to the job
            memory.pump(retention)
            if host.experts.size:
                self._compute_share(host)
                host = NOTHING
                memory.settle()
                jobs.reap()
                memory.pump(retention)
        except BaseException:
            jobs.finish()
            raise
        finally:
            if host.experts.size:
                memory.host.release_all(host.experts)
            if accelerator.experts.size and memory.accelerator is not None:
                memory.accelerator.release_all(accelerator.experts)

    def _compute_share(self, share: Share) -> None:
        """The host's; it is released."""
        copying = self._memory.copying
        seconds = self._run_on_host(share.experts, share.slots)
        if copying:
            self._learn(share.experts, seconds, copying)
            self._memory.host.release_all(share.experts)
        else:
            self._memory.at_hand.computed(share, seconds, self._costs)

    # ---- something is missing --------------------------------------------------------------------------

    def _fetch_and_compute(self, placement: Placement, hits: Hits, retention: Retention) -> None:
        host = Side(self._memory.host, placement.host)
        sides: dict[TierName, Side] = {"host": host}
        device = None
        if self._memory.accelerator is not None:
            needed = placement.accelerator
            if placement.load.size:
                loaded_only = np.setdiff1d(placement.load, placement.accelerator)
                self._loaded_only = set(loaded_only.tolist())
                needed = np.concatenate([needed, loaded_only])
            device = Side(self._memory.accelerator, needed)
            sides["accelerator"] = device
        else:
            assert placement.accelerator.size == 0, "no accelerator to compute on"
        try:
            copies = hits.host == placement.host.size and hits.accelerator < placement.accelerator.size
            if not (copies and device and self._copy_and_compute(placement, host, device, retention)):
                for side in sides.values():
                    side.sort_out()
            self._run(sides, host, device, retention)
        except BaseException:
            self._jobs.finish()
            raise
        finally:
            for side in sides.values():
                if side.ready:
                    side.tier.release_all(np.array(side.ready))

    def _copy_and_compute(self, placement: Placement, host: Side, device: Side, retention: Retention) -> bool:
        """The first turn of ``_run``, in few native calls, where nothing is in flight and all that is missing are
        copies. False: that is not so, and nothing was done."""
        memory = self._memory
        if memory.flying or placement.load.size:
            return False
        self._jobs.reap()
        worth = turns(retention, "accelerator")
        found = memory.at_hand.take_and_reserve(placement, self._counts, self._first_id, worth)
        if found is None:
            return False
        mine, its, copies, device.missing = found
        host.ready, device.ready = mine.experts.tolist(), its.experts.tolist()
        device.flying = {expert for expert, _, _ in copies}
        memory.copy_all(copies)
        if device.ready:
            device.ready = []  # their pins now belong to the job
            self._launch_job(its.experts, its.slots, its.total)
        if not device.missing:
            memory.pump(retention)
        if host.ready:
            self._compute_share(mine)
            host.ready = []
        return True

    def _run(
        self, sides: dict[TierName, Side], host: Side, device: Side | None, retention: Retention
    ) -> None:
        while True:
            seen = self._memory.bell.count()
            for name, expert in self._memory.settle():
                sides[name].arrived(expert)
            self._jobs.reap()
            released = False
            if device is not None:
                if device.missing and not self._memory.flying:
                    self._begin_copies(device, retention)
                device.fetch(self._memory.demand_accelerator, retention, near=self._memory.host.ready)
                released = self._launch(device)
            host.fetch(self._memory.demand_host, retention)
            if not host.missing and not (device and device.missing):
                self._memory.pump(retention)  # nobody here waits for a slot: prefetch while computing
            if host.ready:
                self._compute_on_host(host)
            elif released and device is not None and device.missing:
                continue  # there are slots for what is missing now
            elif host.outstanding or (device is not None and device.outstanding):
                with self._clock.measure("wait_for_experts"):
                    self._memory.bell.wait_beyond(seen)
            else:
                return

    def _begin_copies(self, side: Side, retention: Retention) -> None:
        """What ``fetch`` does first, of all that are in host memory at once."""
        near, landed = self._memory.host.ready, side.tier.ready
        there = [expert for expert in side.missing if near[expert] and not landed[expert]]
        if there:
            begun = there[: self._memory.begin_copies(there, retention)]
            side.flying.update(begun)
            side.missing = [expert for expert in side.missing if expert not in side.flying]

    def _compute_on_host(self, side: Side) -> None:
        """All that are ready; but while others wait for a slot, only as many as run at once, to release theirs."""
        most = self._devices.host_threads if side.missing else len(side.ready)
        experts = np.array(side.ready[:most])
        copying = self._memory.copying
        seconds = self._run_on_host(experts, side.tier.slots_of[experts])
        self._learn(experts, seconds, copying)
        del side.ready[:most]
        side.tier.release_all(experts)

    def _launch(self, side: Side) -> bool:
        """Hand all experts that are ready on the accelerator to it, as one job. True when that released slots."""
        if not side.ready:
            return False
        released = False
        if self._loaded_only:
            for expert in self._loaded_only.intersection(side.ready):
                side.tier.release(expert)
                side.ready.remove(expert)
                released = True
        if side.ready:
            experts = np.array(side.ready)
            side.ready = []  # their pins now belong to the job
            self._launch_job(experts, *side.tier.look_up(experts, self._counts, self._first_id))
        return released

    # ---- either way ------------------------------------------------------------------------------------

    def _run_on_host(self, experts: NDArray[np.int64], slots: NDArray[np.int64]) -> Seconds:
        """What each took."""
        with self._clock.measure("host_experts", self._names(experts)):
            return self._devices.compute_on_host(experts, slots)

    def _learn(self, experts: NDArray[np.int64], seconds: Seconds, copying: bool) -> None:
        """``copying``: whether a copy ran when they began."""
        if not copying:
            self._costs.observe_host_experts(self._tokens(experts), seconds)
        elif self._memory.copying:
            self._costs.observe_host_experts_beside_copy(self._tokens(experts), seconds)

    def _launch_job(self, experts: NDArray[np.int64], slots: NDArray[np.int64], tokens: int) -> None:
        assert self._memory.accelerator is not None
        ticket = self._devices.compute_on_accelerator(experts, slots, self._names(experts) or "")
        self._jobs.add(ticket, self._memory.accelerator, experts, tokens, self._costs)

    def _tokens(self, experts: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._counts[experts - self._first_id]

    def _names(self, experts: NDArray[np.int64]) -> str | None:
        """For a timeline, if one is kept."""
        if self._clock.tape.record is None:
            return None
        return expert_names(experts.tolist(), len(self._counts))
