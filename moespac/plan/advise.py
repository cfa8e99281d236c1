"""ADVISE: where a model's experts would lie on a machine, in which format, how fast that is, what would help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from moespac.config import DeviceConfig, PlanConfig
from moespac.experts.budget import DeviceNeeds
from moespac.plan.draft import PlannedDraft
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
    host_source: str = "as given"  # where these figures come from, in a few words
    accelerator_source: str = "as given"
    measured: str = ""  # the day on which a kept profile of this machine was

    @property
    def trunk_weight_bytes(self) -> int:
        """The engine computes the trunk in float32 on a CPU, in bfloat16 on a GPU."""
        return 2 if self.hardware.has_accelerator else 4


@dataclass(frozen=True)
class Workload:
    """What is to be run."""

    model: PlannedModel
    draft: PlannedDraft | None = None  # a draft model; None: without one, by lookup perhaps
    context: int = DeviceConfig.context  # tokens of prompt and answer whose KV caches have room


@dataclass(frozen=True)
class Budgets:
    """Bytes for experts in each fast tier, how many of them that holds, and what lies beside them."""

    host: int
    accelerator: int
    capacity: Capacity
    trunk: int  # bytes, on the accelerator where there is one
    draft: int  # bytes of the draft model's weights, beside the trunk
    needs: DeviceNeeds  # beyond both


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
class Drafting:
    """Decoding with the draft model, if this share of its drafts is accepted."""

    acceptance: float
    tokens_per_second: float


@dataclass(frozen=True)
class Free:
    """Bytes that a program may take of each memory, and where the figures come from."""

    host: int
    host_source: str
    accelerator: int
    accelerator_source: str


@dataclass(frozen=True)
class Plan:
    """The answer. Without ``option`` the model does not fit, and ``verdict`` says why."""

    model: str
    draft: str | None
    machine: str
    measured: str  # the day on which a kept profile of this machine was
    context: int  # tokens
    free: Free
    verdict: str = ""
    tiers: tuple[str, ...] = ()  # that experts would lie in, the fastest first
    option: Option | None = None
    speed: Speed | None = None  # without drafts; a draft model has its memory nevertheless
    drafting: tuple[Drafting, ...] = ()  # with the draft model
    options: tuple[Option, ...] = ()  # by format
    changes: tuple[Change, ...] = ()  # the most helpful first

    @property
    def fits(self) -> bool:
        return self.option is not None

    def to_dict(self) -> dict[str, Any]:
        return {"fits": self.fits} | asdict(self)


def make_plan(
    work: Workload,
    machine: Machine,
    config: PlanConfig | None = None,
    format: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Plan:
    """``format``: this one instead of the best."""
    config, model = config or PlanConfig(), work.model
    formats = [each for each in model.formats if format is None or each == format]
    sized = [(each, _budgets(work, machine, each, config)) for each in formats]
    fitting = [(each, budgets) for each, budgets in sized if budgets is not None]
    answer = Plan(
        model.name,
        work.draft.name if work.draft else None,
        machine.hardware.name,
        machine.measured,
        work.context,
        Free(machine.host_bytes, machine.host_source, machine.accelerator_bytes, machine.accelerator_source),
    )
    if not fitting:
        return replace(answer, verdict=_why_not(work, machine, formats, config))
    steps = len(fitting) + 8  # as many changes as there are, about
    options = []
    for each, budgets in fitting:
        case = _case(work, machine, each, budgets)
        size = case.model.expert_bytes * model.layers * model.experts
        options.append(Option(each, size, budgets, predict(case, config)))
        progress(len(options), steps)
    best = _recommended(options, model.stored_format, config)
    speed = predict_speed(_case(work, machine, best.format, best.budgets), config)
    changes = []
    for change in _changes(work, machine, best, options, config):
        changes.append(change)
        progress(min(len(options) + len(changes), steps), steps)
    tiers = _tiers(model, best)
    answer = replace(
        answer,
        verdict=f"fits: experts in {' and '.join(tiers)}",
        tiers=tiers,
        option=best,
        speed=speed,
        drafting=_drafting(work, machine, best, config),
        options=tuple(options),
        changes=tuple(
            sorted((each for each in changes if each.factor > 1.02), key=lambda each: -each.factor)
        ),
    )
    progress(steps, steps)
    return answer


# ---- sizes ---------------------------------------------------------------------------------------------


def _budgets(work: Workload, machine: Machine, format: str, config: PlanConfig) -> Budgets | None:
    """What is left for experts beside trunk and draft model; None when a tier that must hold one layer's cannot."""
    model = work.model
    record, total = model.record_bytes[format], model.layers * model.experts
    needs, trunk, draft = (
        _needs(work, machine, config),
        _trunk_bytes(model, machine),
        _draft_bytes(work, machine),
    )
    if machine.hardware.has_accelerator:
        host = max(machine.host_bytes - config.reserve_bytes, 0)
        accelerator = needs.room(machine.accelerator_bytes - trunk - draft)
    else:
        host, accelerator = needs.room(machine.host_bytes - trunk - draft), 0
    slots = [min(nbytes // record, total) for nbytes in (host, accelerator)]
    if slots[0] < model.top_k or (machine.hardware.has_accelerator and slots[1] < model.top_k):
        return None
    return Budgets(slots[0] * record, slots[1] * record, Capacity(*slots), trunk, draft, needs)


def _needs(work: Workload, machine: Machine, config: PlanConfig) -> DeviceNeeds:
    """Of the memory that the trunk is in, beside it and the draft model; on an accelerator as the engine does."""
    device = replace(DeviceConfig(), context=work.context)
    if not machine.hardware.has_accelerator:
        device = replace(device, graph_pool=0, reserve=config.reserve_bytes)
    models = (work.model, work.draft) if work.draft else (work.model,)
    wider = machine.trunk_weight_bytes // 2  # than the 16 bits that caches are told in
    caches = [replace(each.kv_cache, token_bytes=each.kv_cache.token_bytes * wider) for each in models]
    return DeviceNeeds.beside(caches, device)


def _trunk_bytes(model: PlannedModel, machine: Machine) -> int:
    return (model.trunk_weights + model.embedding_weights) * machine.trunk_weight_bytes


def _draft_bytes(work: Workload, machine: Machine) -> int:
    return work.draft.weights * machine.trunk_weight_bytes if work.draft else 0


def _why_not(work: Workload, machine: Machine, formats: list[str], config: PlanConfig) -> str:
    experts = work.model.top_k * min(work.model.record_bytes[format] for format in formats)
    beside = _trunk_bytes(work.model, machine) + _draft_bytes(work, machine)
    beside += _needs(work, machine, config).total
    where, has, source, needed = "host", machine.host_bytes, machine.host_source, beside + experts
    if machine.hardware.has_accelerator:
        if machine.accelerator_bytes < beside + experts:
            where, has, source = "accelerator", machine.accelerator_bytes, machine.accelerator_source
        else:
            needed = config.reserve_bytes + experts
    alone = replace(work, draft=None)
    hint = (
        "; without the draft model it fits"
        if any(_budgets(alone, machine, f, config) for f in formats)
        else ""
    )
    return (
        f"does not fit: everything but the experts, and one token's of them, need {needed / 1e9:.2f} GB of "
        f"{where} memory, and {has / 1e9:.2f} GB are free ({source}){hint}"
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
    work: Workload, machine: Machine, format: str, budgets: Budgets, acceptance: float | None = None
) -> Case:
    """``acceptance``: of the draft model's drafts; None: it has its memory, and nothing is drafted."""
    weight_bytes = machine.trunk_weight_bytes
    shape = work.model.to_sim_model(format, weight_bytes)
    if work.draft:
        shape = replace(shape, drafter_bytes=work.draft.read_weights * weight_bytes)
    return Case(machine.hardware, shape, budgets.capacity, acceptance)


# ---- choices -------------------------------------------------------------------------------------------


def _recommended(options: list[Option], stored: str, config: PlanConfig) -> Option:
    """The most exact format that is nearly as fast as the fastest; of equally exact ones the faster."""
    best = max(option.tokens_per_second for option in options)
    enough = [option for option in options if option.tokens_per_second >= config.enough * best]

    def exactness(option: Option) -> int:
        lossless = option.format == "f32" or (option.format == "bf16" and stored == "bf16")
        return 0 if lossless else _EXACT_FIRST.index(option.format)

    return min(enough, key=lambda option: (exactness(option), -option.tokens_per_second))


def _drafting(work: Workload, machine: Machine, now: Option, config: PlanConfig) -> tuple[Drafting, ...]:
    """With the draft model, as far as its acceptance, which depends on the text, is not known."""
    if work.draft is None:
        return ()
    cases = (
        (rate, _case(work, machine, now.format, now.budgets, acceptance=rate)) for rate in config.acceptances
    )
    return tuple(Drafting(rate, predict(case, config)) for rate, case in cases)


def _changes(
    work: Workload, machine: Machine, now: Option, options: list[Option], config: PlanConfig
) -> Iterator[Change]:
    """Each predicted by itself, everything else staying."""
    hardware, tiers = machine.hardware, _tiers(work.model, now)
    speed = now.tokens_per_second

    def faster(
        name: str, changed: Machine, work: Workload = work, acceptance: float | None = None
    ) -> Iterator[Change]:
        budgets = _budgets(work, changed, now.format, config)
        if budgets is not None:
            case = _case(work, changed, now.format, budgets, acceptance)
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
        yield from faster(f"a GPU with 12 GB ({_A_GPU})", _with_a_gpu(machine, config))
    if work.draft is None:
        yield from faster(
            f"a draft model, if {config.drafter_acceptance:.0%} of its drafts are accepted",
            machine,
            replace(work, draft=_some_draft(work.model, config)),
            config.drafter_acceptance,
        )


def _some_draft(model: PlannedModel, config: PlanConfig) -> PlannedDraft:
    """One of the usual size; its KV cache is about the target's, as Qwen3-0.6B's is beside Qwen3-30B-A3B's."""
    weights = int(model.trunk_weights * config.drafter_share)
    return PlannedDraft("a draft model", None, weights, weights, model.kv_cache)


def _with_a_gpu(machine: Machine, config: PlanConfig) -> Machine:
    gpu = find_profile(_A_GPU)
    fields = {name: value for name, value in vars(gpu).items() if name.startswith(("accelerator_", "link_"))}
    memory = int(gpu.accelerator_memory * config.accelerator_free)
    return replace(machine, hardware=replace(machine.hardware, **fields), accelerator_bytes=memory)
