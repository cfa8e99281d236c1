"""The soak benchmark, small; and that it sees what it is there to see."""

from __future__ import annotations

import pytest

import moespac
from moespac.bench import soak as bench
from moespac.bench.soak import Request, SoakConfig, make_requests, send, serving, soak

CONFIG = SoakConfig(requests=12, clients=4, most_prompt=20, most_tokens=12)


@pytest.fixture(scope="module")
def engine():
    with moespac.load(host_memory="50%", profile=None) as engine:
        yield engine


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = bench.measure_streaming
    monkeypatch.setattr(bench, "measure_streaming", lambda engine: measure(engine, tokens=12, repeats=1))


def test_a_small_soak_is_clean(engine) -> None:
    done = []
    result = soak(engine, CONFIG, lambda: done.append(1))
    assert len(done) == result.requests == 12
    assert result.errors == [] and result.wrong == 0 and 0 < result.cancelled < 12
    assert 0 < result.first_token["median"] <= result.first_token["p90"] <= result.first_token["worst"]
    assert result.memory["ratio"] == pytest.approx(1.0, abs=0.2)
    assert result.streaming["engine_seconds_per_token"] > 0
    assert 0 < result.streaming["engine_to_socket_median"] <= result.streaming["engine_to_socket_p99"]


def test_wrong_answers_and_errors_are_seen(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    good = bench.send

    def bad(port: int, request: Request):
        return good(
            port, Request(request.prompt[:-1] or (7,), request.tokens, request.stream, request.leave_after)
        )

    monkeypatch.setattr(bench, "send", bad)
    assert soak(engine, CONFIG).wrong > 0
    monkeypatch.setattr(bench, "measure_streaming", lambda engine: {})  # every answer is an error now
    monkeypatch.setattr(bench, "send", lambda port, r: good(port, Request((9999,), 5, False, None)))
    result = soak(engine, CONFIG)
    assert len(result.errors) == 12 and "400" in result.errors[0]


def test_the_seed_fixes_what_is_asked(engine) -> None:
    assert make_requests(engine, CONFIG) == make_requests(engine, CONFIG)
    assert make_requests(engine, CONFIG) != make_requests(engine, SoakConfig(requests=12, seed=1))


def test_a_client_leaves_when_it_is_told_to(engine) -> None:
    request = Request(tuple(engine.tokenizer.encode("The sea")), 60, stream=True, leave_after=2)
    with serving(engine) as (port, _):
        reply = send(port, request)
        whole = send(port, Request(request.prompt, 60, stream=False, leave_after=None))
    assert reply.left and whole.text.startswith(reply.text) and len(reply.text) < len(whole.text)
