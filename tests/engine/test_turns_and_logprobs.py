"""Streams that take turns on one engine, and the log-probabilities of what they emit."""

from __future__ import annotations

import copy

import pytest
import torch

import moespac
from moespac.speculate.logprobs import token_logprobs
from tests.families import build_model, save_checkpoint

PROMPTS = ("Once upon a time", "def add(a, b):", "It was a dark and stormy night, and the")


@pytest.fixture(scope="module")
def demo():
    with moespac.load(host_memory="40%", profile=None, window=4) as engine:
        yield engine


def another(drafter):
    twin = copy.copy(drafter)
    twin.reset()
    return twin


@pytest.mark.parametrize("turn", [1, 3])
def test_streams_that_take_turns_say_what_they_say_alone(demo, turn: int) -> None:
    lengths = (40, 17, 29)
    alone = [demo.generate(p, max_new_tokens=n) for p, n in zip(PROMPTS, lengths, strict=True)]
    streams = [demo.stream(p, max_new_tokens=n) for p, n in zip(PROMPTS, lengths, strict=True)]
    for stream in streams:
        stream.drafter = another(demo.drafter)
    texts = ["", "", ""]
    while not all(stream.done for stream in streams):
        for number, stream in enumerate(streams):
            for _ in range(turn):
                if not stream.done:
                    texts[number] += stream.advance().text
    for stream, expected, text in zip(streams, alone, texts, strict=True):
        stream.close()
        assert stream.result.token_ids == expected.token_ids
        assert text == stream.result.text == expected.text
        assert stream.result.finish_reason == expected.finish_reason
    demo.runtime.memory.check_integrity()


def test_a_stream_closed_before_its_first_step_has_a_result(demo) -> None:
    stream = demo.stream(PROMPTS[0])
    stream.close()
    assert stream.result.token_ids == [] and stream.result.finish_reason == "interrupted"


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_logprobs_are_those_of_the_model(tmp_path, temperature: float) -> None:
    path = save_checkpoint("qwen3_moe", tmp_path)
    prompt = [5, 17, 3, 60]
    with moespac.load(path, draft="lookup", host_memory="50%", window=3, profile=None) as engine:
        stream = engine.stream(prompt, max_new_tokens=30, temperature=temperature, top_k=5, top_logprobs=3)
        given = []
        while not stream.done:
            piece = stream.advance()
            assert [entry.token for entry in piece.logprobs or ()] == piece.tokens
            given += piece.logprobs or ()
        stream.close()
    tokens = stream.result.token_ids
    assert [entry.token for entry in given] == tokens and len(tokens) == 30
    with torch.no_grad():
        logits = build_model("qwen3_moe")(torch.tensor([prompt + tokens])).logits[0]
    expected = logits[len(prompt) - 1 : -1].log_softmax(-1)
    for row, entry in zip(expected, given, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)
        best = row.topk(3)
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        if temperature == 0:
            assert entry.top[0] == (entry.token, entry.logprob)


def test_logprobs_cost_nothing_unasked(demo) -> None:
    assert demo.stream(PROMPTS[0], max_new_tokens=2).advance().logprobs is None


def test_logprobs_end_with_the_stop_string(demo) -> None:
    whole = demo.generate(PROMPTS[1], max_new_tokens=40)
    stop = whole.text[len(whole.text) // 2 :][:3]
    stream = demo.stream(PROMPTS[1], max_new_tokens=40, stop=[stop], top_logprobs=0)
    pieces = []
    while not stream.done:
        pieces.append(stream.advance())
    stream.close()
    assert [t for piece in pieces for t in piece.tokens] == stream.result.token_ids
    assert [e.token for piece in pieces for e in piece.logprobs or ()] == stream.result.token_ids
    assert "".join(piece.text for piece in pieces) == whole.text[: whole.text.index(stop)]


def test_more_alternatives_than_tokens_are_all_tokens() -> None:
    (entry,) = token_logprobs([1], torch.tensor([[0.0, 1.0], [5.0, 5.0]]), 9)
    assert [token for token, _ in entry.top] == [1, 0]
    assert sum(torch.tensor([value for _, value in entry.top]).exp()) == pytest.approx(1.0)
