"""A widened model computes the same function, and nothing but its experts has grown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moespac.config import PackConfig
from moespac.errors import ConfigError, ModelError, PackError
from moespac.model.index import build_index
from moespac.model.inflate import inflate
from tests.families import VOCABULARY, save_checkpoint


def logits(directory: Path) -> torch.Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokens = torch.arange(24)[None] * 5 % VOCABULARY
    with torch.no_grad():
        return model.eval()(tokens).logits


# Per expert on disk; fused; fused, transposed, interleaved and biased; with dense layers beside.
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe", "gpt_oss", "mixtral", "qwen2_moe"])
def test_logits_stay_the_same(family: str, factor: int, tmp_path: Path) -> None:
    source = save_checkpoint(family, tmp_path / "source")
    inflate(source, tmp_path / "wide", factor, progress=False)
    torch.testing.assert_close(logits(tmp_path / "wide"), logits(source), rtol=1e-5, atol=1e-5)
    before, after = build_index(source), build_index(tmp_path / "wide")
    biases = sum(
        t.shape[0] * t.dtype.itemsize * (factor if t.name.startswith("gate") else 1)
        for t in before.tensors
        if t.name.endswith("_bias")
    )
    matrices = sum(
        t.shape[0] * t.shape[1] * t.dtype.itemsize for t in before.tensors if not t.name.endswith("_bias")
    )
    assert after.expert_bytes == factor * matrices + biases
    assert set(after.entries) == set(before.entries)
    assert [after.entries[key].nbytes for key in after.trunk_keys] == [
        before.entries[key].nbytes for key in before.trunk_keys
    ]


def test_factor_one_is_a_copy(tmp_path: Path) -> None:
    source = save_checkpoint("qwen3_moe", tmp_path / "source")
    inflate(source, tmp_path / "copy", 1, progress=False)
    before, after = (
        load_file(source / "model.safetensors"),
        load_file(tmp_path / "copy" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_large_models_are_sharded(tmp_path: Path) -> None:
    source = save_checkpoint("gpt_oss", tmp_path / "source")
    inflate(source, tmp_path / "wide", 2, progress=False, config=PackConfig(shard_bytes=60_000))
    shards = sorted((tmp_path / "wide").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(shard.stat().st_size < 70_000 or len(load_file(shard)) == 1 for shard in shards)
    weight_map = json.loads((tmp_path / "wide" / "model.safetensors.index.json").read_text())["weight_map"]
    assert {file.name for file in shards} == set(weight_map.values())
    torch.testing.assert_close(logits(tmp_path / "wide"), logits(source), rtol=1e-5, atol=1e-5)


def test_progress_tells_all_bytes(tmp_path: Path) -> None:
    source = save_checkpoint("qwen3_moe", tmp_path / "source")
    told: list[tuple[int, int]] = []
    inflate(source, tmp_path / "wide", 2, progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] > 0


def test_experts_that_cannot_be_widened_alone_are_refused(tmp_path: Path) -> None:
    """DeepSeek's shared experts take their width from the same key."""
    source = save_checkpoint("deepseek_v3", tmp_path / "source")
    with pytest.raises(ModelError, match="shared experts share the experts' width"):
        inflate(source, tmp_path / "wide", 2, progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("factor", [0, -1, 1.5])
def test_bad_factors_are_refused(factor: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="whole number"):
        inflate(tmp_path, tmp_path / "wide", factor, progress=False)


def test_an_existing_destination_is_refused(tmp_path: Path) -> None:
    source = save_checkpoint("qwen3_moe", tmp_path / "source")
    with pytest.raises(ConfigError, match="exists already"):
        inflate(source, source, 2, progress=False)
    assert (source / "model.safetensors").exists()


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    source = save_checkpoint("qwen3_moe", tmp_path / "source")

    def fail(done: int, total: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(PackError, match="No space"):
        inflate(source, tmp_path / "wide", 2, progress=fail)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]
