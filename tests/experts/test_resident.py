"""Tokens grouped on the device, and a whole pass over experts that all lie there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import moespac
from moespac.experts.resident import NOBODY, group_on_device, rows_of_a_job
from moespac.speculate.drafters import ModelDrafter
from moespac.trace.recorder import TraceRecorder
from tests.experts.job_kernels import TorchJobKernels
from tests.families import VOCABULARY, build_model, reference_tokens, save_checkpoint
from tests.model.recording import OperationRecorder

PROMPT = (5, 17, 3, 60, 17, 3)


def by_hand(routing: np.ndarray, slots: Sequence[int], rows: int) -> list[list[int]]:
    flat, jobs = routing.reshape(-1), []
    for expert in sorted(set(flat.tolist())):
        mine = np.flatnonzero(flat == expert).tolist()
        for begin in range(0, len(mine), rows):
            some = mine[begin : begin + rows]
            jobs.append([slots[expert], *some, *[NOBODY] * (rows - len(some))])
    return jobs


@pytest.mark.parametrize("tokens", [1, 2, 5, 17])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (128, 8), (4, 4), (1, 1)])
def test_jobs_are_those_that_the_routing_asks_for(tokens: int, experts: int, top_k: int) -> None:
    draw = np.random.default_rng(tokens)
    routing = np.stack([draw.permutation(experts)[:top_k] for _ in range(tokens)])
    slots, rows = draw.permutation(3 * experts)[:experts], rows_of_a_job(tokens)
    jobs = group_on_device(torch.from_numpy(routing), torch.from_numpy(slots), rows)
    assert jobs.dtype == torch.int32 and jobs.shape == (tokens * top_k, 1 + rows)
    expected = by_hand(routing, slots.tolist(), rows)
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
        expected = by_hand(np.array(routing), slots.tolist(), 4)
        assert jobs[: len(expected)].tolist() == expected


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
