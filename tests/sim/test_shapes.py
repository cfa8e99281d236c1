"""Sizes against what the checkpoints are known to have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moespac.errors import ConfigError, ModelError
from moespac.experts.format import packed_layout
from moespac.model.index import ExpertTensor
from moespac.sim.shapes import FORMATS, MODEL_NAMES, find_model, model_from_config, named_model, read_model
from moespac.types import ModelShape

DENSE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 100}
TINY = DENSE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}


def test_qwen3_30b_a3b_is_the_papers() -> None:
    model = named_model("qwen3-30b-a3b-f16")
    assert model.to_model_shape() == ModelShape(48, 128, 8, 9_437_184)
    assert model.to_model_shape().total == 6144
    assert model.to_model_shape().total * model.expert_bytes == pytest.approx(58e9, rel=0.01)
    assert model.total_weights == pytest.approx(30.53e9, rel=0.001)
    assert model.trunk_bytes == 2 * model.trunk_weights


@pytest.mark.parametrize(
    ("name", "shape", "billions"),
    [
        ("gpt-oss-20b-f16", (24, 32, 4), 20.91),
        ("deepseek-v2-lite-f16", (26, 64, 6), 15.71),
        ("mixtral-8x7b-f16", (32, 8, 2), 46.70),
    ],
)
def test_known_totals(name: str, shape: tuple[int, int, int], billions: float) -> None:
    model = named_model(name)
    assert (model.layers, model.experts, model.top_k) == shape
    assert model.total_weights / 1e9 == pytest.approx(billions, abs=0.01)


def test_deepseek_has_shared_experts_in_its_trunk() -> None:
    model = named_model("deepseek-v2-lite-f16")
    assert model.shared_experts == 2
    assert model.trunk_weights > model.layers * 2 * 3 * 2048 * 1408
    assert named_model("mixtral-8x7b-f16").shared_experts == 0


def test_experts_of_gpt_oss_have_biases() -> None:
    assert named_model("gpt-oss-20b-f16").expert_weights == 3 * 2880**2 + 3 * 2880


@pytest.mark.parametrize("format", ["f32", "bf16", "int8", "int4"])
def test_records_are_as_large_as_the_engines(format: str) -> None:
    tensors = [
        ExpertTensor("gate_up_proj", (192, 64), torch.bfloat16, False),
        ExpertTensor("down_proj", (64, 96), torch.bfloat16, False),
    ]
    assert model_from_config("tiny", TINY, format).expert_bytes == packed_layout(tensors, format).nbytes


def test_mxfp4_takes_a_scale_every_32_weights() -> None:
    model = named_model("gpt-oss-20b-mxfp4")
    matrices = 3 * 2880 * 2880 * 17 // 32
    assert matrices < model.expert_bytes <= matrices + 2 * 3 * 2880 + 4096
    assert model.trunk_bytes == 2 * model.trunk_weights


def test_layers_that_are_not_moe_are_trunk() -> None:
    """Of six layers the second, fourth and sixth have experts by their step; the fourth is excepted."""
    dims = TINY | {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    dense = model_from_config("m", dims | {"intermediate_size": 200}, "f32")
    assert dense.layers == 2
    thinner = model_from_config("m", dims | {"intermediate_size": 100}, "f32")
    assert dense.trunk_weights - thinner.trunk_weights == 4 * 3 * 64 * 100


def test_tied_embeddings_are_held_once() -> None:
    own, tied = (model_from_config("m", TINY | {"tie_word_embeddings": t}, "bf16") for t in (False, True))
    assert own.embedding_weights == 100 * 64 and tied.embedding_weights == 0
    assert own.trunk_weights == tied.trunk_weights
    assert own.resident_bytes - tied.resident_bytes == 2 * 100 * 64


def test_a_config_file_says_the_same_as_its_name(tmp_path: Path) -> None:
    """With the keys around it that a multimodal checkpoint has, by file and by directory."""
    (tmp_path / "config.json").write_text(json.dumps({"text_config": TINY, "vision_config": {}}))
    for path in (tmp_path, tmp_path / "config.json"):
        model = find_model(str(path), "int4")
        assert model.name == f"{tmp_path.name}-int4"
        assert model.expert_bytes == model_from_config("", TINY, "int4").expert_bytes
    assert find_model(str(tmp_path)).format == "bf16"


def test_every_name_and_format_works() -> None:
    for name in MODEL_NAMES:
        assert find_model(name).name == name
    sizes = [model_from_config("", TINY, format).expert_bytes for format in FORMATS]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "is not a configuration"),
        (json.dumps(DENSE), "has no num_experts or"),
        (json.dumps(TINY | {"hidden_size": "wide"}), "has no hidden_size"),
        (json.dumps(TINY | {"vocab_size": 0}), "has no vocab_size"),
    ],
)
def test_files_that_are_no_moe(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ModelError, match=message) as caught:
        read_model(file, "bf16")
    assert "\n" not in str(caught.value)


def test_names_and_formats_that_do_not_exist() -> None:
    with pytest.raises(ConfigError, match="choose one of qwen3-30b-a3b-f16"):
        named_model("qwen")
    with pytest.raises(ConfigError, match="unknown format 'q3'"):
        model_from_config("", TINY, "q3")
    with pytest.raises(ConfigError, match="has its own"):
        find_model("mixtral-8x7b-f16", "int4")
