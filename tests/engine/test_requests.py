"""What a request may ask for, and how it ends."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import moespac
from moespac.errors import ConfigError
from moespac.speculate.drafters import Draft, ModelDrafter
from tests.families import VOCABULARY, build_model, reference_tokens, save_checkpoint

PROMPT = (5, 17, 3, 60)


class Oracle:
    """Drafts the model's own continuation: every window is accepted whole."""

    name = "oracle"

    def __init__(self, continuation: list[int]) -> None:
        self.continuation = continuation

    def begin(self, sampling, generator) -> None: ...

    def propose(self, tokens: list[int], k: int) -> Draft:
        start = len(tokens) - len(PROMPT)
        return Draft(self.continuation[start : start + k])

    def reset(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory):
    path = save_checkpoint("qwen3_moe", tmp_path_factory.mktemp("target"))
    with moespac.load(path, draft="none", host_memory="50%", window=4, profile=None) as engine:
        engine.drafter = Oracle(reference_tokens("qwen3_moe", PROMPT, 60))
        yield engine


@pytest.fixture(scope="module")
def demo():
    with moespac.load(host_memory="50%", profile=None) as engine:
        yield engine


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 6, 7, 23])
def test_token_limit_is_exact_inside_a_window(engine, limit: int) -> None:
    result = engine.generate(PROMPT, max_new_tokens=limit)
    assert result.token_ids == reference_tokens("qwen3_moe", PROMPT, 60)[:limit]
    assert result.finish_reason == "length"


def test_full_acceptance_gives_whole_windows(engine) -> None:
    summary = engine.generate(PROMPT, max_new_tokens=21).summary
    assert summary.acceptance_rate == 1.0
    assert (
        summary.passes == 4
    )  # one token of the prefill, then 4 passes of 4 drafts and one of the target's own
    assert summary.mean_accepted == 5.0


@pytest.mark.parametrize("position", [0, 1, 2, 3, 4, 5, 9])
def test_end_of_text_inside_a_window(engine, position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = reference_tokens("qwen3_moe", PROMPT, 60)
    eos = tokens[position]
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", [eos])
    result = engine.generate(PROMPT, max_new_tokens=40)
    assert result.token_ids == tokens[: tokens.index(eos) + 1]
    assert result.finish_reason == "stop"


def test_one_token_prompt(engine) -> None:
    engine.drafter, drafter = ModelDrafter(build_model("qwen3_moe"), VOCABULARY), engine.drafter
    assert engine.generate([9], max_new_tokens=10).token_ids == reference_tokens("qwen3_moe", (9,), 10)
    engine.drafter = drafter


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7])
def test_a_long_prompt_in_pieces_gives_the_same_tokens(
    engine, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "config", replace(engine.config, prefill_chunk=chunk))
    result = engine.generate(PROMPT, max_new_tokens=12)
    assert result.token_ids == reference_tokens("qwen3_moe", PROMPT, 60)[:12]
    assert result.summary.passes == 3, "pieces of the prompt are not decode passes"


def test_the_context_ends_a_request(engine) -> None:
    prompt = [(7 * i) % VOCABULARY for i in range(118)]
    engine.drafter, drafter = ModelDrafter(build_model("qwen3_moe"), VOCABULARY), engine.drafter
    result = engine.generate(prompt, max_new_tokens=50)
    engine.drafter = drafter
    assert result.finish_reason == "context"
    assert len(prompt) + len(result.token_ids) == engine.context == 128
    assert result.token_ids == reference_tokens("qwen3_moe", tuple(prompt), 10)


@pytest.mark.parametrize(
    ("prompt", "settings", "says"),
    [
        ([], {}, "empty"),
        ([1] * 128, {}, "context"),
        ([VOCABULARY], {}, "outside"),
        ("text", {}, "no tokenizer"),
        (PROMPT, {"temperature": float("nan")}, "temperature"),
        (PROMPT, {"temperature": -1.0}, "temperature"),
        (PROMPT, {"top_p": 1.5}, "top_p"),
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens"),
        (PROMPT, {"stop": ["x"]}, "tokenizer"),
    ],
)
def test_bad_requests_are_refused_in_one_line(engine, prompt, settings, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        engine.generate(prompt, **settings)
    assert "\n" not in str(caught.value)


def test_pieces_make_the_text_and_tokens_decode_to_it(demo) -> None:
    stream = demo.stream("Once upon a time", max_new_tokens=40)
    pieces = list(stream)
    assert len(pieces) > 3
    assert "".join(pieces) == stream.result.text == demo.tokenizer.decode(stream.result.token_ids)


def test_stop_string_cuts_text_and_tokens(demo) -> None:
    whole = demo.generate("def add(a, b):", max_new_tokens=40)
    stop = whole.text[len(whole.text) // 2 :][:3]
    cut = demo.generate("def add(a, b):", max_new_tokens=40, stop=[stop])
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert stop in demo.tokenizer.decode(cut.token_ids)


def test_an_abandoned_stream_leaves_the_engine_usable(demo) -> None:
    expected = demo.generate("Once upon a time", max_new_tokens=20).token_ids
    stream = demo.stream("Once upon a time", max_new_tokens=20)
    next(stream)
    stream.close()
    assert stream.result.finish_reason == "interrupted"
    demo.runtime.memory.check_integrity()
    assert demo.generate("Once upon a time", max_new_tokens=20).token_ids == expected


def test_chat_template_is_used(demo) -> None:
    tokens = demo.chat_tokens([{"role": "user", "content": "What is 2 + 2?"}])
    assert demo.tokenizer.decode(tokens) == "Question: What is 2 + 2?\nAnswer:"


def test_summary_adds_up(demo) -> None:
    summary = demo.generate("Question: How many legs have 3 dogs?\nAnswer:", max_new_tokens=30).summary
    exclusive = sum(
        s for cause, s in summary.seconds.items() if cause not in ("total", "accelerator_experts")
    )
    assert exclusive == pytest.approx(summary.seconds["total"], abs=1e-3)
    assert 0 < summary.hit_rate <= 1
    assert summary.bytes_read["storage"] % demo.shape.record_bytes == 0
    assert summary.peak_bytes["host"] <= demo.shape.total // 2 * demo.shape.record_bytes
    assert summary.versions["torch"] == torch.__version__
