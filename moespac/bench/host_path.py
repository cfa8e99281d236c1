"""What the host spends on a layer while a device computes: microseconds of Python, with everything else taken out.

`moespac bench host-path` makes a model of Qwen3-30B-A3B's layers and experts, all of them tiny, and
decodes windows of it through recordings that do nothing when launched. Routers' choices are drawn: some experts
are popular, so the device has many of those asked for and the host the others; nothing is copied meanwhile. What is
left is the host's own path from a router's choice to the next launch. Then the same where each layer has one expert
copied that the policy left to the host, or three; copies are over as soon as they are asked for. A real launch,
copy and event cost microseconds more, which only a GPU can tell.
CPU time of this thread, so that a busy machine does not count, and neither do waits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import thread_time
from typing import Any

import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moespac.config import CostConfig, GraphConfig
from moespac.engine.build import load
from moespac.engine.engine import Engine
from moespac.experts.runtime import OffloadedExperts
from moespac.model.graphed import GraphedTrunk, graphed_trunk
from moespac.model.lean import lean_trunk
from moespac.model.recorder import InProcess, Mailbox, Work
from moespac.model.stretches import RoutingRow
from moespac.schedule.stats import PassClock
from moespac.types import Placement, Residency, Window

LAYERS, EXPERTS, TOP_K = 48, 128, 8
_VOCABULARY = 256
_DEAR = 1.0  # second to copy an expert: none is worth it
COPIES = (1, 3)  # experts that a layer has copied, in what is measured last
_SKEW = 1.0  # of routing: the expert of rank r is chosen in proportion of 1 / r


class _Hollow(InProcess):
    """Runs work while it is recorded, and does nothing when it is launched: what routers choose is put there."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        self.popularity = -_SKEW * np.log1p(rng.permuted(np.tile(np.arange(EXPERTS), (LAYERS, 1)), axis=1))
        self._rows: list[torch.Tensor] = []

    def record(self, work: Work, state: Sequence[torch.Tensor] = ()) -> Work:
        super().record(work, state)
        return lambda: None

    def mailbox(self, source: torch.Tensor) -> Mailbox:
        if source.dtype == torch.uint8:
            self._rows.append(source)
        return super().mailbox(source)

    def route(self, tokens: int, rng: np.random.Generator) -> None:
        """Put other choices in place of those of all layers, for windows of so many ``tokens``."""
        rows = [row for row in self._rows if row.numel() == RoutingRow.bytes(tokens, TOP_K)]
        for number, row in enumerate(rows):
            drawn = self.popularity[number % LAYERS] + rng.gumbel(size=(tokens, EXPERTS))
            chosen = np.argpartition(drawn, -TOP_K)[:, -TOP_K:]
            RoutingRow(row, tokens, TOP_K).index.copy_(torch.from_numpy(chosen))


class _Launched:
    """``schedule.ports.Ticket`` of a job that a device had done before the host asked."""

    done, error, seconds = True, None, 1e-6


class _Copied(_Launched):
    """The same of a copy, which is said to be slow still: the policy has none made of its own."""

    seconds = _DEAR


class _Echo:
    """A runtime whose experts cost nothing."""

    def forward(
        self, layer: int, norm: Any, x: torch.Tensor, index: Any, weights: Any, into: torch.Tensor
    ) -> torch.Tensor:
        return into


@dataclass(frozen=True)
class HostTime:
    """Microseconds a layer, medians over passes."""

    trunk: float  # launching, the routing's way to the host, the experts' output into its place
    decide: float  # of the policy: who computes what
    dispatch: float  # to both devices, and the join; not the host's own share of the experts
    copying: tuple[float, ...] = ()  # all of it, where a layer has so many experts copied as ``COPIES`` says

    @property
    def total(self) -> float:
        return self.trunk + self.decide + self.dispatch

    def to_dict(self) -> dict[str, Any]:
        copying = {str(count): spent for count, spent in zip(COPIES, self.copying, strict=False)}
        return asdict(self) | {"total": self.total, "copying": copying}


def measure(
    windows: Sequence[int] = (1, 5, 17), accelerator: str = "17%", passes: int = 20
) -> list[HostTime]:
    """Of windows of so many tokens, every expert in host memory, some on the in-process accelerator too."""
    with tempfile.TemporaryDirectory() as directory:
        _model().save_pretrained(directory)
        settings: dict[str, Any] = {"draft": "none", "host_memory": "100%", "profile": None, "window": 0}
        with load(Path(directory), accelerator_memory=accelerator, **settings) as engine:
            clock = engine.runtime.clock
            clock.now = thread_time
            hollow = _Hollow()
            trunk = _trunk(engine, hollow, clock)
            jobs = _a_fast_device(engine, hollow, max(windows))
            whole = [_median(engine, trunk, hollow, clock, tokens, passes) for tokens in windows]
            assert jobs, "the policy sent the device no job: this is not the path of two devices"
            copying = []
            for count in COPIES:
                _have_copied(engine, count)
                each = [_median(engine, trunk, hollow, clock, tokens, passes) for tokens in windows]
                copying.append([path for path, _ in each])
            for module in engine.model.modules():
                if isinstance(module, OffloadedExperts):
                    echo: Any = _Echo()
                    module.attach(0, echo)
            alone = [_median(None, trunk, hollow, clock, tokens, passes) for tokens in windows]
    return [
        HostTime(trunk, decide, max(0.0, both - decide - trunk), copies)
        for (trunk, _), (both, decide), copies in zip(alone, whole, zip(*copying, strict=True), strict=True)
    ]


def _a_fast_device(engine: Engine, hollow: _Hollow, tokens: int) -> list[str]:
    """The accelerator has done its jobs at once from now on, is known for it, and has the popular experts, while
    copies are known to be slow; the list grows by a name for each job."""
    memory: Any = engine.runtime.memory
    jobs: list[str] = []

    def compute(name: str, job: Callable[[], object]) -> _Launched:
        jobs.append(name)
        return _Launched()

    memory.link._accelerator.compute = compute
    memory.link._accelerator.in_order = True  # as a card's jobs are: nobody waits for them
    costs, samples = engine.runtime.policy.costs, CostConfig().samples
    for count in range(1, tokens + 1):
        for _ in range(samples):
            costs.observe_accelerator(count, _Launched.seconds)
    values = hollow.popularity.ravel()
    for expert in np.flatnonzero(~memory.host.ready).tolist():
        memory.demand_host(expert, lambda tier: values)
    memory.quiesce()
    slots = memory.accelerator.slots
    for expert in np.argsort(-hollow.popularity.ravel(), kind="stable")[:slots].tolist():
        if not memory.accelerator.ready[expert]:
            memory.demand_accelerator(expert, lambda tier: values)
            memory.quiesce()
    for _ in range(samples):
        costs.observe_link(_DEAR)
    return jobs


def _have_copied(engine: Engine, count: int) -> None:
    """So many of the experts that the policy leaves to the host are the device's from now on, the longest first."""
    memory: Any = engine.runtime.memory
    policy: Any = engine.runtime.policy

    def copy_in(*what: object) -> _Copied:
        memory.bell.ring()
        return _Copied()

    def place(layer: int, counts: Any, residency: Residency) -> Placement:
        placed = type(policy).place(policy, layer, counts, residency)
        there = np.concatenate([placed.accelerator, placed.host[:count]])
        return Placement(placed.host[count:], there, placed.prefetch)

    memory.link._accelerator.copy_in = copy_in
    policy.place = place


def _trunk(engine: Engine, hollow: _Hollow, clock: PassClock) -> GraphedTrunk:
    lean = lean_trunk(engine.model, 1)
    assert lean is not None
    trunk = graphed_trunk(engine.model, lean, hollow, clock, GraphConfig())  # each size is launched once
    assert trunk is not None
    return trunk


def _median(
    engine: Engine | None, trunk: GraphedTrunk, hollow: _Hollow, clock: PassClock, tokens: int, passes: int
) -> tuple[float, float]:
    """Microseconds a layer of the host's path, and of deciding within it."""
    rng, cache, each = np.random.default_rng(0), trunk.new_cache(), []
    for _ in range(passes):
        window = Window(rng.integers(0, _VOCABULARY, tokens), drafted=tokens - 1)
        hollow.route(tokens, rng)
        clock.path.clear()
        decided = clock.seconds["decide"]
        if engine is not None:
            engine.runtime.begin_pass(window)
        trunk(torch.from_numpy(window.tokens), cache, tokens)
        spent = (clock.path.seconds, clock.seconds["decide"] - decided)
        if engine is not None:
            engine.runtime.end_pass(accepted=tokens - 1)
        each.append([seconds / clock.path.layers * 1e6 for seconds in spent])
        cache.rewind(tokens)
    path, decide = np.median(np.array(each), axis=0)
    return float(path), float(decide)


def _model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    heads: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
    config = Qwen3MoeConfig(
        **heads,
        vocab_size=_VOCABULARY,
        hidden_size=64,
        num_hidden_layers=LAYERS,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=32,
        norm_topk_prob=True,
    )
    return Qwen3MoeForCausalLM(config)
