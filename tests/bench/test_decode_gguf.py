"""The GGUF file: names, keys, values, and that llama.cpp computes with it what this engine does."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import moespac
from moespac.bench.decode.contenders import parse_contenders
from moespac.bench.decode.gguf_file import write_gguf
from moespac.bench.decode.prompts import BUILT_IN, WARMUP, tokenize
from moespac.bench.decode.task import Task
from moespac.config import DecodeBenchConfig
from moespac.engine.build import DEMO
from moespac.errors import ModelError

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed: pip install moespac[bench]")
EXPERT = "model.layers.3.mlp.experts.17.{}_proj.weight"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded pair in float32, and the target in 8 and 4 bits."""
    folder = tmp_path_factory.mktemp("gguf")
    made = {format: folder / f"{format}.gguf" for format in ("f32", "bf16", "int8", "int4")}
    for format, file in made.items():
        write_gguf(DEMO / "target", file, format, progress=False)
    made["draft"] = folder / "draft.gguf"
    write_gguf(DEMO / "draft", made["draft"], "f32", progress=False)
    return made


def tensors(file: Path) -> dict:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def original(key: str) -> np.ndarray:
    with safe_open(DEMO / "target/model.safetensors", "pt") as checkpoint:
        return checkpoint.get_tensor(key).float().numpy()


def values(tensor) -> np.ndarray:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def test_every_tensor_has_its_name_and_its_values(files: dict[str, Path]) -> None:
    found = tensors(files["f32"])
    layer = {
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_output",
        "attn_q_norm",
        "attn_k_norm",
        "attn_norm",
        "ffn_norm",
    }
    layer |= {"ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}
    names = {f"blk.{number}.{name}.weight" for number in range(8) for name in layer}
    assert found.keys() == names | {"token_embd.weight", "output_norm.weight"}  # tied: no output.weight
    for name in ("gate", "up", "down"):
        stacked = values(found[f"blk.3.ffn_{name}_exps.weight"])
        assert stacked.shape == ((32, 192, 64) if name == "down" else (32, 64, 192))
        np.testing.assert_array_equal(stacked[17], original(EXPERT.format(name)))
    np.testing.assert_array_equal(
        values(found["blk.5.attn_output.weight"]), original("model.layers.5.self_attn.o_proj.weight")
    )
    np.testing.assert_array_equal(values(found["token_embd.weight"]), original("model.embed_tokens.weight"))


@pytest.mark.parametrize(
    ("format", "kind", "error"), [("bf16", "BF16", 0), ("int8", "Q8_0", 0.01), ("int4", "Q4_0", 0.15)]
)
def test_experts_have_the_wanted_type_and_stay_near(
    files: dict[str, Path], format: str, kind: str, error: float
) -> None:
    found = tensors(files[format])
    tensor = found["blk.3.ffn_up_exps.weight"]
    assert tensor.tensor_type.name == kind
    exact = original(EXPERT.format("up"))
    off = np.linalg.norm(values(tensor)[17] - exact) / np.linalg.norm(exact)
    assert off <= error and (error == 0 or off > error / 10)
    for name in ("blk.3.ffn_gate_inp.weight", "blk.3.attn_q_norm.weight"):
        assert found[name].tensor_type.name == "F32"  # the router decides who computes


def test_the_keys_are_those_of_the_architecture(files: dict[str, Path]) -> None:
    target, draft = gguf.GGUFReader(files["f32"]), gguf.GGUFReader(files["draft"])
    expected = {
        "block_count": 8,
        "context_length": 2048,
        "embedding_length": 192,
        "attention.head_count": 6,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "rope.freq_base": 10000.0,
        "expert_count": 32,
        "expert_used_count": 4,
        "expert_feed_forward_length": 64,
    }
    for name, value in expected.items():
        assert target.fields[f"qwen3moe.{name}"].contents() == value, name
    assert draft.fields["general.architecture"].contents() == "qwen3"
    assert "qwen3.expert_count" not in draft.fields
    tokens = target.fields["tokenizer.ggml.tokens"].contents()
    vocabulary = json.loads((DEMO / "target/tokenizer.json").read_text())["model"]["vocab"]
    assert len(tokens) == 4096 and all(tokens[number] == token for token, number in vocabulary.items())


def test_another_family_is_refused(tmp_path: Path) -> None:
    shutil.copytree(DEMO / "draft", tmp_path / "model")
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "llama"}))
    with pytest.raises(ModelError, match="a llama cannot be written"):
        write_gguf(tmp_path / "model", tmp_path / "file.gguf", "f32", progress=False)
    assert not (tmp_path / "file.gguf").exists()


def test_llama_cpp_says_what_this_engine_says(files: dict[str, Path]) -> None:
    """Greedy tokens of both on the same float32 weights; drafts change nothing."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install moespac[bench]")
    from moespac.bench.decode.llama import LlamaDecoder

    prompts, tokens = tokenize(BUILT_IN[:4], DEMO / "target"), 12
    with moespac.load(draft="none", host_memory="100%", profile=None) as engine:
        engine.model.generation_config.eos_token_id = None
        ours = [engine.generate(prompt, max_new_tokens=tokens + 1).token_ids for prompt in prompts]
    task = Task(
        "", 1.0, 1, *[""] * 2, str(files["f32"]), "", str(files["draft"]), "", 0,
        prompts, tokenize([WARMUP], DEMO / "target")[0], tokens, DecodeBenchConfig(llama_draft_probability=0.2),
    )  # fmt: skip
    drafted = 0
    for contender in parse_contenders("llama.cpp, llama.cpp+draft, llama.cpp+lookup, llama.cpp-ram"):
        decoder = LlamaDecoder(contender, replace(task, contender=contender.name))
        found = [decoder.decode(prompt, tokens, float("inf")) for prompt in prompts]
        decoder.close()
        assert [each.token_ids for each in found] == ours, contender.name
        if contender.name == "llama.cpp+draft":
            drafted, accepted = sum(each.drafted for each in found), sum(each.accepted for each in found)
            assert 0 < accepted < drafted and sum(each.passes for each in found) == 4 * tokens - accepted
    assert drafted
