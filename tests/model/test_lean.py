"""The lean forward pass is the model's own: in every way it runs, and only for the models it is made for."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from moespac.experts.kernels.decoder import MAX_TOKENS
from moespac.model.lean import LeanTrunk, lean_trunk
from tests.families import FAMILIES, UNUSUAL, build_model

PLAIN = {"qwen3_moe", "qwen2_moe", "mixtral", "olmoe"}
TOKENS = torch.arange(60) * 31 % 97


@pytest.fixture(params=sorted(PLAIN))
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    return build_model(request.param)


def reference(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens[None], use_cache=False).logits[0]


def run(trunk: LeanTrunk, pieces: list[int]) -> torch.Tensor:
    cache, start, logits = trunk.new_cache(), 0, []
    with torch.inference_mode():
        for size in pieces:
            logits.append(trunk(TOKENS[start : start + size], cache, keep=size))
            start += size
    return torch.cat(logits)


@pytest.mark.parametrize("family", [*FAMILIES, *UNUSUAL])
def test_only_plain_decoders_run_lean(family: str) -> None:
    assert (lean_trunk(build_model(family), threads=1) is not None) == (family in PLAIN)


@pytest.mark.parametrize("pieces", [[60], [1] * 20, [5, 1, 4, 17, MAX_TOKENS, 1], [MAX_TOKENS + 1, 3, 24]])
def test_logits_are_the_models_own(model, pieces: list[int]) -> None:
    expected = reference(model, TOKENS[: sum(pieces)])
    trunk = lean_trunk(model, threads=2)
    assert torch.allclose(run(trunk, pieces), expected, atol=2e-4 * float(expected.std()))


def test_a_tokens_logits_do_not_depend_on_the_window_or_the_threads() -> None:
    """Of a dense model: a router in torch would round otherwise for other numbers of tokens."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=97, hidden_size=320, intermediate_size=500, num_hidden_layers=2, head_dim=40
    )
    model = Qwen3ForCausalLM(config).eval()
    one, two = (LeanTrunk(model, threads) for threads in (1, 2))
    assert torch.equal(run(one, [1] * 20), run(two, [3, 4, 1, 12]))


def test_forgotten_tokens_leave_nothing_behind(model) -> None:
    trunk = lean_trunk(model, threads=1)
    expected = reference(model, torch.cat([TOKENS[:10], TOKENS[30:34]]))[-4:]
    with torch.inference_mode():
        cache = trunk.new_cache()
        trunk(TOKENS[:16], cache, keep=1)
        cache.rewind(6)
        assert torch.allclose(trunk(TOKENS[30:34], cache, keep=4), expected, atol=1e-4)


def test_a_cache_grows_without_losing_anything(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moespac.model.lean._LEAST_ROOM", 4)
    expected = reference(model, TOKENS)
    trunk = lean_trunk(model, threads=1)
    assert torch.allclose(run(trunk, [3, 5, 9, 20, 23]), expected, atol=1e-4 * float(expected.std()) + 1e-4)


def test_transformers_still_runs_the_same_weights(model) -> None:
    before = reference(model, TOKENS)
    lean_trunk(model, threads=1)  # joins projections in place
    assert torch.allclose(reference(model, TOKENS), before, atol=1e-5)


def test_a_model_that_computes_something_else_is_left_to_transformers(model, caplog) -> None:
    attention = model.model.layers[1].self_attn
    attention.scaling *= 1.5  # only one layer: read from the first, the lean pass would not know
    with caplog.at_level("INFO", "moespac"):
        assert lean_trunk(model, threads=1) is None
    assert "transformers' own forward pass" in caplog.text


def test_without_the_native_kernel_windows_run_in_torch(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESPAC_KERNEL", "torch")
    expected = reference(model, TOKENS[:12])
    trunk = lean_trunk(model, threads=1)
    assert trunk is not None and trunk._native is None
    assert torch.allclose(run(trunk, [5, 1, 6]), expected, atol=1e-4)
