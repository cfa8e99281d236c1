"""Tokens grouped on the device, and a whole pass over experts that all lie there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import moespac
from moespac.experts.grouped.jobs import NOBODY, make_jobs
from moespac.experts.resident import ResidentExperts, group_on_device, rows_of_a_job
from moespac.speculate.drafters import ModelDrafter
from moespac.trace.recorder import TraceRecorder
from tests.experts.grouped_experts import DEVICE, few_programs, grouped, interpret
from tests.experts.job_kernels import TorchJobKernels
from tests.experts.test_kernels import error, make_experts
from tests.families import VOCABULARY, build_model, reference_tokens, save_checkpoint
from tests.model.recording import OperationRecorder

PROMPT = (5, 17, 3, 60, 17, 3)


def on_the_host(routing: np.ndarray, slots: Sequence[int], rows: int) -> list[list[int]]:
    flat = routing.reshape(-1)
    experts, counts = np.unique(flat, return_counts=True)
    order = np.argsort(flat, kind="stable")
    return make_jobs(np.array(slots)[experts], order, counts.cumsum() - counts, counts, rows).tolist()


@pytest.mark.parametrize("tokens", [1, 2, 5, 17])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (128, 8), (4, 4), (1, 1)])
def test_jobs_are_those_that_the_routing_asks_for(tokens: int, experts: int, top_k: int) -> None:
    draw = np.random.default_rng(tokens)
    routing = np.stack([draw.permutation(experts)[:top_k] for _ in range(tokens)])
    slots, rows = draw.permutation(3 * experts)[:experts], rows_of_a_job(tokens)
    jobs = group_on_device(torch.from_numpy(routing), torch.from_numpy(slots), rows)
    assert jobs.dtype == torch.int32 and jobs.shape == (tokens * top_k, 1 + rows)
    expected = on_the_host(routing, slots.tolist(), rows)
    assert jobs[: len(expected)].tolist() == expected
    empty = [expected[-1][0], *[NOBODY] * rows]
    assert jobs[len(expected) :].tolist() == [empty] * (len(jobs) - len(expected))


def test_grouping_is_recorded_and_follows_what_is_routed_later() -> None:
    index, slots = torch.zeros(3, 2, dtype=torch.int64), torch.arange(8).flip(0)
    jobs = torch.zeros(6, 5, dtype=torch.int32)
    launch = OperationRecorder().record(lambda: jobs.copy_(group_on_device(index, slots, 4)))
    for routing in ([[0, 1], [0, 2], [7, 1]], [[3, 4], [3, 4], [3, 4]]):
        index.copy_(torch.tensor(routing))
        launch()
        expected = on_the_host(np.array(routing), slots.tolist(), 4)
        assert jobs[: len(expected)].tolist() == expected


def test_the_kernels_take_the_jobs_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed (it is in the dev extra)")
    few_programs(monkeypatch)
    for _ in interpret():
        experts = make_experts(64, 32, "int4", slots=3)
        kernels = grouped(experts)
        slots = np.array([[2, 0, 1]])
        hidden = kernels.job_kernels.hidden
        x = torch.randn(3, hidden, generator=torch.Generator().manual_seed(0))
        index = torch.tensor([[0, 2], [0, 1], [0, 2]])
        weights = torch.rand(3, 2, generator=torch.Generator().manual_seed(1))
        resident = ResidentExperts(kernels.job_kernels, partial(experts.arena.to, DEVICE), slots, print)
        joined = resident(0, x.to(DEVICE), index.to(DEVICE), weights.to(DEVICE)).cpu()
        expected = torch.zeros(3, hidden, dtype=torch.float64)
        for token in range(3):
            for expert, weight in zip(index[token].tolist(), weights[token].tolist(), strict=True):
                expected[token] += weight * experts.expected(int(slots[0, expert]), x[token : token + 1])[0]
        assert error(joined, expected) < 1e-6


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    families = ("qwen3_moe", "qwen2_moe")
    return {family: save_checkpoint(family, tmp_path_factory.mktemp(family)) for family in families}


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_a_pass_over_resident_experts_is_one_recording(checkpoints, monkeypatch, family: str) -> None:
    monkeypatch.setattr("moespac.model.trunk.recorder_for", lambda device: OperationRecorder())
    settings = {"host_memory": "100%", "accelerator_memory": "100%", "profile": None, "window": 4}
    with moespac.load(checkpoints[family], draft="none", **settings) as engine:
        runtime = engine.runtime
        prototype = engine.model.model.layers[0].mlp.experts.prototype
        runtime._computers = replace(
            runtime._computers, job_kernels=TorchJobKernels(prototype, runtime.store.layout)
        )
        engine.drafter = ModelDrafter(build_model(family), VOCABULARY)
        assert runtime.resident() is None
        fill_accelerator(engine)
        assert runtime.resident() is not None
        runtime.recorder = recorder = TraceRecorder(engine.shape, "test")
        recorder.begin_sequence()
        result = engine.generate(PROMPT, max_new_tokens=12)
        assert result.token_ids == reference_tokens(family, PROMPT, 12)
        assert result.summary.hit_rate == 1.0
        # One recording a pass, and one copy with its event.
        assert result.summary.launches_per_layer == pytest.approx(3 / engine.shape.layers, abs=0.01)
        resident = recorder.trace()
    assert same_routing_as_layer_by_layer(checkpoints[family], resident)


def fill_accelerator(engine) -> None:
    """Stock generate() leaves the copying to demand, so each expert is asked for."""
    memory, runtime = engine.runtime.memory, engine.runtime
    for expert in range(engine.shape.total):
        while not memory.accelerator.ready[expert]:
            memory.demand_accelerator(expert, runtime._retention(-1))
            memory.quiesce()


def same_routing_as_layer_by_layer(path: Path, trace) -> bool:
    with moespac.load(path, draft="none", host_memory="100%", profile=None, window=0) as engine:
        engine.runtime.recorder = recorder = TraceRecorder(engine.shape, "test")
        recorder.begin_sequence()
        engine.generate(PROMPT, max_new_tokens=12)
        plain = recorder.trace()
    kept = accepted_rows(trace)[: len(accepted_rows(plain))]
    return np.array_equal(np.sort(kept, axis=-1), np.sort(accepted_rows(plain)[: len(kept)], axis=-1))


def accepted_rows(trace) -> np.ndarray:
    """The routing of the tokens that stayed."""
    passes = zip(trace.pass_offsets[:-1], trace.pass_offsets[1:], trace.drafted, trace.accepted, strict=True)
    return np.concatenate([trace.routing[a : b - drafted + accepted] for a, b, drafted, accepted in passes])
