"""The output is that of the model: every family, drafter, budget, device and policy, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import moespac
from moespac.engine.engine import Engine
from moespac.experts.compute import ExpertMath
from moespac.policy.registry import POLICIES
from moespac.speculate.drafters import Drafter, ModelDrafter, NoDrafter, PromptLookupDrafter
from tests.families import FAMILIES, UNUSUAL, VOCABULARY, build_model, reference_tokens, save_checkpoint

PROMPT = (5, 17, 3, 60, 17, 3)
NEW_TOKENS = 20
BUDGETS = ["100%", "50%", "25%", "least"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_checkpoint(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def load(path: Path, budget: str, **settings) -> Engine:
    if budget == "least":
        with moespac.load(path, draft="none", host_memory="100%", profile=None) as engine:
            budget = str(engine.shape.record_bytes)
    settings = {"window": 4} | settings  # a fixed K, so that every run drafts
    return moespac.load(path, draft="none", host_memory=budget, profile=None, **settings)


def drafters(family: str) -> Iterator[Drafter]:
    yield NoDrafter()
    yield PromptLookupDrafter(max_ngram=2, min_ngram=1)
    yield ModelDrafter(unreliable_copy(family), VOCABULARY)


def unreliable_copy(family: str) -> torch.nn.Module:
    """A drafter that is often right and often wrong."""
    model = build_model(family)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.abs().mean() * 0.15)
    return model


@pytest.mark.parametrize("accelerator", ["none", "25%"])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_the_models_own(checkpoints, family: str, budget: str, accelerator: str) -> None:
    expected = reference_tokens(family, PROMPT, NEW_TOKENS)
    with load(checkpoints[family], budget, accelerator_memory=accelerator) as engine:
        for engine.drafter in drafters(family):
            result = engine.generate(PROMPT, max_new_tokens=NEW_TOKENS)
            assert result.token_ids == expected, engine.drafter.name
            engine.runtime.memory.check_integrity()


@pytest.mark.parametrize("family", UNUSUAL)
def test_models_of_another_kind(tmp_path: Path, family: str) -> None:
    expected = reference_tokens(family, PROMPT, NEW_TOKENS)
    with load(save_checkpoint(family, tmp_path), "40%") as engine:
        for engine.drafter in (NoDrafter(), PromptLookupDrafter(max_ngram=2, min_ngram=1)):
            result = engine.generate(PROMPT, max_new_tokens=NEW_TOKENS)
            assert result.token_ids == expected
            if family in ("qwen3_next", "minimax", "nemotron_h"):
                assert result.summary.window == 0, "a recurrent state cannot be rewound"


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
def test_output_does_not_depend_on_policy_or_timing(checkpoints, policy: str, asynchronous: bool) -> None:
    family = "qwen3_moe"
    expected = reference_tokens(family, PROMPT, NEW_TOKENS)
    settings = {"policy": policy, "asynchronous": asynchronous, "accelerator_memory": "20%"}
    with load(checkpoints[family], "30%", **settings) as engine:
        for engine.drafter in drafters(family):
            assert engine.generate(PROMPT, max_new_tokens=NEW_TOKENS).token_ids == expected


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_checkpoint_in_several_files(tmp_path: Path, family: str) -> None:
    path = save_checkpoint(family, tmp_path, shard_bytes="20KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    with load(path, "50%") as engine:
        assert engine.generate(PROMPT, max_new_tokens=8).token_ids == reference_tokens(family, PROMPT, 8)


def test_a_bfloat16_checkpoint_computes_in_float32(tmp_path: Path) -> None:
    build_model("qwen3_moe").to(torch.bfloat16).save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([PROMPT])
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = reference.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[
        0, len(PROMPT) :
    ].tolist()
    with load(tmp_path, "50%") as engine:
        assert engine.generate(PROMPT, max_new_tokens=8).token_ids == expected


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_stock_generate_works_over_our_experts(checkpoints, family: str) -> None:
    expected = reference_tokens(family, PROMPT, NEW_TOKENS)
    ids = torch.tensor([PROMPT])
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    settings["attention_mask"] = torch.ones_like(ids)
    with load(checkpoints[family], "25%", accelerator_memory="10%") as engine:
        for extra in ({}, {"prompt_lookup_num_tokens": 3}, {"assistant_model": unreliable_copy(family)}):
            out = engine.model.generate(ids, **settings, **extra)
            assert out[0, len(PROMPT) :].tolist() == expected
        batch = engine.model.generate(
            ids.repeat(2, 1), **(settings | {"attention_mask": torch.ones(2, ids.shape[1])})
        )
        assert batch[1, len(PROMPT) :].tolist() == expected


def test_wrong_experts_would_be_noticed(checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail: with inverted experts no family keeps its tokens."""
    healthy = ExpertMath.__call__
    monkeypatch.setattr(ExpertMath, "__call__", lambda self, *arguments: -healthy(self, *arguments))
    for family, path in checkpoints.items():
        with load(path, "50%") as engine:
            result = engine.generate(PROMPT, max_new_tokens=NEW_TOKENS)
            assert result.token_ids != reference_tokens(family, PROMPT, NEW_TOKENS), family
