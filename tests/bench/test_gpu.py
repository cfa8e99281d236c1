"""``moespac bench gpu`` in miniature, on the in-process accelerator, and everything that can go wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from moespac.bench.decode import runs as decode_runs
from moespac.bench.gpu import exactness, runs, worker
from moespac.bench.gpu.contenders import OFFLOAD, RESIDENT, all_contenders, contender, main_contenders
from moespac.bench.gpu.job import (
    COMPILED_JOB,
    ENGINE,
    LINK_JOB,
    OFFLOAD_JOB,
    PAIR,
    RESIDENT_JOB,
    SHAPE,
    Job,
    Result,
)
from moespac.bench.gpu.jobs import Wish, jobs_of, layers_that_fit
from moespac.bench.gpu.records import FAILED, OK, SKIPPED, GpuRecord, read_records
from moespac.bench.gpu.replay import Replay, decoded_only
from moespac.bench.gpu.runs import record_of, run_all, work_off
from moespac.bench.gpu.shape import record_bytes
from moespac.bench.gpu.stage import Stage, replayed_trace, shape_stage
from moespac.bench.gpu.timing import covered, time_engine
from moespac.bench.paper import OURS, OURS_PLAIN, OURS_UNGOVERNED, STANDARD
from moespac.cli import app
from moespac.config import GpuBenchConfig
from moespac.engine.summary import Summary
from moespac.errors import ConfigError
from moespac.policy.registry import ENGINE_POLICIES
from moespac.sim.synthetic import synthetic_routing
from moespac.sim.texts import DrawnText
from moespac.speculate.verify import verify_greedy
from moespac.trace.files import write
from moespac.trace.schema import Trace
from moespac.types import ModelShape, Observation
from tests.bench.small_gpu import SETTING, job, record

CONFIG = GpuBenchConfig.quick()
MODEL = ModelShape(SETTING.layers, CONFIG.experts, CONFIG.top_k, record_bytes=1)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    made = shape_stage(job(tmp_path_factory.mktemp("work")))
    yield made
    made.close()


def trace(tokens: int = 400, sequences: int = 1) -> Trace:
    return synthetic_routing(MODEL, [tokens] * sequences).to_trace(MODEL.experts, "made")


# ---- replay --------------------------------------------------------------------------------------------------


def test_replayed_drafts_are_accepted_as_often_as_stated() -> None:
    """By the verification of the engine, and pass for pass as the simulator has it."""
    acceptance, k = 0.7, 4
    text = decoded_only(trace(4000), MODEL.layers, CONFIG.vocabulary)
    replay = Replay(text, acceptance, 8, CONFIG.vocabulary, seed=5)
    simulated = DrawnText(text, 0, None, acceptance, 8, np.random.default_rng([5, 0]))
    replay.begin(0)
    replay.take_pass()
    simulated.read(0)
    tried = np.zeros(k)
    right = np.zeros(k)
    for _ in range(800):
        taken, expected = replay.draft(k), simulated.read(k)
        logits = torch.zeros(k + 1, CONFIG.vocabulary)
        logits[range(k + 1), taken.says] = 1.0
        verdict = verify_greedy(taken.drafts, logits)
        assert verdict.accepted == taken.seen.accepted == expected.accepted
        assert np.array_equal(taken.seen.routing, expected.routing)
        tried[: verdict.accepted + 1] += 1
        right[: verdict.accepted] += 1
        assert replay.take_pass() is taken
    assert right.sum() / tried.sum() == pytest.approx(acceptance, abs=0.03)
    assert right / tried == pytest.approx([acceptance] * k, abs=0.1)  # later drafts are tried less often


def test_a_stand_in_that_is_right_by_chance_is_made_wrong() -> None:
    """A text of one token: whatever stands in for a wrong draft would be right."""
    made = trace(60)
    same = replace(made, tokens=np.zeros_like(made.tokens))
    replay = Replay(decoded_only(same, MODEL.layers, CONFIG.vocabulary), 0.0, 8, CONFIG.vocabulary, seed=0)
    replay.begin(0)
    replay.take_pass()
    taken = replay.draft(3)
    assert taken.seen.accepted == 0 and taken.says[0] == 0 and taken.drafts[0] == 1


def test_replayed_routing_reaches_the_experts_unchanged(stage: Stage) -> None:
    """What the policy and the experts were given, pass by pass, is the trace, wrong drafts among it."""
    seen: list[Observation] = []
    engine = stage.engine_for(contender(OURS_UNGOVERNED, 3))
    engine.runtime.recorder = seen.append
    try:
        engine.generate(stage.prompts.begin(0), max_new_tokens=SETTING.tokens + 1)
    finally:
        engine.runtime.recorder = None
    made = replayed_trace(SETTING, MODEL)
    rng = np.random.default_rng([SETTING.seed, 0])
    text = DrawnText(made, 0, None, SETTING.acceptance, CONFIG.prompt_tokens, rng)
    assert len(seen) > 2 and sum(each.window.drafted for each in seen) > 4
    assert 0 < sum(each.accepted for each in seen) < sum(each.window.drafted for each in seen)
    for found in seen:
        expected = text.read(found.window.drafted)
        assert np.array_equal(found.routing, expected.routing)
        assert found.accepted == expected.accepted and found.window.prefill == expected.window.prefill


def test_every_contender_decodes_the_same_text(stage: Stage) -> None:
    texts = []
    for name in (OURS, OURS_PLAIN, "llama.cpp+sd", "sp-moe", "accelerate", "fate"):
        engine = stage.engine_for(contender(name, 4))
        texts.append(engine.generate(stage.prompts.begin(1), max_new_tokens=SETTING.tokens).token_ids)
        engine.runtime.memory.check_integrity()
    made = replayed_trace(SETTING, MODEL).decode_tokens(1).tokens
    assert texts == [made[CONFIG.prompt_tokens : CONFIG.prompt_tokens + SETTING.tokens].tolist()] * 6


def test_a_contender_finds_an_empty_accelerator_and_full_host_memory(stage: Stage) -> None:
    engine = stage.engine_for(contender("lru", 4))
    engine.generate(stage.prompts.begin(0), max_new_tokens=4)
    memory = engine.runtime.memory
    assert memory.accelerator is not None and memory.accelerator.ready.sum() == memory.accelerator.slots
    learned = engine.runtime.policy
    after = stage.engine_for(contender(OURS_PLAIN, 4))
    assert not memory.accelerator.ready.any() and memory.host.ready.all()
    assert after.runtime.policy is not learned and after.runtime.policy.name == OURS
    assert after.runtime.stats.hits == after.runtime.stats.misses == 0
    memory.check_integrity()


def test_a_run_is_timed_and_its_gauges_are_read(stage: Stage) -> None:
    plain = time_engine(stage.engine_for(contender("accelerate", 4)), stage.prompts, 4, CONFIG)
    assert [text.tokens for text in plain.texts] == [4] and plain.texts[0].drafted == 0
    gauges = plain.gauges
    assert gauges is not None and gauges.expert_slots == 12 == SETTING.layers * CONFIG.experts // 4
    # Each layer is streamed whole, so every pass of the four watched tokens copies every expert.
    assert gauges.link_bytes == 4 * SETTING.layers * CONFIG.experts * gauges.record_bytes
    assert gauges.record_bytes == record_bytes(CONFIG, "bf16")
    assert gauges.link_seconds > 0 and gauges.link_rate == gauges.link_bytes / gauges.link_seconds
    assert gauges.busy_share is not None and 0 < gauges.busy_share <= 1
    assert gauges.peak_bytes is None  # there is no device that would say
    assert gauges.layer_seconds is None  # and no trunk that runs as recordings
    drafted = time_engine(stage.engine_for(contender("sp-moe", 4)), stage.prompts, 8, CONFIG)
    assert drafted.texts[0].drafted > drafted.texts[0].accepted > 0
    assert drafted.texts[0].passes < 8
    causes = drafted.texts[0].causes
    assert sum(s for c, s in causes.items() if c != "accelerator_experts") == pytest.approx(
        drafted.texts[0].seconds, rel=0.2, abs=0.01
    )


def test_the_hosts_time_of_a_layer_is_what_the_summary_says(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Summary.to_dict
    monkeypatch.setattr(Summary, "to_dict", lambda self: told(self) | {"host_us_per_layer": 120.0})
    found = time_engine(stage.engine_for(contender(OURS_PLAIN, 4)), stage.prompts, 4, CONFIG).gauges
    assert found is not None and found.layer_seconds == pytest.approx(120e-6)


def test_spans_that_overlap_count_once() -> None:
    assert covered([]) == 0
    assert covered([(5, 1), (0, 2), (1, 2), (1.5, 0.1)]) == 4


# ---- the routing that is replayed ----------------------------------------------------------------------------


def test_a_trace_of_the_models_shape_is_replayed(tmp_path: Path) -> None:
    write(tmp_path / "routing.npz", trace(60, sequences=2))
    found = replayed_trace(replace(SETTING, trace=str(tmp_path / "routing.npz")), MODEL)
    assert found.sequences == CONFIG.texts + 1 and found.shape == MODEL
    assert np.array_equal(found.decode_tokens(1).routing, trace(60, sequences=2).decode_tokens(1).routing)


@pytest.mark.parametrize(
    ("tokens", "model", "reason"),
    [
        (20, MODEL, "has not 2 sequences of 32 decoded tokens"),
        (60, replace(MODEL, experts=32), "give a trace of the model's shape"),
        (60, replace(MODEL, layers=4), "give a trace of the model's shape"),
    ],
)
def test_a_trace_that_does_not_fit_is_refused(
    tmp_path: Path, tokens: int, model: ModelShape, reason: str
) -> None:
    write(tmp_path / "routing.npz", trace(tokens, sequences=2))
    with pytest.raises(ConfigError, match=reason):
        replayed_trace(replace(SETTING, trace=str(tmp_path / "routing.npz")), model)


# ---- contenders and jobs -------------------------------------------------------------------------------------


def test_every_policy_runs_and_those_that_speculate_without_drafts_too() -> None:
    found = {each.name: each for each in all_contenders(4)}
    assert {each.policy for each in found.values()} == set(ENGINE_POLICIES)
    assert list(found)[:3] == [OURS, OURS_PLAIN, OURS_UNGOVERNED] and set(STANDARD) <= set(found)
    assert {name: found[name].window for name in (OURS, OURS_PLAIN, OURS_UNGOVERNED)} == {
        OURS: "auto",
        OURS_PLAIN: 0,
        OURS_UNGOVERNED: 4,
    }
    assert found["sp-moe"].window == 4 and found["sp-moe, K = 0"].window == 0
    assert found["hybrimoe"].window == 0 and "hybrimoe, K = 0" not in found  # its system does not speculate
    assert {each.name for each in main_contenders(4)} < set(found)
    for bad in ("nobody", "hybrimoe, K = 0", "belady"):
        with pytest.raises(ConfigError, match="--contenders"):
            contender(bad, 4)


def test_what_the_goals_are_about_comes_first() -> None:
    jobs = jobs_of(Wish(SETTING, (0.17, 0.25), "work"))
    assert [(each.kind, each.model, each.budget) for each in jobs[:5]] == [
        (LINK_JOB, SHAPE, 1.0),
        (ENGINE, SHAPE, 0.17),
        (OFFLOAD_JOB, SHAPE, 0.17),
        (RESIDENT_JOB, SHAPE, 1.0),
        (COMPILED_JOB, SHAPE, 1.0),
    ]
    assert len(jobs[1].runs) == len(all_contenders(4))
    assert {(each.model, each.budget) for each in jobs if each.kind == ENGINE} == {
        (model, budget) for model in (SHAPE, PAIR) for budget in (0.17, 0.25)
    }
    resident = jobs[3]
    assert (resident.layers, resident.tokens) == (CONFIG.resident_layers, CONFIG.resident_tokens)
    assert resident.setting == SETTING  # records of one run can be compared
    assert Job.from_dict(json.loads(json.dumps(jobs[1].to_dict()))) == jobs[1]


def test_the_whole_of_a_default_run_is_planned_for_its_minutes() -> None:
    """The most important part surely, the rest nearly: estimates are generous."""
    setting = replace(SETTING, quick=False, layers=48)
    seconds = [each.seconds for each in jobs_of(Wish(setting, (0.17, 0.25, 0.5), "work"))]
    assert sum(seconds[:7]) < 9 * 60  # the first share whole, the peers, exactness, the pair
    assert sum(seconds[:9]) < 1.1 * 9 * 60  # the shape at the other shares


def test_layers_follow_from_memory() -> None:
    config = GpuBenchConfig()
    layer = 128 * record_bytes(config, "bf16")
    assert layer == 128 * 9437184
    assert layers_that_fit(config, "bf16", 0.5, 120 << 30, 80 << 30) == 48
    assert layers_that_fit(config, "bf16", 0.5, 40 << 30, 80 << 30) == int(0.75 * (40 << 30) / layer)
    assert layers_that_fit(config, "bf16", 0.5, 120 << 30, 24 << 30) == int((12 << 30) / (layer / 2))
    assert layers_that_fit(config, "int4", 0.5, 40 << 30, None) > layers_that_fit(
        config, "bf16", 0.5, 40 << 30, None
    )
    assert layers_that_fit(config, "bf16", 0.5, 1 << 30, 80 << 30) == 0


# ---- time ----------------------------------------------------------------------------------------------------


def test_what_there_is_no_time_for_is_left_out_and_said(tmp_path: Path) -> None:
    """Jobs of 20 seconds that take 25, and 60 to do them in: two are done, the third gets what is left of them."""
    clock = [0.0]
    given: list[float] = []

    def work(task: Job, left: float) -> Iterator[GpuRecord]:
        given.append(task.seconds)
        clock[0] += 25
        yield record_of(task, task.runs[0], OK, "")

    kept: list[GpuRecord] = []
    jobs = [job(tmp_path, runs=(name,), seconds=20.0) for name in "abcd"]
    run_all(jobs, 63, kept.append, lambda done, of: None, lambda: clock[0], work)
    assert [(each.contender, each.status) for each in kept] == [
        ("a", OK),
        ("b", OK),
        ("c", OK),
        ("d", SKIPPED),
    ]
    assert given == [30, 30, 13] and "0 of 63 s were left" in kept[3].reason


def test_runs_that_a_job_has_no_time_for_are_left_out(tmp_path: Path) -> None:
    messages = list(worker.run(job(tmp_path, runs=(OURS, "lru"), seconds=0.0)))
    assert [each["status"] for each in messages] == [SKIPPED, SKIPPED]


# ---- workers -------------------------------------------------------------------------------------------------


def test_a_job_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    found = list(work_off(job(tmp_path, runs=(OURS_PLAIN, "llama.cpp+sd")), left=120))
    assert [(each.contender, each.status, each.reason) for each in found] == [
        (OURS_PLAIN, OK, ""),
        ("llama.cpp+sd", OK, ""),
    ]
    plain, drafted = found
    assert plain.rate > 0 and plain.acceptance is None and not plain.speculated
    assert drafted.speculated and 0 < drafted.acceptance < 1  # type: ignore[operator]
    assert drafted.texts[0].token_ids == plain.texts[0].token_ids
    assert GpuRecord.from_json(plain.to_json()) == plain


def test_after_a_run_that_fails_a_fresh_worker_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in that crashes in every run of "b", and where it is begun anew tells which runs were left."""
    code = (
        "import json, os\n"
        "for name in json.loads(input())['runs']:\n"
        "    if name == 'b': raise ValueError('so it is')\n"
        "    print(json.dumps({'run': {'status': 'missing', 'reason': name}}), flush=True)\n"
    )
    _stand_in(monkeypatch, tmp_path, code)
    found = list(work_off(job(tmp_path, runs=("a", "b", "c", "b", "d")), left=60))
    assert [(each.contender, each.status) for each in found] == [
        ("a", "missing"),
        ("b", FAILED),
        ("c", "missing"),
        ("b", FAILED),
        ("d", "missing"),
    ]
    assert "ValueError: so it is" in found[1].reason
    found = list(work_off(job(tmp_path, runs=("b",) * 6), left=60))
    assert [each.status for each in found] == [FAILED] * 4 + [SKIPPED] * 2  # there is an end to patience


def _stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    """``code`` runs where the worker would."""
    file = folder / "python"
    file.write_text(f"#!{os.sys.executable}\n{code}\n")  # type: ignore[attr-defined]
    file.chmod(0o755)
    monkeypatch.setattr(decode_runs.sys, "executable", str(file))


def test_everything_resident_beside_transformers(tmp_path: Path) -> None:
    for kind in (RESIDENT_JOB, COMPILED_JOB):
        (message,) = worker.run(job(tmp_path, kind, budget=1.0, tokens=6))
        result = Result.from_dict(json.loads(json.dumps(message["result"])))
        assert message["status"] == OK and result.texts[0].tokens == 6
        if kind == RESIDENT_JOB:
            assert result.gauges is not None and result.gauges.link_bytes == 0
            assert result.gauges.expert_slots == SETTING.layers * CONFIG.experts
            assert result.texts[0].hit_rate == 1


def test_accelerates_offloading_computes_what_the_model_does(tmp_path: Path) -> None:
    """With a third of the layers' experts at hand the tokens are those of the same weights without hooks."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from moespac.bench.decode.transformers_model import generate
    from moespac.bench.gpu.peers import _dispatched, _filled, _random_prompts
    from moespac.bench.gpu.shape import write_config

    skeleton = write_config(CONFIG, 3, tmp_path / "shape")
    torch.manual_seed(0)
    model = _filled(skeleton, torch.float32)
    prompt = _random_prompts(CONFIG, 0)[0]
    whole = generate(model, prompt, 5, float("inf")).token_ids
    hooked = _dispatched(model, 1, torch.device("cpu"), tmp_path / "offload")
    away = [name for name, p in hooked.named_parameters() if p.device.type == "meta"]
    assert {name.split(".experts")[0] for name in away} == {"model.layers.1.mlp", "model.layers.2.mlp"}
    assert generate(hooked, prompt, 5, float("inf")).token_ids == whole


# ---- exactness -----------------------------------------------------------------------------------------------


def test_agreement_ends_at_the_first_difference() -> None:
    assert exactness.agreement([1, 2, 3, 4], [1, 2, 9, 4]) == exactness.Agreement(2, 4)
    assert exactness.agreement([1, 2], [1, 2]) == exactness.Agreement(2, 2)
    assert exactness.agreement([1, 2], [1, 2, 3]) == exactness.Agreement(2, 3)


def test_logits_are_compared_in_units_of_their_spread() -> None:
    expected = torch.tensor([[0.0, 4.0], [0.0, 4.0]])
    assert exactness.furthest(expected, expected) == 0
    off = expected + torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    assert exactness.furthest(off, expected) == pytest.approx(1 / float(expected.std()))


# ---- the command ---------------------------------------------------------------------------------------------


def test_the_command_writes_records_a_report_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With results by hand: what the workers do is tested above."""

    def work(task: Job, left: float) -> Iterator[GpuRecord]:
        for number, name in enumerate(task.runs):
            made = record(name, 10.0 + number, drafted=8 if name == "llama.cpp+sd" else 0)
            yield replace(record_of(task, name, OK, ""), result=made.result)

    monkeypatch.setattr(runs, "work_off", work)
    arguments = ["bench", "gpu", "--device", "cpu", "--quick", "--out", str(tmp_path / "out")]
    shown = CliRunner().invoke(app, [*arguments, "--budgets", "17,50", "--layers", "3"])
    assert shown.exit_code == 0, shown.output
    records = read_records(tmp_path / "out" / "gpu.jsonl", "--from")
    assert {each.budget for each in records} == {0.17, 0.5, 1.0}
    text = (tmp_path / "out" / "report.md").read_text()
    assert "its figures say nothing" in text and "3 of 48 layers" in text and "not measured" in text
    for name in ("speed-shape", "time-shape", "speed-pair", "time-pair"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5000 and f"({name}.png)" in text
    again = CliRunner().invoke(app, [*arguments, "--budgets", "17", "--layers", "2"])
    assert again.exit_code == 2 and "another setting (layers: 3, not 2)" in again.output
    only = ["bench", "gpu", "--from", str(tmp_path / "out" / "gpu.jsonl"), "--out", str(tmp_path / "other")]
    assert CliRunner().invoke(app, only).exit_code == 0
    assert (tmp_path / "other" / "report.md").exists()


def test_what_was_measured_before_an_interrupt_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(task: Job, left: float) -> Iterator[GpuRecord]:
        yield replace(record_of(task, task.runs[0], OK, ""), result=record("any", 5.0).result)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "work_off", work)
    shown = CliRunner().invoke(
        app, ["bench", "gpu", "--device", "cpu", "--quick", "--out", str(tmp_path), "--contenders", "lru"]
    )
    assert shown.exit_code == 0 and "stopped" in shown.output
    assert len(read_records(tmp_path / "gpu.jsonl", "--from")) == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--contenders", "nobody"], "--contenders nobody"),
        (["--budgets", "0"], "--budgets"),
        (["--budgets", ","], "--budgets"),
        (["--layers", "1000000"], "memory has room for"),
        (["--trace", "nowhere.npz"], "nowhere.npz"),
        (["--from", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--work", "/proc/nowhere"], "--work"),
        pytest.param(
            ["--device", "cuda"],
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], reason: str) -> None:
    given = ["bench", "gpu", "--device", "cpu", "--quick", "--out", str(tmp_path), *arguments]
    shown = CliRunner().invoke(app, given)
    assert shown.exit_code == 2 and reason in shown.output, shown.output
    assert not (tmp_path / "gpu.jsonl").exists()


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "gpu.jsonl").write_text('{"contender": "lru"}\n')
    with pytest.raises(ConfigError, match="holds no records of `moespac bench gpu`"):
        read_records(tmp_path / "gpu.jsonl", "--from")


def test_names_of_programs_are_not_policies() -> None:
    assert not {OFFLOAD, RESIDENT} & {each.name for each in all_contenders(4)}
