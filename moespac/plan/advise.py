"""ADVISE: where a model's experts would lie on a machine, in which format, how fast that is, what would help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from moespac.config import DeviceConfig, PlanConfig, SimulationConfig
from moespac.experts.budget import DeviceNeeds
from moespac.plan.model import PlannedModel
from moespac.plan.predict import Case, Speed, predict, predict_speed
from moespac.sim.hardware import HardwareProfile, find_profile
from moespac.types import Capacity

_EXACT_FIRST = ("f32", "bf16", "int8", "int4")
_A_GPU = "rtx3060-12gb"  # the least that is widely had with as much memory


@dataclass(frozen=True)
class Machine:
    """What there is to plan for. Bytes that a program may take now; of the accelerator 0 where there is none."""

    hardware: HardwareProfile
    host_bytes: int
    accelerator_bytes: int

    @property
    def trunk_weight_bytes(self) -> int:
        """The engine computes the trunk in float32 on a CPU, in bfloat16 on a GPU."""
        return 2 if self.hardware.has_accelerator else 4


@dataclass(frozen=True)
class Budgets:
    """Bytes for experts in each fast tier, how many of them that holds, and what lies beside them."""

    host: int
    accelerator: int
    capacity: Capacity
    trunk: int  # bytes, on the accelerator where there is one
    needs: DeviceNeeds | None  # of the accelerator's memory beyond the trunk


@dataclass(frozen=True)
class Option:
    """One format."""

    format: str
    experts_bytes: int  # of all experts: what the storage holds
    budgets: Budgets
    tokens_per_second: float


@dataclass(frozen=True)
class Change:
    """Something that could be done, and how many times as fast that is predicted to be."""

    name: str
    factor: float


@dataclass(frozen=True)
class Plan:
    """The answer. Without ``option`` the model does not fit, and ``verdict`` says why."""

    model: str
    machine: str
    verdict: str
    tiers: tuple[str, ...]  # that experts would lie in, the fastest first
    option: Option | None
    speed: Speed | None
    options: tuple[Option, ...]  # by format
    changes: tuple[Change, ...]  # the most helpful first

    @property
    def fits(self) -> bool:
        return self.option is not None

    def to_dict(self) -> dict[str, Any]:
        return {"fits": self.fits} | asdict(self)


def make_plan(
    model: PlannedModel,
    machine: Machine,
    config: PlanConfig | None = None,
    format: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Plan:
    """``format``: this one instead of the best."""
    config = config or PlanConfig()
    formats = [each for each in model.formats if format is None or each == format]
    sized = [(each, _budgets(model, machine, each, config)) for each in formats]
    fitting = [(each, budgets) for each, budgets in sized if budgets is not None]
    if not fitting:
        return Plan(
            model.name, machine.hardware.name, _why_not(model, machine, config), (), None, None, (), ()
        )
    steps = len(fitting) + 8  # as many changes as there are, about
    options = []
    for each, budgets in fitting:
        case = _case(model, machine, each, budgets)
        size = case.model.expert_bytes * model.layers * model.experts
        options.append(Option(each, size, budgets, predict(case, config)))
        progress(len(options), steps)
    best = _recommended(options, model.stored_format, config)
    case = _case(model, machine, best.format, best.budgets)
    speed = predict_speed(case, config)
    changes = []
    for change in _changes(model, machine, best, options, config):
        changes.append(change)
        progress(min(len(options) + len(changes), steps), steps)
    helpful = sorted((each for each in changes if each.factor > 1.02), key=lambda each: -each.factor)
    tiers = _tiers(model, best)
    verdict = f"fits: experts in {' and '.join(tiers)}"
    progress(steps, steps)
    return Plan(
        model.name, machine.hardware.name, verdict, tiers, best, speed, tuple(options), tuple(helpful)
    )


# ---- sizes ---------------------------------------------------------------------------------------------


def _budgets(model: PlannedModel, machine: Machine, format: str, config: PlanConfig) -> Budgets | None:
    """What is left for experts beside the trunk; None when a tier that must hold one layer's cannot."""
    record, total = model.record_bytes[format], model.layers * model.experts
    trunk, needs = _trunk_bytes(model, machine), _device_needs(model, machine)
    host = machine.host_bytes - config.reserve_bytes - (trunk if needs is None else 0)
    accelerator = needs.room(machine.accelerator_bytes - trunk) if needs else 0
    slots = [min(max(nbytes, 0) // record, total) for nbytes in (host, accelerator)]
    if slots[0] < model.top_k or (needs is not None and slots[1] < model.top_k):
        return None
    return Budgets(slots[0] * record, slots[1] * record, Capacity(*slots), trunk, needs)


def _device_needs(model: PlannedModel, machine: Machine) -> DeviceNeeds | None:
    """As the engine reckons them, without a draft model; None where there is no accelerator."""
    if not machine.hardware.has_accelerator:
        return None
    return DeviceNeeds.beside([model.kv_cache], DeviceConfig())


def _trunk_bytes(model: PlannedModel, machine: Machine) -> int:
    return (model.trunk_weights + model.embedding_weights) * machine.trunk_weight_bytes


def _why_not(model: PlannedModel, machine: Machine, config: PlanConfig) -> str:
    experts = model.top_k * min(model.record_bytes[format] for format in model.formats)
    needs, trunk = _device_needs(model, machine), _trunk_bytes(model, machine)
    where, has, needed = "host", machine.host_bytes, config.reserve_bytes + experts
    if needs is None:
        needed += trunk
    elif machine.accelerator_bytes < trunk + needs.total + experts:
        where, has, needed = "accelerator", machine.accelerator_bytes, trunk + needs.total + experts
    return (
        f"does not fit: everything but the experts, and one token's of them, need {needed / 1e9:.2f} GB of "
        f"{where} memory, and {has / 1e9:.2f} GB are to be had"
    )


def _tiers(model: PlannedModel, option: Option) -> tuple[str, ...]:
    total, capacity = model.layers * model.experts, option.budgets.capacity
    tiers = ["accelerator memory"] if capacity.accelerator else []
    if capacity.accelerator < total:
        tiers.append("host memory")
    if max(capacity.host, capacity.accelerator) < total:
        tiers.append("storage")
    return tuple(tiers)


def _case(
    model: PlannedModel, machine: Machine, format: str, budgets: Budgets, drafter_share: float = 0.0
) -> Case:
    """``drafter_share``: bytes of a draft model beside the trunk's; 0: without one."""
    shape = model.to_sim_model(format, machine.trunk_weight_bytes)
    shape = replace(shape, drafter_bytes=int(shape.trunk_bytes * drafter_share))
    return Case(machine.hardware, shape, budgets.capacity, drafter=drafter_share > 0)


# ---- choices -------------------------------------------------------------------------------------------


def _recommended(options: list[Option], stored: str, config: PlanConfig) -> Option:
    """The most exact format that is nearly as fast as the fastest; of equally exact ones the faster."""
    best = max(option.tokens_per_second for option in options)
    enough = [option for option in options if option.tokens_per_second >= config.enough * best]

    def exactness(option: Option) -> int:
        lossless = option.format == "f32" or (option.format == "bf16" and stored == "bf16")
        return 0 if lossless else _EXACT_FIRST.index(option.format)

    return min(enough, key=lambda option: (exactness(option), -option.tokens_per_second))


def _changes(
    model: PlannedModel, machine: Machine, now: Option, options: list[Option], config: PlanConfig
) -> Iterator[Change]:
    """Each predicted by itself, everything else staying."""
    hardware, tiers = machine.hardware, _tiers(model, now)
    speed = now.tokens_per_second

    def faster(name: str, changed: Machine, drafter_share: float = 0.0) -> Iterator[Change]:
        budgets = _budgets(model, changed, now.format, config)
        if budgets is not None:
            case = _case(model, changed, now.format, budgets, drafter_share)
            yield Change(name, predict(case, config) / speed)

    for option in options:
        if option.format != now.format:
            yield Change(f"experts in {option.format}", option.tokens_per_second / speed)
    if "storage" in tiers:
        yield from faster("twice the host memory", replace(machine, host_bytes=2 * machine.host_bytes))
        disk = replace(
            hardware,
            storage_bandwidth=2 * hardware.storage_bandwidth,
            storage_latency=hardware.storage_latency / 2,
        )
        yield from faster("a disk twice as fast", replace(machine, hardware=disk))
    if hardware.has_accelerator and len(tiers) > 1:
        double = replace(machine, accelerator_bytes=2 * machine.accelerator_bytes)
        yield from faster("twice the accelerator memory", double)
        link = replace(hardware, link_bandwidth=2 * hardware.link_bandwidth)
        yield from faster("a link twice as fast", replace(machine, hardware=link))
    curves = {
        format: tuple((tokens, seconds / 2) for tokens, seconds in curve)
        for format, curve in hardware.host_seconds_per_weight.items()
    }
    if not hardware.has_accelerator or "host memory" in tiers:
        processor = replace(
            hardware,
            host_bandwidth=2 * hardware.host_bandwidth,
            host_flops=2 * hardware.host_flops,
            host_seconds_per_weight=curves,
        )
        yield from faster("a processor and memory twice as fast", replace(machine, hardware=processor))
    if not hardware.has_accelerator:
        yield from faster(f"a GPU with 12 GB ({_A_GPU})", _with_a_gpu(machine))
    yield from faster("a draft model", machine, config.drafter_share)


def _with_a_gpu(machine: Machine) -> Machine:
    gpu = find_profile(_A_GPU)
    fields = {name: value for name, value in vars(gpu).items() if name.startswith(("accelerator_", "link_"))}
    memory = int(gpu.accelerator_memory * SimulationConfig().host_share)
    return replace(machine, hardware=replace(machine.hardware, **fields), accelerator_bytes=memory)
