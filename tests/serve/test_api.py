"""OpenAI's API over the embedded pair, with their own client and with curl."""

from __future__ import annotations

import json
import math
import subprocess
import time

import openai
import pytest

from moespac.config import ServeConfig
from moespac.speculate.governor import FixedWindow
from tests.serve.running import MODEL, events, in_thread

QUESTION = "How many legs have 3 dogs?"
MESSAGES = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.base + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def expected(server, engine):
    """What the engine says itself, before the server has it."""
    tokens = engine.tokenizer.encode(f"Question: {QUESTION}\nAnswer:")
    done = []
    server.service.worker.run_between_windows(lambda: done.append(engine.generate(tokens, max_new_tokens=24)))
    while not done:
        time.sleep(0.02)
    return done[0]


def test_models(client) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "moespac"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_chat_says_what_the_engine_says(client, expected) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=24)
    choice = answer.choices[0]
    assert choice.message.content == expected.text and choice.message.role == "assistant"
    assert choice.finish_reason == "length" and choice.logprobs is None
    assert answer.usage.prompt_tokens == expected.summary.prompt_tokens
    assert answer.usage.completion_tokens == 24 == answer.usage.total_tokens - answer.usage.prompt_tokens
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")


def test_streamed_chat_is_the_same_in_pieces(client, expected) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            temperature=0,
            max_completion_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == expected.text and len([text for text in texts if text]) > 3
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 24
    assert len({chunk.id for chunk in chunks}) == 1


def test_completion_takes_text_and_token_ids(client, engine) -> None:
    text = client.completions.create(model=MODEL, prompt="The sea", temperature=0, max_tokens=12)
    ids = engine.tokenizer.encode("The sea")
    for prompt in (ids, ["The sea"], [ids]):
        again = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=12)
        assert again.choices[0].text == text.choices[0].text != ""
    assert client.completions.create(model=MODEL, prompt="The sea").usage.completion_tokens <= 16


def test_chat_uses_the_template_and_takes_parts(client, expected) -> None:
    parts = [{"type": "text", "text": QUESTION[:8]}, {"type": "text", "text": QUESTION[8:]}]
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": parts}], temperature=0, max_tokens=24
    )
    assert answer.choices[0].message.content == expected.text


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_or_list(client, expected, stream: bool) -> None:
    stop = expected.text[len(expected.text) // 2 :][:3]
    for given in (stop, ["never seen", stop]):
        answer = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, temperature=0, max_tokens=24, stop=given, stream=stream
        )
        if stream:
            chunks = list(answer)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert text == expected.text[: expected.text.index(stop)]
        assert reason == "stop"


def test_chat_logprobs(client) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, max_tokens=9, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == answer.choices[0].message.content
    assert bytes(b for entry in content for b in entry.bytes).decode() == answer.choices[0].message.content
    for entry in content:
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].token == entry.token  # greedy
        assert entry.logprob == entry.top_logprobs[0].logprob < 0
        assert sum(math.exp(other.logprob) for other in entry.top_logprobs) <= 1.0001


def test_streamed_logprobs_are_the_same(server) -> None:
    whole = server.chat(QUESTION, max_tokens=9, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    chunks = events(server.chat(QUESTION, max_tokens=9, logprobs=True, stream=True))
    streamed = [
        entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {}).get("content", [])
    ]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in whole]
    for a, b in zip(streamed, whole, strict=True):
        assert a["logprob"] == pytest.approx(b["logprob"], abs=1e-4) and a["top_logprobs"] == []


def test_completion_logprobs(client) -> None:
    choice = client.completions.create(
        model=MODEL, prompt="The sea", temperature=0, max_tokens=7, logprobs=2
    ).choices[0]
    told = choice.logprobs
    assert "".join(told.tokens) == choice.text and len(told.tokens) == 7
    assert [choice.text[at:].startswith(t) for at, t in zip(told.text_offset, told.tokens, strict=True)] == [
        True
    ] * 7
    assert all(len(top) == 2 for top in told.top_logprobs)
    assert all(
        top[t] == p for top, t, p in zip(told.top_logprobs, told.tokens, told.token_logprobs, strict=True)
    )


def test_seed_fixes_the_draws_and_others_differ(engine) -> None:
    """With a fixed window: the governor's choices depend on the clock, and drafting spends draws."""
    governor, engine._governor = engine._governor, FixedWindow(2)
    try:
        with in_thread(engine) as server:

            def say(**fields):
                return server.complete("The", max_tokens=16, temperature=1.0, **fields).json()["choices"][0][
                    "text"
                ]

            assert say(seed=5) == say(seed=5)
            assert len({say(seed=seed) for seed in (1, 2, -3)} | {say(), say()}) == 5
            assert (
                say(seed=5, top_k=1)
                == say(seed=6, top_k=1)
                == server.complete("The", max_tokens=16).json()["choices"][0]["text"]
            )
    finally:
        engine._governor = governor


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"n": 2}, "n", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "unsupported_parameter"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_parameter"),
        ({"extra_body": {"typical_p": 0.5}}, "typical_p", "unsupported_parameter"),
        ({"temperature": 3}, "temperature", None),
        ({"top_p": -1}, "top_p", None),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"stop": [""]}, "stop.0", None),
        ({"top_logprobs": 3}, "top_logprobs", None),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"max_tokens": 5000}, "messages", "context_length_exceeded"),
        ({"messages": []}, "messages", None),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.0.role", None),
        ({"messages": [{"role": "user"}]}, "messages.0.content", None),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type", None,
        ),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(client, fields, param: str, code: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**({"model": MODEL, "messages": MESSAGES, "max_tokens": 4} | fields))
    error = caught.value
    assert (error.param, error.code, error.type) == (param, code, "invalid_request_error")
    assert "\n" not in error.message and (param in error.message or code == "context_length_exceeded")


def test_what_asks_for_nothing_is_accepted(client) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=2, n=1, response_format={"type": "text"}, tools=[],
        presence_penalty=0, user="me", metadata={"a": "b"}, logit_bias={}, stop=None,
    )  # fmt: skip
    assert answer.usage.completion_tokens == 2


def test_unknown_model_and_long_prompt(client) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="the sea " * 2000)
    assert caught.value.code == "context_length_exceeded"
    for stream in (False, True):  # the status says so, streamed or not
        with pytest.raises(openai.BadRequestError, match="empty"):
            client.completions.create(model=MODEL, prompt="", stream=stream)


def test_several_prompts_are_refused(server) -> None:
    error = server.complete(["a", "b"]).json()["error"]
    assert error["param"] == "prompt" and error["code"] == "unsupported_parameter"


def test_limit_of_the_server(engine) -> None:
    with in_thread(engine, ServeConfig(max_tokens_limit=5)) as server:
        assert server.chat(max_tokens=6).json()["error"]["param"] == "max_tokens"
        assert server.chat().json()["usage"]["completion_tokens"] == 5


def test_unknown_routes_and_methods_have_error_objects(server) -> None:
    for response, status in ((server.get("/v2/x"), 404), (server.get("/v1/completions"), 405)):
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert server.get("/v1/completions").headers["allow"] == "POST"


def test_with_curl(server, expected) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 24}
    command = [
        "curl",
        "-sS",
        "--no-buffer",
        server.base + "/v1/chat/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
    ]
    whole = subprocess.run([*command, json.dumps(body)], capture_output=True, check=True, text=True).stdout
    assert json.loads(whole)["choices"][0]["message"]["content"] == expected.text
    done = subprocess.run(
        [*command, json.dumps(body | {"stream": True})], capture_output=True, check=True, text=True
    )
    events = done.stdout.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == expected.text


def test_health_and_metrics(server) -> None:
    server.settled()
    assert server.get("/health").json() | {"version": ""} == {
        "status": "ok", "model": MODEL, "version": "", "active": 0, "waiting": 0,
    }  # fmt: skip

    def metrics() -> dict[str, float]:
        lines = [line for line in server.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    before = metrics()
    server.complete("The sea", max_tokens=20)
    server.complete(n=3)
    after = metrics()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["moespac_generated_tokens_total"] == 20
    assert grown["moespac_time_to_first_token_seconds_count"] == 1
    assert grown["moespac_time_per_token_seconds_count"] == 1
    assert grown['moespac_requests_total{endpoint="/v1/completions",status="200"}'] == 1
    assert grown['moespac_requests_total{endpoint="/v1/completions",status="400"}'] == 1
    assert grown['moespac_active_experts_total{result="hit",tier="host"}'] > 0
    assert grown["moespac_passes_total"] > 1
    assert grown["moespac_accepted_tokens_total"] <= grown["moespac_drafted_tokens_total"]
    assert after['moespac_read_bytes_total{link="storage"}'] > 0
    assert (
        0
        < after['moespac_resident_experts{tier="host"}']
        <= after['moespac_expert_slots{tier="host"}']
        == 128
    )
    assert after['moespac_open_requests{state="waiting"}'] == 0
