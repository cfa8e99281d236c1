"""What the runtime of a system's own code adds, and the paper's table with it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moespac.bench.paper import STANDARD, compare, run_paper
from moespac.config import EagerConfig
from moespac.sim.runtimes import EAGER, issued_from_python
from moespac.sim.simulator import Setting
from moespac.types import Capacity
from tests.sim.small import MACHINE, MODEL, random_trace


def test_the_eager_systems_are_baselines_of_the_paper_and_none_is_compiled() -> None:
    assert set(STANDARD) > EAGER
    assert not EAGER & {"llama.cpp", "llama.cpp+sd", "vllm-offload"}


def test_calls_cost_what_they_are_counted_at() -> None:
    config = EagerConfig(call_seconds=0.5, expert_calls=4, layer_calls=6)
    found = issued_from_python(MACHINE, config)
    assert found == replace(MACHINE, layer_overhead=3.0, accelerator_launch=2.0)


def test_each_baseline_is_compared_as_its_decisions_and_as_it_is_built() -> None:
    quick = replace(MACHINE, accelerator_launch=0.0)
    setting = Setting(quick, MODEL, Capacity(MODEL.layers * MODEL.experts, 4), window=2)
    rows = run_paper(random_trace(12), setting, 1, 1, lambda done, of: None)
    by_name = {row.name: row for row in rows}
    assert {name for name, row in by_name.items() if row.as_built} == EAGER
    assert all(by_name[name].speed_as_built < by_name[name].speed for name in EAGER)
    found, ours = compare(rows), by_name["moe-spac"].speed
    built = [by_name[name].speed_as_built for name in STANDARD]
    assert found.over_mean_as_built == pytest.approx(ours / (sum(built) / len(built)))
    assert found.mean_over_as_built > found.mean_over_standard
