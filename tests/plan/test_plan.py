"""Planning: sizes are the engine's own, predictions move the right way, and whatever is wrong is one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from typer.testing import CliRunner, Result

import moespac
from moespac import host_memory
from moespac.cli import app
from moespac.config import DeviceConfig, PlanConfig
from moespac.engine.build import DEMO
from moespac.errors import ModelError
from moespac.experts.budget import DeviceNeeds, device_slots
from moespac.experts.pack import pack
from moespac.plan import advise
from moespac.plan.advise import Machine, Workload, make_plan
from moespac.plan.machine import named_machine
from moespac.plan.model import PlannedModel, read_planned_model
from moespac.plan.predict import Case, predict, predict_speed
from moespac.sim.hardware import find_profile
from moespac.sim.shapes import read_model
from moespac.types import Capacity
from tests.families import save_checkpoint

QUICK = PlanConfig(layers=2, tokens=16)
LAPTOP = named_machine("laptop-cpu-nvme")
QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "intermediate_size": 6144, "vocab_size": 151936,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> PlannedModel:
    path = tmp_path_factory.mktemp("qwen")
    (path / "config.json").write_text(json.dumps(QWEN3_30B))
    return read_planned_model(str(path))


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, words)])


# ---- what a model is -----------------------------------------------------------------------------------


def test_sizes_follow_from_the_configuration_alone(qwen: PlannedModel, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    by_arithmetic = read_model(tmp_path, "int4")
    assert qwen.record_bytes["int4"] == by_arithmetic.expert_bytes
    assert qwen.expert_weights == by_arithmetic.expert_weights
    assert qwen.embedding_weights == by_arithmetic.embedding_weights
    assert qwen.trunk_weights == pytest.approx(
        by_arithmetic.trunk_weights, rel=1e-3
    )  # norms are left out there
    assert qwen.stored_bytes is None


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v2", "mixtral"])
def test_sizes_are_those_of_the_engine(family: str, tmp_path: Path) -> None:
    path = save_checkpoint(family, tmp_path / "model")
    planned = read_planned_model(str(path))
    pack(path, tmp_path / "int8", "int8", progress=False)
    with moespac.load(tmp_path / "int8", draft="none", profile=None) as engine:
        assert planned.record_bytes["int8"] == engine.shape.record_bytes
        assert (planned.layers, planned.experts, planned.top_k) == (
            engine.shape.layers, engine.shape.experts, engine.shape.top_k,
        )  # fmt: skip
        held = sum(parameter.numel() for parameter in engine.model.parameters())
    assert planned.trunk_weights + planned.embedding_weights == held
    of_pack = read_planned_model(str(tmp_path / "int8"))
    assert of_pack.formats == ("int8",) and of_pack.record_bytes == {"int8": engine.shape.record_bytes}


class Hub:
    """What the Hub says of one model; it has no weights to give."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (path / "config.json").write_text(json.dumps(QWEN3_30B))
        tensor = TensorInfo(dtype="BF16", shape=[10, 100], data_offsets=(0, 2000))
        files = {f"model-{i}.safetensors": SafetensorsFileMetadata({}, {f"a{i}": tensor}) for i in range(3)}
        metadata = SafetensorsRepoMetadata(None, True, {}, files)
        asked: list[str] = []

        def download(name: str, file: str) -> str:
            asked.append(file)
            return str(path / file)

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, timeout: None)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda name: metadata)
        self.asked = asked


def test_of_a_model_on_the_hub_only_configuration_and_headers_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qwen: PlannedModel
) -> None:
    hub = Hub(tmp_path, monkeypatch)
    found = read_planned_model("Qwen/Qwen3-30B-A3B")
    assert hub.asked == ["config.json"]
    assert found.stored_bytes == 3 * 2000 and found.stored_format == "bf16"
    assert replace(found, name=qwen.name, stored_bytes=None) == qwen


def test_offline_a_hub_id_is_one_line() -> None:  # the tests run offline
    result = run("Qwen/Qwen3-30B-A3B", "--hardware", "laptop-cpu-nvme")
    assert result.exit_code == 2 and len(result.output.strip().splitlines()) == 1
    assert "the Hub has no answer" in result.output and "Traceback" not in result.output


def test_what_is_no_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        read_planned_model("nowhere")
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_planned_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    with pytest.raises(ModelError, match="dense model"):
        read_planned_model(str(tmp_path))
    for words in (
        ("nowhere",),
        (DEMO / "target", "--hardware", "no-such"),
        (DEMO / "target", "--format", "q2"),
    ):
        result = run(*words, "--hardware", "laptop-cpu-nvme") if "--hardware" not in words else run(*words)
        assert result.exit_code == 2 and result.output.startswith("error: "), result.output


# ---- what is predicted ---------------------------------------------------------------------------------


def test_more_memory_and_fewer_bytes_are_faster(qwen: PlannedModel) -> None:
    hardware = find_profile("laptop-cpu-nvme")
    total = qwen.layers * qwen.experts

    def speed(format: str, share: float) -> float:
        return predict(Case(hardware, qwen.to_sim_model(format, 2), Capacity(int(total * share))), QUICK)

    assert speed("int4", 0.2) < speed("int4", 0.5) < speed("int4", 1.0)
    assert speed("bf16", 0.5) < speed("int8", 0.5) < speed("int4", 0.5)


def test_a_few_layers_stand_for_all(qwen: PlannedModel) -> None:
    case = Case(find_profile("laptop-cpu-nvme"), qwen.to_sim_model("int4", 2), Capacity(6144 // 2))
    few, more = (predict(case, replace(QUICK, layers=layers)) for layers in (3, 12))
    assert few == pytest.approx(more, rel=0.15)


def test_the_range_holds_the_typical_speed(qwen: PlannedModel) -> None:
    speed = predict_speed(Case(LAPTOP.hardware, qwen.to_sim_model("int4", 2), Capacity(1500)), QUICK)
    assert 0 < speed.low < speed.typical < speed.high


# ---- what is advised -----------------------------------------------------------------------------------


def test_a_plan_by_hand(qwen: PlannedModel) -> None:
    plan = make_plan(Workload(qwen), LAPTOP, QUICK, format="int4")
    assert plan.fits and plan.option is not None and plan.tiers == ("host memory", "storage")
    free = LAPTOP.host_bytes - 4 * (qwen.trunk_weights + qwen.embedding_weights) - QUICK.reserve_bytes
    free -= (
        48 * 2 * 4 * 128 * 4 * 8192 * 3 // 2
    )  # layers, keys and values, heads, width, bytes, tokens, growing
    slots = free // qwen.record_bytes[plan.option.format]
    assert plan.option.budgets.capacity == Capacity(slots, 0)
    factors = {change.name: change.factor for change in plan.changes}
    assert factors["twice the host memory"] > 1.02
    assert list(factors.values()) == sorted(factors.values(), reverse=True)
    bigger = make_plan(
        Workload(qwen), replace(LAPTOP, host_bytes=2 * LAPTOP.host_bytes), QUICK, format=plan.option.format
    )
    assert bigger.option is not None
    gain = bigger.option.tokens_per_second / plan.option.tokens_per_second
    assert gain == pytest.approx(factors["twice the host memory"])


def test_an_accelerators_memory_by_hand(qwen: PlannedModel) -> None:
    machine = named_machine("rtx3060-12gb")
    plan = make_plan(Workload(qwen), machine, QUICK, format="int4")
    assert plan.option is not None and plan.tiers[0] == "accelerator memory"
    budgets, config = plan.option.budgets, DeviceConfig()
    assert budgets.trunk == 2 * (qwen.trunk_weights + qwen.embedding_weights)
    kv_cache = (
        48 * 2 * 4 * 128 * 2 * 8192 * 1.5
    )  # layers, keys and values, heads, width, bytes, tokens, growing
    assert budgets.needs == DeviceNeeds(int(kv_cache), config.graph_pool, config.reserve)
    free = machine.accelerator_bytes - budgets.trunk  # as the engine finds it
    shape = qwen.to_sim_model("int4", 2).to_model_shape()
    assert budgets.capacity.accelerator == device_slots("auto", shape, free, budgets.needs) > 0
    full = replace(machine, accelerator_bytes=budgets.trunk + budgets.needs.total)
    assert "GB of accelerator memory" in make_plan(Workload(qwen), full, QUICK, format="int4").verdict


def test_what_does_not_fit_says_how_much_is_missing(qwen: PlannedModel) -> None:
    small = Machine(LAPTOP.hardware, host_bytes=2 << 30, accelerator_bytes=0)
    plan = make_plan(Workload(qwen), small, QUICK)
    assert not plan.fits and plan.speed is None
    assert "does not fit" in plan.verdict and "2.15 GB are free (as given)" in plan.verdict


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advise, "PlanConfig", lambda: QUICK)
    file = tmp_path / "plan.json"
    result = run(DEMO / "target", "--hardware", "rtx3060-12gb", "--format", "int4", "--json", file)
    assert result.exit_code == 0, result.output
    assert "tokens/s" in result.output and "--accelerator-memory 100%" in result.output
    assert "for the trunk" in result.output and "for KV caches" in result.output
    plan = json.loads(file.read_text())
    assert plan["fits"] and plan["speed"]["low"] < plan["speed"]["high"]
    assert [each["format"] for each in plan["options"]] == ["int4"]


# ---- memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "1000\n", "memory.current": "400\n"}, (1000, 400)),
        ({"memory.max": "max\n", "memory.current": "400\n"}, None),
        ({"memory/memory.limit_in_bytes": "800\n", "memory/memory.usage_in_bytes": "1\n"}, (800, 1)),
        ({"memory/memory.limit_in_bytes": f"{2**63 - 4096}\n", "memory/memory.usage_in_bytes": "1\n"}, None),
        ({}, None),
    ],
)
def test_a_containers_limit_counts(files: dict[str, str], expected: object, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert host_memory.container_limit(tmp_path) == expected
