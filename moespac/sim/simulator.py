"""SIMULATE: a trace, a policy and a machine become tokens a second.

One event loop, two worlds: the memory, the layer's event loop and the policy are the engine's own objects; only
time, transfers and arithmetic are virtual (``sim.machine``). ``Simulation._step`` follows ``Engine.step`` and
``ExpertRuntime`` call by call; a test holds it to the engine's plans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moespac.config import EngineConfig, PolicyConfig, SimulationConfig
from moespac.errors import ConfigError
from moespac.policy.base import CacheRetention, Policy, Sensor
from moespac.policy.baselines.belady import BeladyPolicy
from moespac.policy.cost import CostModel
from moespac.policy.planner import MoeSpacPolicy
from moespac.policy.registry import make_policy
from moespac.policy.windows import NOTHING, LookedBack, WindowCosts
from moespac.schedule.jobs import Jobs
from moespac.schedule.layer import LayerRun
from moespac.schedule.memory import ExpertMemory, LayerRetention, Retention
from moespac.schedule.stats import PassClock
from moespac.sim.guesses import guess
from moespac.sim.hardware import HardwareProfile
from moespac.sim.machine import LayerDevices, Machine
from moespac.sim.result import Meter, SimResult
from moespac.sim.shapes import SimModel
from moespac.sim.texts import DrawnText, RecordedText, Text
from moespac.speculate.governor import FixedWindow, Governor
from moespac.timeline import Record, Tape, ignore
from moespac.trace.schema import Trace
from moespac.types import Capacity, ModelShape, Observation, Plan, Window

DraftSource = Literal["model", "lookup"]
PolicyFactory = Callable[[ModelShape, Capacity, CostModel, PolicyConfig], Policy]


@dataclass(frozen=True)
class Setting:
    """The world of a simulation, and how tokens are drafted. Raises ConfigError for what cannot be."""

    hardware: HardwareProfile
    model: SimModel
    capacity: Capacity
    window: int = 4  # drafted tokens a pass (K); for policies that are governed the most
    governed: frozenset[str] = frozenset({MoeSpacPolicy.name})  # whose K a governor chooses
    draft: DraftSource = "model"  # "lookup" takes no time
    draft_seconds: float | None = None  # of one token of the draft model; None: it reads the model's drafter
    acceptance: float = 0.8  # of each draft, where the trace does not say
    seed: int = 0
    warm: bool = True  # begin with what the policy's own first plan holds; False: with empty memories
    tokens: int | None = None  # decoded of each sequence at most
    engine: EngineConfig = field(default_factory=EngineConfig)
    assumed: SimulationConfig = field(default_factory=SimulationConfig)

    def __post_init__(self) -> None:
        hardware, model = self.hardware, self.model
        if self.capacity.accelerator and not hardware.has_accelerator:
            raise ConfigError(f"{hardware.name} has no accelerator to hold experts; give host memory only")
        if not 0 <= self.acceptance <= 1:
            raise ConfigError(f"acceptance {self.acceptance}: is no rate; give 0 to 1")
        if self.window and self.draft_token_seconds == 0 and self.draft == "model":
            raise ConfigError(
                f"{model.name}: comes with no draft model; draft by lookup, or set the window to 0"
            )

    @property
    def draft_token_seconds(self) -> float:
        if self.draft != "model":
            return 0.0
        if self.draft_seconds is not None:
            return self.draft_seconds
        return self.hardware.draft_seconds(self.model.drafter_bytes)


def simulate(
    trace: Trace,
    policy: str,
    setting: Setting,
    sequences: Sequence[int] | None = None,
    record: Record = ignore,
) -> SimResult:
    """Replay ``sequences`` (None: all) of ``trace``, one after the other, under the policy of that name.

    Belady, who knows the future, knows the best K too: none, a power of two, or ``setting.window``. ``record`` is
    told who did what when. Raises ConfigError when trace and model do not fit, or when there is no such policy.
    """
    check_fit(trace, setting.model)
    chosen = range(trace.sequences) if sequences is None else sequences

    def attempt(window: int, record: Record = ignore) -> SimResult:
        shape, method = setting.model.to_model_shape(), setting.engine.method
        decider = make_policy(policy, shape, setting.capacity, method, simulated=True)
        return run(decider, trace, replace(setting, window=window), chosen, record)

    if policy != BeladyPolicy.name or trace.speculative:
        return attempt(setting.window, record)
    windows = [k for k in range(setting.window + 1) if k.bit_count() < 2 or k == setting.window]
    results = {k: attempt(k) for k in windows}
    best = max(windows, key=lambda k: results[k].tokens_per_second)
    return results[best] if record is ignore else attempt(best, record)


def build(factory: PolicyFactory, setting: Setting) -> Policy:
    """A policy for the world of ``setting``."""
    shape, method = setting.model.to_model_shape(), setting.engine.method
    return factory(shape, setting.capacity, CostModel(method.cost, shape.record_bytes), method)


def run(
    policy: Policy, trace: Trace, setting: Setting, sequences: Sequence[int], record: Record = ignore
) -> SimResult:
    """``simulate`` with a policy that is there already, and a trace that fits the model."""
    window = setting.window if policy.speculates else 0
    if Sensor.FUTURE in policy.sensors:
        policy.reveal(_future(trace, setting, sequences, window))
    simulation = Simulation(policy, setting, window, record)
    if setting.warm:
        simulation.warm_up()
    for sequence in sequences:
        simulation.play(_text(trace, sequence, setting, window))
    return simulation.result()


def check_fit(trace: Trace, model: SimModel) -> None:
    """Raises ConfigError, naming both, unless the trace could be this model's."""
    of_trace = trace.shape.layers, trace.shape.experts, trace.shape.top_k
    of_model = model.layers, model.experts, model.top_k
    if of_trace != of_model:
        raise ConfigError(
            "the trace has {} layers of {} experts, top {}".format(*of_trace)
            + f", but {model.name} "
            + "{} of {}, top {}; simulate the model it was recorded from".format(*of_model)
        )


class Simulation:
    """One policy on one machine, text after text."""

    def __init__(self, policy: Policy, setting: Setting, window: int, record: Record) -> None:
        """``window``: the most tokens to draft in a pass."""
        self._policy = policy
        self._setting = setting
        self._window = window
        self._governor: Governor | FixedWindow = FixedWindow(window)
        self._windows: WindowCosts | None = None
        if policy.name in setting.governed and window:
            governing = replace(setting.engine.governor, most=window)
            self._governor = Governor(governing)
            self._windows = WindowCosts(policy.shape, policy.costs, window + 1, governing.mean_passes)
        host_only = not setting.capacity.accelerator
        self._machine = Machine(setting.hardware, setting.model, setting.engine.memory, host_only, record)
        self._shape = setting.model.to_model_shape()
        self._memory = ExpertMemory(
            self._shape,
            setting.capacity,
            self._machine.reader,
            self._machine.link if setting.capacity.accelerator else None,
            setting.engine.memory,
            policy.costs,
            self._machine.bell,
        )
        self._clock = PassClock(self._machine.clock.now, tape=Tape(record))
        self._jobs = Jobs(self._machine.bell, self._clock)
        self._meter = Meter(self._memory, self._clock)
        self._undrafted = 1
        self._rng = np.random.default_rng(setting.seed)  # of the sensors' errors

    def warm_up(self) -> None:
        """A machine that was just set up: its speeds are measured, and memory holds all experts where they fit,
        and what the policy plans before it has seen anything."""
        self._measure_costs()
        if self._memory.host.slots == self._shape.total:
            self._load(Plan(host=np.arange(self._shape.total)))
        self._load(self._policy.plan(Window(np.array([-1])), self._memory.residency))

    def play(self, text: Text) -> None:
        """Run all passes of one sequence."""
        self._governor.begin()
        self._undrafted = 1  # as ``Sequence.undrafted``
        while (window := text.upcoming()) is not None:
            self._meter.begin_step()
            seen = self._step(text)
            if not window.prefill:
                self._meter.end_step(seen)
        self._memory.quiesce()

    def result(self) -> SimResult:
        return self._meter.result(self._policy.name)

    # ---- one step ------------------------------------------------------------------------------------

    def _step(self, text: Text) -> Observation:
        """Draft, verify, observe, plan."""
        k = self._choose(text)
        start = self._clock.now()
        seen = text.read(k)
        self._draft(seen)
        drafted = self._clock.now()
        if seen.window.drafted or self._policy.counts_on_draft:
            self._plan(seen.window)
        self._verify(seen)
        if not seen.window.prefill:
            verified = self._clock.now()
            self._governor.observe(
                seen.window.drafted, seen.accepted, drafted - start, verified - drafted, self._look_back(seen)
            )
        self._policy.observe(seen)
        coming = text.upcoming()
        if coming is not None and not coming.prefill:
            self._plan(coming)  # transfers hide behind the next draft
        return seen

    def _choose(self, text: Text) -> int:
        """K; see ``Engine._choose``. A look back is one pass of the drafter, as one drafted token is."""
        if (room := text.room()) <= 0:
            return 0
        k = min(self._governor.choose(), room)
        if self._governor.looks_back(k, self._undrafted):
            if seen := text.look_back(min(self._undrafted, self._setting.engine.governor.look_back_tokens)):
                with self._clock.measure("draft"):
                    self._machine.run_dense(self._setting.draft_token_seconds)
            self._governor.saw_drafts(seen)
            self._undrafted = 0
        self._undrafted = 0 if k else self._undrafted + 1
        return k

    def _draft(self, seen: Observation) -> None:
        """One token after the other; transfers go on, and the drafter's own routing is told as it comes."""
        drafts = seen.window.drafted
        if not drafts:
            return
        model_drafts = self._setting.draft == "model"
        for drafted in range(1, drafts + 1):
            with self._clock.measure("draft"):
                self._machine.run_dense(self._setting.draft_token_seconds)
                if model_drafts and Sensor.DRAFT_ROUTING in self._policy.sensors:
                    self._foresee_window(seen, drafted)
                elif model_drafts and drafted < drafts:
                    self._pump()

    def _foresee_window(self, seen: Observation, drafted: int) -> None:
        """The drafter has run all window tokens before draft number ``drafted``, and plans are made at once."""
        accuracy = self._setting.assumed.draft_routing_accuracy
        ran = len(seen.window.tokens) - seen.window.drafted - 1 + drafted
        self._policy.foresee_window(guess(seen.routing[:, :ran], self._shape.experts, accuracy, self._rng))
        if drafted < seen.window.drafted:
            self._plan(Window(seen.window.tokens[: ran + 1], drafted))

    def _verify(self, seen: Observation) -> None:
        if self._windows is not None:
            self._windows.begin(seen.window, self._memory.residency)
        tokens = len(seen.window.tokens)
        trunk = self._setting.hardware.trunk_seconds(
            self._setting.model, tokens, on_accelerator=self._setting.hardware.has_accelerator
        )
        decide = 0.0 if self._memory.all_at_hand else self._decide_overhead()
        for layer in range(self._shape.layers):
            if decide:
                with self._clock.measure("decide"):
                    self._machine.run_dense(decide)
            with self._clock.measure("trunk", f"layer {layer}"):
                self._machine.run_dense(trunk / self._shape.layers)
                self._run_experts(layer, seen)

    def _decide_overhead(self) -> float:
        """By how the engine would run the layers of this pass."""
        hardware = self._setting.hardware
        if self._setting.capacity.accelerator:
            return hardware.decide_overhead
        retention = self._policy.pass_retention()
        if retention is None:
            return hardware.ask_overhead
        return hardware.cache_overhead if isinstance(retention, CacheRetention) else hardware.decide_overhead

    def _run_experts(self, layer: int, seen: Observation) -> None:
        """What ``ExpertRuntime.forward`` does when a layer's router has fired."""
        counts = self._counts(seen.routing[layer])
        retention = self._retention(layer)
        self._foresee_layer(layer + 1, seen)
        placement = self._policy.placement(layer, counts, self._memory.residency)
        self._memory.start_layer(layer, placement)
        if not seen.window.prefill:
            residency = self._memory.residency
            fastest = residency.accelerator if residency.capacity.accelerator else residency.host
            self._meter.dispatch(counts, fastest[layer])
        first_id = layer * self._shape.experts
        devices = LayerDevices(self._machine, counts, first_id)
        costs, clock = self._policy.costs, self._clock
        layer_run = LayerRun(self._memory, devices, costs, clock, self._jobs, counts, first_id)
        layer_run.execute(placement, retention)

    def _foresee_layer(self, layer: int, seen: Observation) -> None:
        if Sensor.NEXT_GATE in self._policy.sensors and layer < self._shape.layers:
            accuracy = self._setting.assumed.next_gate_accuracy
            guessed = guess(seen.routing[layer : layer + 1], self._shape.experts, accuracy, self._rng)
            self._policy.foresee_layer(layer, guessed[0])

    def _look_back(self, seen: Observation) -> LookedBack:
        if self._windows is None or self._memory.all_at_hand:
            return NOTHING
        self._windows.observe(seen)
        return self._windows.latest()

    # ---- transfers -----------------------------------------------------------------------------------

    def _plan(self, window: Window) -> None:
        self._memory.settle()
        self._memory.follow(self._policy.plan(window, self._memory.residency))
        self._memory.pump(self._retention(-1))
        self._policy.learn()

    def _pump(self) -> None:
        self._memory.settle()
        self._memory.pump(self._retention(-1))

    def _load(self, plan: Plan) -> None:
        """Follow the plan to its end."""
        self._memory.follow(plan)
        retention = self._retention(-1)
        while True:
            heard = self._machine.bell.count()
            self._memory.settle()
            self._memory.pump(retention)
            residency = self._memory.residency
            if not (residency.arriving_host.any() or residency.arriving_accelerator.any()):
                return
            self._machine.bell.wait_beyond(heard)

    def _measure_costs(self) -> None:
        """Once for each number of tokens that a window may have: a policy that never asked one device for an
        expert would never know what that costs."""
        hardware, model, costs = self._setting.hardware, self._setting.model, self._policy.costs
        costs.observe_storage(hardware.storage_seconds(model.expert_bytes))
        if self._setting.capacity.accelerator:
            costs.observe_link(hardware.link_seconds(model.expert_bytes))
        for tokens in range(1, self._window + 2):
            alone = self._machine.expert_host_seconds(tokens)
            costs.observe_host(tokens, alone)
            if self._setting.capacity.accelerator:
                costs.observe_host_beside_copy(tokens, alone / hardware.rates_together().host)
            if self._setting.capacity.accelerator:
                costs.observe_accelerator(tokens, self._machine.expert_accelerator_seconds(tokens))

    def _retention(self, layer: int) -> Retention:
        return LayerRetention(self._policy, layer)

    def _counts(self, routing: NDArray[np.int64]) -> NDArray[np.int64]:
        """(experts,) tokens of each, for one layer's (T, k) routing."""
        return np.bincount(routing[routing >= 0], minlength=self._shape.experts)


def _text(trace: Trace, sequence: int, setting: Setting, window: int) -> Text:
    if trace.speculative and window:
        return RecordedText(trace, sequence, setting.tokens)
    rng = np.random.default_rng([setting.seed, sequence])
    prompt = setting.assumed.prompt_tokens
    return DrawnText(trace, sequence, setting.tokens, setting.acceptance, prompt, rng)


def _future(trace: Trace, setting: Setting, sequences: Sequence[int], window: int) -> list[NDArray[np.int64]]:
    """The routing of all passes, as they come when each drafts ``window`` tokens."""
    passes = []
    for sequence in sequences:
        text = _text(trace, sequence, setting, window)
        while text.upcoming() is not None:
            passes.append(text.read(window).routing)
    return passes
