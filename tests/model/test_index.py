"""The index finds every family's experts, wherever its checkpoint keeps them, and says what it cannot read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import Transpose, WeightConverter

from moespac.errors import CheckpointError, ModelError
from moespac.experts.format import stored_layout
from moespac.experts.store import CheckpointStore
from moespac.model import index as index_module
from moespac.model.index import build_index
from moespac.model.skeleton import build_skeleton, supported_families
from tests.families import FAMILIES, build_model, save_checkpoint


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard_bytes", ["5GB", "30KB"])
def test_every_expert_is_found_byte_for_byte(tmp_path, family: str, shard_bytes: str) -> None:
    check_all_experts(save_checkpoint(family, tmp_path, shard_bytes), family)


def check_all_experts(path: Path, family: str) -> None:
    skeleton = build_skeleton(path)
    store = CheckpointStore(build_index(path, skeleton))
    modules = dict(build_model(family).named_modules())
    layout = store.layout
    record = torch.empty(layout.nbytes, dtype=torch.uint8)
    for layer, name in enumerate(skeleton.experts):
        module = modules[name]
        for expert in range(store.shape.experts):
            store.read_into(layer * store.shape.experts + expert, record.numpy())
            for parameter, weight in layout.weights(record, torch.float32).items():
                own = getattr(module, parameter)[expert]
                own = own.t() if module.is_transposed and own.dim() == 2 else own
                assert torch.equal(weight, own), (name, expert, parameter)
    store.close()


def test_experts_that_the_checkpoint_stores_flipped(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some families (qwen3_vl_moe) store (in, out) where their module wants (out, in)."""
    from safetensors.torch import load_file, save_file

    path = save_checkpoint("granitemoe", tmp_path)
    tensors = load_file(path / "model.safetensors")
    flipped = {k: v.transpose(1, 2).contiguous() if v.dim() == 3 else v for k, v in tensors.items()}
    save_file(flipped, path / "model.safetensors", metadata={"format": "pt"})
    own = index_module.get_model_conversion_mapping
    converters = [
        WeightConverter([source], [f"block_sparse_moe.experts.{target}"], operations=[Transpose(1, 2)])
        for source, target in [
            ("block_sparse_moe.experts.gate_up_proj", "gate_up_proj"),
            ("block_sparse_moe.experts.down_proj", "down_proj"),
        ]
    ]
    monkeypatch.setattr(
        index_module, "get_model_conversion_mapping", lambda model: [*own(model), *converters]
    )
    check_all_experts(path, "granitemoe")


def test_the_promised_families_are_supported() -> None:
    assert set(FAMILIES) <= set(supported_families())
    assert len(supported_families()) > 30


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("llama4_text", "does not use transformers' experts interface.*qwen3_moe"),
        ("jetmoe", "jetmoe"),
        ("llama", "dense"),
    ],
)
def test_other_models_are_refused_by_name(tmp_path, family: str, says: str) -> None:
    AutoConfig.for_model(family, num_hidden_layers=2, hidden_size=32, intermediate_size=32).save_pretrained(
        tmp_path
    )
    with pytest.raises(ModelError, match=says):
        build_skeleton(tmp_path)


def test_an_already_quantised_checkpoint_is_refused(tmp_path) -> None:
    path = save_checkpoint("gpt_oss", tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"already quantised.*mxfp4"):
        build_skeleton(path)


def test_missing_and_empty_directories(tmp_path) -> None:
    with pytest.raises(ModelError, match="no such model directory"):
        build_skeleton(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"no config\.json"):
        build_skeleton(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be used"):
        build_skeleton(tmp_path)


def damage(path, how: str) -> None:
    file = path / "model.safetensors"
    data = file.read_bytes()
    if how == "truncated":
        file.write_bytes(data[:-100])
    elif how == "cut in the header":
        file.write_bytes(data[:40])
    elif how == "corrupt header":
        file.write_bytes(data[:8] + b"\xff" * 32 + data[40:])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "gone":
        file.unlink()


@pytest.mark.parametrize("how", ["truncated", "cut in the header", "corrupt header", "empty", "gone"])
def test_damaged_files_are_named(tmp_path, how: str) -> None:
    path = save_checkpoint("qwen3_moe", tmp_path)
    damage(path, how)
    with pytest.raises(CheckpointError) as caught:
        build_index(path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_expert_is_named(tmp_path) -> None:
    config = AutoConfig.from_pretrained(save_checkpoint("qwen3_moe", tmp_path))
    config.num_experts = 7
    fewer = AutoModelForCausalLM.from_config(config)
    fewer.save_pretrained(tmp_path)
    config.num_experts = 8
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="expert 7 of MoE layer 0"):
        build_index(tmp_path)


def test_the_stored_layout_keeps_orientation(tmp_path) -> None:
    index = build_index(save_checkpoint("gpt_oss", tmp_path))
    assert [t.transposed for t in stored_layout(index.tensors).tensors] == [True, False, True, False]
