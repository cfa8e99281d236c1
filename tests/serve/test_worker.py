"""Turns, queues, and clients that go: what the engine's thread promises."""

from __future__ import annotations

import json
import socket
import time

import pytest

from moespac.config import ServeConfig
from tests.serve.running import Events, events, in_thread

LONG = 160


def begun(response, pieces: int = 2) -> Events:
    """The stream, once it has brought so much."""
    stream = Events(response)
    for _ in range(pieces):
        next(stream)
    return stream


def test_a_short_answer_does_not_wait_for_a_long_one(engine) -> None:
    with in_thread(engine, ServeConfig(turn_windows=2)) as server:
        alone = server.complete("The sea", max_tokens=LONG).json()
        response = server.complete("The sea", max_tokens=LONG, stream=True)
        slow = Events(response)
        text = next(slow)["choices"][0]["text"]
        quick = server.complete("Once", max_tokens=3)
        health = server.get("/health").json()
        assert quick.json()["usage"]["completion_tokens"] == 3
        assert health["active"] == 1, "the long answer is still at it"
        text += "".join(e["choices"][0]["text"] for e in slow)
        assert text == alone["choices"][0]["text"], "and says what it says alone"


def test_one_place_means_one_after_the_other(engine) -> None:
    with in_thread(engine, ServeConfig(parallel=1)) as server:
        slow = begun(server.complete("The sea", max_tokens=60, stream=True))
        server.complete("Once", max_tokens=1)
        assert server.get("/health").json()["active"] == 0, "the first is over by then"
        assert len(list(slow)) > 5


def test_a_full_queue_says_when_to_come_again(engine) -> None:
    with in_thread(engine, ServeConfig(parallel=1, queue=1)) as server:
        server.complete("Once", max_tokens=30)  # so that it knows what an answer takes
        running = server.complete("The sea", max_tokens=LONG, stream=True)
        _open = begun(running)
        waiting = server.complete("The sea", max_tokens=1, stream=True)
        refused = server.complete("The sea", max_tokens=1)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        waiting.close()
        running.close()
        server.settled()
        assert server.complete("The sea", max_tokens=1).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_the_engine_within_one_window(engine, stream: bool) -> None:
    with in_thread(engine) as server:
        worker = server.service.worker
        steps: list[float] = []
        stepped = server.service.live.stepped
        server.service.live.stepped = lambda piece, seconds: (
            steps.append(time.monotonic()),
            stepped(piece, seconds),
        )
        body = json.dumps(
            {"model": "moespac-demo", "prompt": "The sea", "max_tokens": 1900, "stream": stream}
        ).encode()
        host, port = server.base.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            while len(steps) < 5:
                time.sleep(0.005)
        gone = time.monotonic()
        while worker.active:
            time.sleep(0.001)
            assert time.monotonic() - gone < 10
        # The window that ran when the server heard of it, and no other: hearing takes a moment of its own.
        assert len([at for at in steps if at > gone + 0.05]) <= 1 + len(steps) // 100
        assert len(steps) < 400, "it did not finish the answer"
        assert server.complete("The sea", max_tokens=2).status_code == 200


def test_who_waits_and_goes_leaves_the_queue(engine) -> None:
    with in_thread(engine, ServeConfig(parallel=1)) as server:
        running = server.complete("The sea", max_tokens=LONG, stream=True)
        _open = begun(running)
        waiting = server.complete("The sea", max_tokens=5, stream=True)
        assert server.get("/health").json()["waiting"] == 1
        waiting.close()
        until = time.monotonic() + 5
        while server.get("/health").json()["waiting"] and time.monotonic() < until:
            time.sleep(0.02)
        assert server.get("/health").json() | {"version": ""} == {
            "status": "ok", "model": "moespac-demo", "version": "", "active": 1, "waiting": 0,
        }  # fmt: skip
        running.close()


@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_that_fails_fails_one_answer(engine, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    from moespac.errors import StorageError

    with in_thread(engine) as server:
        good, calls = engine.step, []

        def step(sequence):
            calls.append(1)
            if len(calls) == 3:
                raise StorageError("reading expert 5 of MoE layer 1 failed 3 times (/secret/path)")
            return good(sequence)

        monkeypatch.setattr(engine, "step", step)
        response = server.complete("The sea", max_tokens=50, stream=stream)
        if stream:
            last = events(response)[-1]
            assert response.status_code == 200 and last["error"]["type"] == "server_error"
        else:
            assert response.status_code == 500
            last = response.json()
        assert last["error"]["code"] == "storage" and "secret" not in last["error"]["message"]
        assert server.complete("The sea", max_tokens=5).json()["usage"]["completion_tokens"] == 5


def test_a_defect_is_a_500_without_a_word_of_the_inside(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with in_thread(engine) as server:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "step", lambda sequence: 1 / 0)
            response = server.complete("The sea")
        assert response.status_code == 500
        assert response.json()["error"]["message"] == "internal error: see the server's log"
        assert server.complete("The sea").status_code == 200


def test_live_is_what_the_engine_is(engine) -> None:
    import base64

    with in_thread(engine) as server:
        server.get("/api/live")  # from now on somebody looks: the timeline is recorded
        running = server.complete("The sea", max_tokens=LONG, stream=True)
        _open = begun(running, 20)
        time.sleep(0.2)
        seen = server.get("/api/live").json()
        grid = base64.b64decode(seen["grid"])
        assert len(grid) == seen["layers"] * seen["experts"] == 256
        assert sum(bool(cell & 8) for cell in grid) == seen["tiers"][0]["resident"] <= 128
        assert max(cell & 7 for cell in grid) <= seen["levels"] == 5
        for layer in range(8):
            used = sum(bool(cell & 128) for cell in grid[layer * 32 : layer * 32 + 32])
            assert 4 <= used <= 32, "top-4 of each layer at least"
        assert seen["active"] == 1 and seen["tokens_per_second"] > 0 and 0 < seen["hit_rate"] <= 1
        lanes = {span[0] for span in seen["spans"]}
        assert {"trunk", "host experts", "decide"} <= lanes  # drafting is the governor's to choose
        assert sum(span[1] == "verify" for span in seen["spans"]) == 4
        running.close()
        server.settled()


def test_nobody_looking_costs_nothing(engine) -> None:
    with in_thread(engine, ServeConfig(live_watched=0.0)) as server:
        server.complete("The sea", max_tokens=3)
        assert engine.runtime.clock.tape.record is None, "nobody has looked"
        server.get("/api/live")
        assert engine.runtime.clock.tape.record is not None
        server.complete("The sea", max_tokens=3)
        assert engine.runtime.clock.tape.record is None, "nobody looks any more"


def test_a_policy_without_levels_shows_tiers_only() -> None:
    import moespac

    with moespac.load(host_memory="25%", policy="lru", profile=None) as engine, in_thread(engine) as server:
        seen = server.get("/api/live").json()
        assert seen["levels"] is None and seen["policy"] == "lru" and seen["tokens_per_second"] is None
