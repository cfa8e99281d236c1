"""What a layer takes beside its experts, and what deciding adds once memory lacks some of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from moespac.bench.compute_probe import typical
from moespac.config import MeasureConfig
from moespac.engine.build import DEMO, load
from moespac.engine.summary import Summary
from moespac.experts.pack import pack
from moespac.model.inflate import inflate
from moespac.policy.baselines.arc import ArcPolicy
from moespac.policy.baselines.lru import LruPolicy
from moespac.policy.planner import MoeSpacPolicy
from moespac.sim.shapes import read_model

_FORMAT = "int8"
_LACKING = "25%"  # of the experts in memory: most layers lack some
_PROMPTS = ("The", "He said", "In the", "When a", "It is", "My dear", "On the", "What")  # not always one text
_COUNTED_ELSEWHERE = ("host_experts", "wait_for_experts")  # causes of seconds


@dataclass(frozen=True)
class Overheads:
    """Seconds of a layer in a decode pass. ``decide``, ``cache`` and ``ask`` come on top of ``layer`` while memory
    lacks experts, by the kind of policy: one that plans the pass, a cache, one that each layer asks."""

    layer: float
    decide: float
    cache: float
    ask: float


def measure_overheads(directory: Path, bandwidth: float, config: MeasureConfig) -> Overheads:
    """Of the embedded model, whose trunk is small, with experts wide enough to drive all else out of the caches, as
    those of any model do. ``bandwidth`` (bytes/s) says what reading the trunk took."""
    with _wide_model(directory, config.overhead_width) as path:
        model = read_model(DEMO / "target", _FORMAT)
        reading = model.trunk_bytes / bandwidth
        layer = max(0.0, _seconds_a_pass(path, MoeSpacPolicy.name, "100%", config) - reading) / model.layers
        decide, cache, ask = (
            (_seconds_a_pass(path, policy.name, _LACKING, config) - reading) / model.layers - layer
            for policy in (MoeSpacPolicy, LruPolicy, ArcPolicy)
        )
    return Overheads(layer, *(max(0.0, extra) for extra in (decide, cache, ask)))


@contextmanager
def _wide_model(directory: Path, factor: int) -> Iterator[Path]:
    """Packed, so that reads are direct ones, in ``directory`` for a while."""
    with tempfile.TemporaryDirectory(dir=directory) as place:
        wide, packed = Path(place) / "wide", Path(place) / "packed"
        inflate(DEMO / "target", wide, factor, progress=False)
        pack(wide, packed, _FORMAT, progress=False)
        yield packed


def _seconds_a_pass(path: Path, policy: str, host_memory: str, config: MeasureConfig) -> float:
    """Of short texts, without drafts; neither experts nor waiting for them are counted."""
    with load(path, draft="none", host_memory=host_memory, policy=policy, profile=None) as engine:
        texts = [
            engine.generate(prompt, max_new_tokens=config.decode_tokens).summary
            for prompt in islice(cycle(_PROMPTS), config.repeats + 1)
        ]
    return typical([_beside_experts(summary) / summary.passes for summary in texts[1:]])


def _beside_experts(summary: Summary) -> float:
    spent = summary.seconds["total"] - summary.seconds["prefill"]
    return spent - sum(summary.seconds.get(cause, 0.0) for cause in _COUNTED_ELSEWHERE)
