"""What lies beside the experts: a draft model, KV caches for a context, and memory that is said to be free."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from typer.testing import CliRunner, Result

from moespac.cli import app
from moespac.config import DeviceConfig, PlanConfig
from moespac.engine.build import DEMO
from moespac.errors import ConfigError, DraftError, ModelError
from moespac.experts.budget import DeviceNeeds, device_slots
from moespac.experts.pack import pack
from moespac.model.kv_size import kv_cache
from moespac.model.load import load_tokenizer
from moespac.plan import advise
from moespac.plan.advise import Plan, Workload, make_plan
from moespac.plan.draft import PlannedDraft, read_planned_draft
from moespac.plan.machine import named_machine, with_free
from moespac.plan.model import PlannedModel, read_planned_model
from moespac.speculate.drafters import load_draft_model
from tests.plan.test_plan import QUICK, QWEN3_30B

LAPTOP, CARD = named_machine("laptop-cpu-nvme"), named_machine("rtx3060-12gb")
GIB = 1 << 30
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072,
    "vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": True,
}  # fmt: skip
WEIGHTS = (
    151936 * 1024 + 28 * (2 * 1024 * 2048 + 2 * 1024 * 1024 + 3 * 1024 * 3072 + 2 * 1024 + 2 * 128) + 1024
)
KV_30B, KV_06B = 48 * 2 * 4 * 128, 28 * 2 * 8 * 128  # layers, keys and values, heads, width: numbers a token


def save(path: Path, config: dict[str, object], **changes: object) -> str:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config | changes))
    return str(path)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("target"), QWEN3_30B, max_position_embeddings=40960)


@pytest.fixture(scope="module")
def model(target: str) -> PlannedModel:
    return read_planned_model(target)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory, target: str, model: PlannedModel) -> PlannedDraft:
    return read_planned_draft(save(tmp_path_factory.mktemp("draft"), QWEN3_06B), target, model)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advise, "PlanConfig", lambda: QUICK)


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, words)], env={"COLUMNS": "200"})


def budgets(plan: Plan) -> advise.Budgets:
    assert plan.option is not None, plan.verdict
    return plan.option.budgets


# ---- a draft model -------------------------------------------------------------------------------------


def test_a_draft_models_sizes_by_hand(draft: PlannedDraft) -> None:
    assert draft.weights == draft.read_weights == WEIGHTS  # its embedding is the head too, and read
    assert draft.kv_cache.token_bytes == 2 * KV_06B and draft.kv_cache.longest == 40960
    assert draft.stored_bytes is None


def test_its_sizes_are_those_of_the_engine() -> None:
    source, target = str(DEMO / "draft"), str(DEMO / "target")
    model = read_planned_model(target)
    planned = read_planned_draft(source, target, model)
    loaded = load_draft_model(source, model.vocabulary, load_tokenizer(DEMO / "target"), torch.bfloat16)
    assert planned.weights == sum(parameter.numel() for parameter in loaded.parameters())
    assert planned.kv_cache == kv_cache(loaded.config, 2)
    assert planned.stored_bytes == 2 * planned.weights


def test_on_an_accelerator_it_lies_beside_the_trunk(model: PlannedModel, draft: PlannedDraft) -> None:
    plan = make_plan(Workload(model, draft, context=1000), CARD, QUICK, format="int4")
    found, config = budgets(plan), DeviceConfig()
    assert found.draft == 2 * WEIGHTS
    assert found.needs == DeviceNeeds(
        int(2 * (KV_30B + KV_06B) * 1000 * 1.5), config.graph_pool, config.reserve
    )
    free = CARD.accelerator_bytes - found.trunk - 2 * WEIGHTS  # as the engine finds it, both being loaded
    shape = model.to_sim_model("int4", 2).to_model_shape()
    assert found.capacity.accelerator == device_slots("auto", shape, free, found.needs)
    alone = budgets(make_plan(Workload(model, context=1000), CARD, QUICK, format="int4"))
    fewer = alone.capacity.accelerator - found.capacity.accelerator
    assert fewer == pytest.approx((2 * WEIGHTS + 2 * KV_06B * 1500) / shape.record_bytes, abs=1)
    assert alone.host == found.host


def test_without_an_accelerator_it_takes_host_memory_in_32_bits(
    model: PlannedModel, draft: PlannedDraft
) -> None:
    plan = make_plan(Workload(model, draft, context=1000), LAPTOP, QUICK, format="int4")
    trunk, caches = 4 * (model.trunk_weights + model.embedding_weights), 4 * (KV_30B + KV_06B) * 1500
    free = LAPTOP.host_bytes - trunk - 4 * WEIGHTS - caches - QUICK.reserve_bytes
    assert budgets(plan).capacity.host == free // model.record_bytes["int4"]
    assert budgets(plan).needs == DeviceNeeds(caches, 0, QUICK.reserve_bytes)


def test_it_costs_memory_and_promises_nothing(model: PlannedModel, draft: PlannedDraft) -> None:
    alone = make_plan(Workload(model), CARD, QUICK, format="int4")
    beside = make_plan(Workload(model, draft), CARD, QUICK, format="int4")
    assert (
        alone.speed and beside.speed and beside.speed.typical < alone.speed.typical
    )  # less room for experts
    assert alone.drafting == () and any("a draft model" in change.name for change in alone.changes)
    assert [each.acceptance for each in beside.drafting] == list(PlanConfig.acceptances)
    speeds = [each.tokens_per_second for each in beside.drafting]
    assert speeds == sorted(speeds) and speeds[0] < speeds[-1]
    assert not any("a draft model" in change.name for change in beside.changes)


def test_what_does_not_fit_beside_a_draft_model(model: PlannedModel, draft: PlannedDraft) -> None:
    trunk = 2 * (model.trunk_weights + model.embedding_weights)
    enough = trunk + budgets(make_plan(Workload(model), CARD, QUICK, "int4")).needs.total
    small = replace(CARD, accelerator_bytes=enough + 8 * model.record_bytes["int4"])
    assert make_plan(Workload(model), small, QUICK, "int4").fits
    plan = make_plan(Workload(model, draft), small, QUICK, "int4")
    needed = small.accelerator_bytes + 2 * WEIGHTS + 2 * KV_06B * 8192 * 1.5
    assert f"need {needed / 1e9:.2f} GB of accelerator memory" in plan.verdict
    assert "without the draft model it fits" in plan.verdict
    assert "without" not in make_plan(Workload(model), replace(CARD, accelerator_bytes=GIB), QUICK).verdict


def test_what_the_engine_refuses_is_refused(target: str, model: PlannedModel, tmp_path: Path) -> None:
    def refused(source: str, error: type[ModelError], why: str, target: str = target) -> None:
        with pytest.raises(error, match=why):
            read_planned_draft(source, target, read_planned_model(target))

    refused(save(tmp_path / "other", QWEN3_06B, vocab_size=32000), DraftError, "vocabulary of 32000")
    refused(str(DEMO / "draft"), DraftError, "vocabulary of")
    refused("nowhere", ModelError, "no such directory")
    quantised = save(tmp_path / "fp8", QWEN3_06B, quantization_config={"quant_method": "fp8"})
    refused(quantised, DraftError, "quantised already")
    pack(DEMO / "target", tmp_path / "packed", "int8", progress=False)
    refused(str(tmp_path / "packed"), DraftError, "is a pack", str(DEMO / "target"))
    recurrent = {"model_type": "mamba", "vocab_size": 151936, "hidden_size": 64, "num_hidden_layers": 2}
    refused(save(tmp_path / "mamba", recurrent), DraftError, "recurrent layers")


def test_of_a_draft_model_on_the_hub_only_configuration_and_headers_are_read(
    target: str, model: PlannedModel, draft: PlannedDraft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = save(tmp_path / "hub", QWEN3_06B)
    tensors = {"a": TensorInfo(dtype="BF16", shape=[1000], data_offsets=(0, 2000))}
    metadata = SafetensorsRepoMetadata(None, False, {}, {"model": SafetensorsFileMetadata({}, tensors)})
    asked: list[str] = []

    def download(name: str, file: str) -> str:
        asked.append(file)
        return str(Path(place) / file)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, timeout: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda name: metadata)
    found = read_planned_draft("Qwen/Qwen3-0.6B", target, model)
    assert found == replace(draft, name="Qwen/Qwen3-0.6B", stored_bytes=2000) and asked == ["config.json"]
    save(tmp_path / "hub", QWEN3_06B, vocab_size=32000)
    with pytest.raises(DraftError, match=r"the draft model at Qwen/Qwen3-0\.6B has a vocabulary of 32000"):
        read_planned_draft("Qwen/Qwen3-0.6B", target, model)


# ---- the context ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("context", "tokens"), [(100, 100), (8192, 8192), (1 << 20, 40960)])
def test_the_context_takes_memory_up_to_the_models_longest(
    context: int, tokens: int, model: PlannedModel
) -> None:
    machine = named_machine("rtx4090-pcie4")
    plan = make_plan(Workload(model, context=context), machine, QUICK, format="int4")
    assert budgets(plan).needs.kv_cache == 2 * KV_30B * tokens * 3 // 2


# ---- free memory ---------------------------------------------------------------------------------------


def test_what_is_said_to_be_free_is_taken_as_it_is(model: PlannedModel) -> None:
    machine = with_free(CARD, "20GiB", "9.5 GiB", host_most=None)
    assert (machine.host_bytes, machine.accelerator_bytes) == (20 * GIB, 19 * GIB // 2)
    plan = make_plan(Workload(model), machine, QUICK, format="int4")
    host = (20 * GIB - QUICK.reserve_bytes) // model.record_bytes["int4"]
    assert budgets(plan).capacity.host == min(host, 48 * 128)
    room = 19 * GIB // 2 - budgets(plan).trunk - budgets(plan).needs.total
    assert budgets(plan).capacity.accelerator == room // model.record_bytes["int4"]
    assert plan.free.host_source == plan.free.accelerator_source == "as given"
    assert with_free(CARD, None, None, None) == CARD and "assumed: 90%" in CARD.host_source


def test_another_machine_may_have_more_host_memory_than_its_profile(model: PlannedModel) -> None:
    more = with_free(LAPTOP, "64GiB", None, host_most=None)
    assert more.host_bytes == 64 * GIB and "more than its profile's 17.2 GB" in more.host_source
    with pytest.raises(ConfigError, match=r"--host-free 64GiB: .* has 34\.4 GB"):
        with_free(LAPTOP, "64GiB", None, host_most=32 * GIB)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--host-free", "20XB"), "--host-free 20XB: not an amount of memory"),
        (("--host-free", "25%"), "not an amount of memory"),
        (("--host-free", "auto"), "not an amount of memory"),
        (("--host-free", "9" * 400), "not an amount of memory"),
        (("--accelerator-free", "lots"), "--accelerator-free lots: not an amount"),
        (("--accelerator-free", "24GiB"), "--accelerator-free 24GiB: rtx3060-12gb has 12.9 GB"),
        (("--accelerator-free", "1GiB", "--hardware", "laptop-cpu-nvme"), "has no accelerator"),
        (("--draft", "nowhere"), "nowhere: no such directory"),
    ],
)
def test_what_cannot_be_is_one_line(words: tuple[str, ...], why: str) -> None:
    hardware = () if "--hardware" in words else ("--hardware", "rtx3060-12gb")
    result = run(DEMO / "target", *words, *hardware)
    assert result.exit_code == 2 and len(result.output.strip().splitlines()) == 1, result.output
    assert result.output.startswith("error: ") and why in result.output


# ---- the command ---------------------------------------------------------------------------------------


def test_the_command_says_what_it_reckons_with(quick: None, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    result = run(
        DEMO / "target", "--draft", DEMO / "draft", "--accelerator-context", 1000, "--accelerator-free", "2GiB",
        "--hardware", "rtx3060-12gb", "--format", "int8", "--json", file,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    flags = next(line for line in result.output.splitlines() if line.startswith("flags"))
    assert flags.split(maxsplit=1)[1] == (
        f"--host-memory 100% --accelerator-memory 100% --accelerator-context 1000 --draft {DEMO / 'draft'}"
    )
    assert "2.15 GB free (as given)" in result.output and "30.9 GB free (assumed: 90% of" in result.output
    assert "without drafts" in result.output and "tokens/s if 50% of its drafts are accepted" in result.output
    plan = json.loads(file.read_text())
    assert plan["draft"] == "draft" and plan["context"] == 1000
    assert plan["free"]["accelerator"] == 2 * GIB and plan["free"]["accelerator_source"] == "as given"
    assert plan["option"]["budgets"]["draft"] == 2 * read_planned_draft(
        str(DEMO / "draft"), str(DEMO / "target"), read_planned_model(str(DEMO / "target"))
    ).weights  # fmt: skip
    assert [each["acceptance"] for each in plan["drafting"]] == list(QUICK.acceptances)


def test_nothing_free_does_not_fit(quick: None) -> None:
    result = run(DEMO / "target", "--host-free", "0", "--hardware", "laptop-cpu-nvme")
    assert result.exit_code == 1 and "does not fit" in result.output and "as given" in result.output
