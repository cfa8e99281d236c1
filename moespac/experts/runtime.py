"""The experts of all layers at run time: what transformers calls, and the two moments of decision around it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moespac.experts.desk import Desks
from moespac.experts.devices import Computers, LayerTensors
from moespac.experts.groups import Groups
from moespac.experts.kernels.foresight import NativeForesight
from moespac.experts.kernels.library import address
from moespac.experts.kernels.passes import Computed, HostExperts, PassOrder
from moespac.experts.resident import ResidentExperts
from moespac.experts.store import ExpertStore
from moespac.model.routers import ask_router
from moespac.policy.base import PassRetention, Policy, Sensor
from moespac.policy.cost import TABLE, MeasuredCosts
from moespac.policy.foresight import Foresight
from moespac.policy.windows import NOTHING, LookedBack, WindowCosts
from moespac.schedule.at_hand import Hits, Taken
from moespac.schedule.jobs import Jobs
from moespac.schedule.layer import LayerRun
from moespac.schedule.memory import ExpertMemory, LayerRetention, Retention
from moespac.schedule.native import NativeMemory
from moespac.schedule.stats import ExpertStats, PassClock, TierStats
from moespac.timeline import expert_names
from moespac.types import NO_IDS, Observation, Placement, Window

UNKNOWN_TOKEN = -1  # in a pass that stock generate() runs, the runtime does not see the token ids


class _Kept(NamedTuple):
    """The routing of all layers of a pass, in one piece."""

    tokens: int
    routing: list[NDArray[np.int64]]  # (tokens, k) each
    address: int
    stride: int  # bytes from one to the next


class ExpertRuntime:
    """Runs the experts of a pass under a policy.

    The engine brackets a pass with ``begin_pass`` and ``end_pass``. Without them (stock ``model.generate``) a
    pass begins at the first layer and ends at the last, and all its tokens count as accepted.
    """

    def __init__(
        self,
        store: ExpertStore,
        memory: ExpertMemory,
        policy: Policy,
        computers: Computers,
        routers: Sequence[nn.Module | None],
        clock: PassClock,
        costs: MeasuredCosts | None = None,
    ) -> None:
        """``routers`` are the layers' own (None: not to be found). ``costs``: what further policies start from."""
        self.store = store
        self.memory = memory
        self.policy = policy
        self.clock = clock
        self.stats = ExpertStats()
        self.recorder: Callable[[Observation], None] | None = None  # sees what the policy sees
        self.windows: WindowCosts | None = None  # looks back on passes, where a governor wants to know
        self._computers = computers
        self._costs = costs
        self._routers = routers
        self._asks_next_gate = Sensor.NEXT_GATE in policy.sensors
        self._shape = store.shape
        self._desks = Desks(self._shape.top_k, self._shape.experts)
        self._window: Window | None = None
        self._routing: list[NDArray[np.int64]] = []  # of the layers that have run in this pass, (T, k) each
        self._kept: _Kept | None = None  # where that of the pass that runs is kept
        self._weights: list[NDArray[np.float32]] = []  # the router's weights beside them, for the recorder
        self._jobs = Jobs(memory.bell, clock)
        self._resident: ResidentExperts | None = None
        self._foresight: NativeForesight | None = None
        self._host_experts: HostExperts | None = None
        if computers.kernel is not None:
            grid = (store.shape.layers, store.shape.experts)
            where, ready = memory.host.slots_of.reshape(grid), memory.host.ready.reshape(grid)
            books = memory.address if isinstance(memory, NativeMemory) else None
            self._host_experts = HostExperts(computers.kernel, computers.host, where, ready, books)

    @property
    def latest_routing(self) -> list[NDArray[np.int64]]:
        """What the latest pass, or the one that runs, was routed to: (T, k) experts, a layer each; for show."""
        return self._routing

    def plan(self, window: Window) -> None:
        """Decide what to fetch ahead of the pass that will run ``window``, and start fetching it."""
        if self.memory.all_at_hand:
            return
        with self.clock.measure("decide"):
            self.memory.settle()
            self.memory.follow(self.policy.plan(window, self.memory.residency))
            self.memory.pump(self._retention(-1))
            self.policy.learn()

    def begin_pass(self, window: Window) -> None:
        self._window = window
        self._forget_pass()
        if self.windows is not None and not self.memory.all_at_hand:
            self.windows.begin(window, self.memory.residency)

    def look_back(self) -> LookedBack:
        """About the pass that ended last."""
        if self.windows is None or self.memory.all_at_hand:
            return NOTHING
        return self.windows.latest()

    def end_pass(self, accepted: int) -> None:
        """The pass is verified: the policy learns what it showed."""
        assert self._window is not None
        window, self._window = self._window, None
        with self.clock.measure("decide"):
            self._observe(window, accepted)
        self.stats.passes += 1

    def abandon_pass(self) -> None:
        """The pass failed or was interrupted: forget it, and let what is in flight land."""
        self._window = None
        self._forget_pass()
        if self.windows is not None:
            self.windows.reset()
        self._jobs.abandon()
        self.memory.quiesce()

    def shrink_accelerator(self, share: float) -> int:
        """Between passes: give back ``share`` of the accelerator's slots, all but one at most; returns how many."""
        tier, accelerator = self.memory.accelerator, self._computers.accelerator
        assert tier is not None and accelerator is not None
        slots = max(1, min(tier.slots - 1, int(tier.slots * (1 - share))))
        given = tier.slots - slots
        self._jobs.finish()
        if given:
            moves = self.memory.shrink_accelerator(slots, self._retention(-1), accelerator.keeps)
            accelerator.shrink(slots, moves)
            self.policy.resize(self.memory.residency.capacity)
            self.stats.shrinks += 1
        return given

    @property
    def page_locked(self) -> float | None:
        """Share of the host's slots that are copied at the link's full speed; None: there is no such difference."""
        accelerator = self._computers.accelerator
        return None if accelerator is None else accelerator.page_locked

    def resident(self) -> ResidentExperts | None:
        """All experts as work of the accelerator's own, while it has every one of them, and kernels for it."""
        accelerator, kernels = self._computers.accelerator, self._computers.job_kernels
        tier = self.memory.accelerator
        if accelerator is None or kernels is None or tier is None or not self.memory.all_at_hand:
            self._resident = None
        elif self._resident is None:  # none of them leaves its slot any more: there is one for each
            by_layer = tier.slots_of.reshape(self._shape.layers, self._shape.experts).copy()
            self._resident = ResidentExperts(kernels, lambda: accelerator.arena, by_layer, self._ran_resident)
        return self._resident

    def adopt(self, policy: Policy) -> None:
        """Go on under another policy, with an empty accelerator: what is there it did not choose. Between requests
        only."""
        if self._costs is not None:
            policy.costs.start_from(self._costs)
        self._jobs.finish()
        self.memory.begin_anew(policy.costs)
        self.policy = policy
        self._asks_next_gate = Sensor.NEXT_GATE in policy.sensors
        self.stats = ExpertStats()

    def close(self) -> None:
        """Stop all threads and free the tiers."""
        self._jobs.finish()
        self.memory.close()

    def pump(self) -> None:
        """Between drafted tokens: keep the transfers going."""
        self.memory.settle()
        self.memory.pump(self._retention(-1))

    # ---- layers that have nothing to ask ---------------------------------------------------------------

    def in_host_memory(self, order: PassOrder | None) -> HostExperts | None:
        """Where experts are that a layer may use without asking; None while the policy wants to see each layer: it
        has no ``order`` for the pass, and does not let hits pass."""
        if self.memory.accelerator is not None:
            return None
        unseen = self.policy.lets_hits_pass and not self._asks_next_gate
        return self._host_experts if unseen or self.memory.all_at_hand or order is not None else None

    def pass_order(self) -> PassOrder | None:
        """What makes way for experts that a layer misses, so that it need not ask; None where it must."""
        if not isinstance(self.memory, NativeMemory) or self.memory.all_at_hand:
            return None
        retention = self.policy.pass_retention()
        if retention is None:
            return None
        foresight = retention.foresight if isinstance(retention, PassRetention) else None
        return PassOrder(retention, self._native_foresight(foresight))

    def _native_foresight(self, known: Foresight | None) -> NativeForesight | None:
        """One for all passes under a policy."""
        if known is None:
            return None
        if self._foresight is None or self._foresight.known is not known:
            self._foresight = NativeForesight(known, self._shape)
        return self._foresight

    @property
    def layers_in_peace(self) -> int | None:
        """So many may run before transfers must be looked after; None: there are none, or the library does it."""
        return 1 if self.memory.moves and not isinstance(self.memory, NativeMemory) else None

    def advanced(self, computed: Computed | None, began: float) -> None:
        """A call that began then on the clock ran these layers without asking. Raises what their reads raised."""
        if computed is not None:
            self._account(computed, began)
        if isinstance(self.memory, NativeMemory):
            self.memory.settle()
        elif computed is not None and self.memory.moves:
            with self.clock.measure("decide"):
                self._look_after_transfers(len(self._routing) - 1)

    def _account(self, computed: Computed, began: float) -> None:
        """For their routing, their time, and what they found."""
        if not self.memory.all_at_hand:
            self.policy.ran(len(self._routing), computed.index)
        self._routing.extend(computed.index)
        if self.recorder is not None:
            self._weights.extend(computed.shares)
        self._account_time(computed.slices, began)
        active, hits, seconds, tokens = computed.spans.T
        if not self._prefills:
            self.stats.host.count(int(hits.sum()), int(active.sum()))
        if not self.memory.all_at_hand:
            self.policy.costs.observe_host_experts(tokens.astype(np.int64), seconds)

    def _account_time(self, slices: NDArray[np.float64], began: float) -> None:
        """One by one where somebody looks on; or else all that belong to a cause at once."""
        causes = ("host_experts", "wait_for_experts")
        if self.clock.tape.record is not None:
            for layer, waiting, start, seconds in slices.tolist():
                name = None if waiting else self._names(int(layer))
                self.clock.was_spent_on(causes[int(waiting)], began + start, seconds, name)
            return
        waited = float(slices[:, 3] @ slices[:, 1])
        start = began + float(slices[0, 2])
        for cause, seconds in zip(causes, (float(slices[:, 3].sum()) - waited, waited), strict=True):
            self.clock.was_spent_on(cause, start, seconds)
            start += seconds

    def _look_after_transfers(self, layer: int) -> None:
        """As often as a layer that asks does, before and after it computes."""
        retention = self._retention(layer)
        self.memory.start_layer(layer, Placement(NO_IDS))
        for _ in range(2):
            self.memory.settle()
            self.memory.pump(retention)

    def _names(self, layer: int) -> str:
        """Of the experts that ``layer`` was routed to, for a timeline."""
        experts = np.unique(self._routing[layer]) + layer * self._shape.experts
        return expert_names(experts.tolist(), self._shape.experts)

    # ---- layers that ask -------------------------------------------------------------------------------

    def forward(
        self,
        layer: int,
        norm: nn.Module | None,
        x: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        into: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The experts block of MoE layer ``layer``: x (T, hidden), index and weights (T, k) -> (T, hidden). In
        ``into`` if that is given and can be."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.forward(layer, norm, x, index, weights, into)
        tokens, unattended = index.shape[0], self._window is None
        if unattended and layer == 0:
            self._forget_pass()
        desk = self._desks.of(tokens)
        groups = desk.groups
        groups.fill(index, *self._routed(layer, tokens))
        if self.recorder is not None:
            self._weights.append(weights.float().cpu().numpy())
        first_id = layer * self._shape.experts
        tensors = LayerTensors(self._computers, norm, groups, first_id, x, self.clock.now, desk)
        costs, clock = self.policy.costs, self.clock
        run = LayerRun(self.memory, tensors, costs, clock, self._jobs, groups.counts, first_id)
        retention = self._retention(layer)
        with clock.measure("decide"):
            if self._asks_next_gate:
                self._foresee(layer + 1, x)
            placement, taken = self._placed(layer, groups, first_id)
        run.execute_taken(placement, taken, retention)  # which lets go of it
        self._count_hits(placement, taken.hits)
        if unattended and layer == self._shape.layers - 1:
            self._end_unattended_pass(tokens)
        return tensors.join(weights, into)

    def _placed(self, layer: int, groups: Groups, first_id: int) -> tuple[Placement, Taken]:
        """Who computes what, and that taken: in one native call where nothing moves."""
        memory, counts = self.memory, groups.counts
        if groups.tokens < TABLE and not memory.moves:
            places = self.policy.places(layer, memory.residency)
            if places is not None:
                return memory.at_hand.place_and_take(places, counts, first_id)
        placement = self.policy.placement(layer, counts, memory.residency)
        memory.start_layer(layer, placement)
        return placement, memory.at_hand.take(placement, counts, first_id)

    def _routed(self, layer: int, tokens: int) -> tuple[NDArray[np.int64], int]:
        """(T, k) where the routing of a layer of this pass is kept, and its address."""
        kept = self._kept
        if kept is None or kept.tokens != tokens:
            numbers = np.empty((self._shape.layers, tokens, self._shape.top_k), np.int64)
            kept = self._kept = _Kept(tokens, list(numbers), address(numbers), numbers.strides[0])
        routing = kept.routing[layer]
        self._routing.append(routing)
        return routing, kept.address + layer * kept.stride

    def _forget_pass(self) -> None:
        self._routing, self._weights, self._kept = [], [], None

    def _foresee(self, layer: int, x: torch.Tensor) -> None:
        """Tell the policy what the gate of ``layer`` says to the hidden states of the layer before it."""
        router = self._routers[layer] if layer < self._shape.layers else None
        guess = ask_router(router, x) if router is not None else None
        if guess is not None:
            self.policy.foresee_layer(layer, Groups.of(guess.cpu().numpy(), self._shape.experts).counts)

    def _end_unattended_pass(self, tokens: int) -> None:
        if len(self._routing) == self._shape.layers:
            self._observe(Window(np.full(tokens, UNKNOWN_TOKEN, dtype=np.int64)), accepted=0)

    def _observe(self, window: Window, accepted: int) -> None:
        idle = self.memory.all_at_hand
        if idle and self.recorder is None:
            return
        weights = np.stack(self._weights) if self._weights else None
        observation = Observation(window, np.stack(self._routing), accepted, weights)
        if not idle:
            self.policy.observe(observation)
            if self.windows is not None:
                self.windows.observe(observation)
        if self.recorder is not None:
            self.recorder(observation)

    def _ran_resident(self, routing: NDArray[np.int64], weights: NDArray[np.float32]) -> None:
        """A pass of ``resident`` is over: routing and weights (layers, T, k)."""
        self._routing = list(routing)
        self._weights = list(weights) if self.recorder is not None else []
        self._count_all_hit(self.stats.accelerator, routing)

    def _count_all_hit(self, stats: TierStats, routing: NDArray[np.int64]) -> None:
        """Layers, routing (layers, T, k), that found all they need on one tier."""
        if self._prefills:
            return
        active = np.zeros((len(routing), self._shape.experts), dtype=bool)
        np.put_along_axis(active, routing.reshape(len(routing), -1), True, axis=1)
        hits = int(active.sum())
        stats.count(hits, hits)

    @property
    def _prefills(self) -> bool:
        return self._window is not None and self._window.prefill

    def _count_hits(self, placement: Placement, hits: Hits) -> None:
        if not self._prefills:
            self.stats.host.count(hits.host, len(placement.host))
            self.stats.accelerator.count(hits.accelerator, len(placement.accelerator))

    def _retention(self, layer: int) -> Retention:
        return LayerRetention(self.policy, layer)


class OffloadedExperts(nn.Module):
    """Stands where transformers' experts module stood, holds no weights, and asks the runtime.

    Subclasses made by ``offloaded_class`` know the class they replace.
    """

    prototype_class: type[nn.Module]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        with torch.device("meta"):
            prototype = self.prototype_class(config, *args, **kwargs)
        # Kept outside nn.Module's registry: its stacked parameters must not be looked for in the checkpoint.
        object.__setattr__(self, "prototype", prototype)
        for name, child in prototype.named_children():  # activation; post_expert_norm where a family has one
            self.add_module(name, child)
        self._is_hf_initialized = True  # transformers would initialise the parameters that are not there
        self._forward: Callable[..., torch.Tensor] | None = None

    def stand_in(self) -> None:
        """Until ``attach``: something cheap that depends on all it is given, to compare forward passes with."""
        self._forward = lambda x, index, weights, into=None: (
            x * (weights * (index.to(x.device) % 7 + 1)).sum(-1, keepdim=True).to(x.dtype)
        )

    def attach(self, layer: int, runtime: ExpertRuntime) -> None:
        norm = getattr(self, "post_expert_norm", None)
        self._forward = functools.partial(runtime.forward, layer, norm)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        assert self._forward is not None, "attach() comes before the first pass"
        return self._forward(hidden_states, top_k_index, top_k_weights)

    def write(self, into: torch.Tensor, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
        """What ``forward`` makes of ``x``, to ``into`` (T, hidden)."""
        assert self._forward is not None, "attach() comes before the first pass"
        out = self._forward(x, index, weights, into)
        if out is not into:
            into.copy_(out)


def offloaded_class(experts_class: type[nn.Module]) -> type[OffloadedExperts]:
    return type(f"Offloaded{experts_class.__name__}", (OffloadedExperts,), {"prototype_class": experts_class})
