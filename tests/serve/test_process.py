"""``moespac serve`` as a process: how it starts, what it says, how it ends."""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from moespac.cli import app
from moespac.config import ServeConfig
from tests.serve.running import Events, events, in_process, in_thread


def test_sigterm_lets_a_running_answer_finish_and_ends_well(tmp_path: Path) -> None:
    with in_process("--timeline", "lanes.json", cwd=tmp_path) as (process, server):
        assert server.complete("The sea", max_tokens=2).status_code == 200
        connections = psutil.Process(process.pid).net_connections("inet")
        listening = {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
        assert listening == {"127.0.0.1"}, "nobody else gets in unless asked"
        stream = Events(server.complete("The sea", max_tokens=60, stream=True))
        next(stream)
        process.send_signal(signal.SIGTERM)
        assert list(stream)[-1]["choices"][0]["finish_reason"] == "length"
        assert process.wait(30) == 0
        with pytest.raises(OSError):
            server.get("/health")
    written = json.loads((tmp_path / "lanes.json").read_text())["traceEvents"]
    lanes = {event["args"].get("name") for event in written if "args" in event}
    assert {"trunk", "decide", "request"} <= lanes


def test_what_does_not_finish_in_time_ends_in_an_error(engine) -> None:
    with in_thread(engine, ServeConfig(grace_seconds=0.3, parallel=1)) as server:
        running = Events(server.complete("The sea", max_tokens=1900, stream=True))
        next(running)
        waiting = server.complete("The sea", max_tokens=5, stream=True)
        server.service.worker.close_door()
        assert events(waiting)[-1]["error"]["code"] == "shutting_down"
        refused = server.complete("The sea", max_tokens=5)
        assert refused.status_code == 503 and server.get("/health").status_code == 503
        began = time.monotonic()
    assert time.monotonic() - began < 20
    assert list(running)[-1]["error"]["code"] == "shutting_down"


def test_the_key_comes_from_the_environment(tmp_path: Path) -> None:
    with in_process("--host", "0.0.0.0", cwd=tmp_path, MOESPAC_API_KEY="sesame") as (_, server):
        base = server.base.replace("0.0.0.0", "127.0.0.1")
        assert server.session.get(base + "/v1/models", timeout=10).status_code == 200
        assert (
            server.session.get(base + "/v1/models", headers={"Authorization": "x"}, timeout=10).status_code
            == 401
        )


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--api-key", ""], "--api-key"),
        (["--api-key", "two\nlines"], "--api-key"),
        (["--model", "does-not-exist", "--port", "0"], "does-not-exist"),
        (["--lookup", "--no-draft"], "exclude each other"),
        (["--port", "99999"], "--port"),
    ],
)
def test_what_cannot_be_is_one_line(flags: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["serve", *flags])
    assert result.exit_code == 2
    assert says in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_a_port_in_use_is_one_line_before_a_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["serve", "--port", port, "--model", "does-not-exist"])
    assert result.exit_code == 2 and f"--port {port}: is in use already" in result.stderr


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("moespac.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = CliRunner().invoke(app, ["serve"])
    assert result.exit_code == 2
    assert "pip install 'moespac[serve]'" in result.stderr and result.stderr.count("\n") == 1


def test_others_are_warned_of(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moespac.load", lambda *a, **k: (_ for _ in ()).throw(SystemExit(0)), raising=False)
    for flags, warned in (
        (["--host", "0.0.0.0"], True),
        (["--host", "0.0.0.0", "--api-key", "k"], False),
        ([], False),
    ):
        caplog.clear()
        CliRunner().invoke(app, ["serve", "--port", "0", *flags])
        assert ("anybody who reaches 0.0.0.0" in caplog.text) is warned
