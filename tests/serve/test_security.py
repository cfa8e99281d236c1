"""What a hostile client can do: be told off. The server lives."""

from __future__ import annotations

import contextlib
import json
import socket

import psutil
import pytest

from moespac.config import ServeConfig
from tests.serve.running import MODEL, in_thread

KEY = "correct horse battery staple"
PATHS = (
    "/v1/models",
    "/v1/chat/completions",
    "/v1/completions",
    "/metrics",
    "/api/live",
    "/openapi.json",
    "/nope",
)


@pytest.fixture(scope="module")
def locked(engine):
    with in_thread(engine, key=KEY) as running:
        yield running


def talk(server, data: bytes) -> bytes:
    """Raw bytes in, all that comes back out."""
    host, port = server.base.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as client:
        answer = b""
        with contextlib.suppress(OSError):  # refused so early that the connection is gone already
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            while part := client.recv(65536):
                answer += part
    return answer


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "header",
    [
        None,
        "Bearer",
        "Bearer wrong",
        f"Bearer {KEY}x",
        f"Basic {KEY}",
        KEY,
        f"Bearer {KEY[:-1]}",
        "Bearer \xff",
    ],
)
def test_a_wrong_key_is_a_401(locked, path: str, header: str | None) -> None:
    headers = {"Authorization": header.encode("latin-1")} if header else {"Authorization": None}
    response = locked.get(path, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"] | {"message": ""} == {
        "message": "", "type": "authentication_error", "param": None, "code": "invalid_api_key",
    }  # fmt: skip
    assert KEY not in response.text


def test_the_right_key_and_what_needs_none(locked) -> None:
    assert locked.get("/v1/models").status_code == 200
    for path in ("/health", "/"):
        assert locked.get(path, headers={"Authorization": None}).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd", "/..%2f..%2fetc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/page.html",
        "/v1/models/../../../etc/passwd", "/v1/models/..%2f..%2fconfig.json", "/v1/models//etc/passwd",
        "/static/../app.py", "/\x00", "/%00", "/v1/models/%ff%fe",
    ],
)  # fmt: skip
def test_there_are_no_files_behind_paths(server, path: str) -> None:
    answer = talk(
        server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode("latin-1")
    )
    assert 400 <= status(answer) < 500
    assert b"root:" not in answer


@pytest.mark.parametrize(
    "model", ["/etc/passwd", "../target", "moespac/model/demo/target", "\ud800", "x" * 100_000]
)
def test_a_model_is_a_name_not_a_path(server, model: str) -> None:
    response = server.chat(model=model)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b'"text"', b"\xff\xfe\x00", b'{"model": "\xff"}', b"\x00" * 50,
        b'{"model": NaN}', b"[" * 100_000, b'{"a":' * 50_000, b'{"model": 1e999}', b"9" * 10_000,
        b'{"model": "moespac-demo", "prompt": "\\ud800"}', b'{"model": "moespac-demo", "prompt": [1e400]}',
        b'{"model": "moespac-demo", "prompt": "a", "seed": ' + b"9" * 30 + b"}",
        b'{"model": "moespac-demo", "prompt": "a", "temperature": NaN}',
        b'{"model": "moespac-demo", "prompt": "a", "\\ud800": 1}',
        b'{"model": "moespac-demo", "prompt": [-1]}', b'{"model": "moespac-demo", "prompt": [99999999]}',
        b'{"model": "moespac-demo", "prompt": [true]}', b'{"model": "moespac-demo", "prompt": []}',
        b'{"model": "moespac-demo", "prompt": [[]]}', b'{"model": "moespac-demo", "prompt": [1, "a"]}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_malformed_bodies_are_a_400(server, path: str, body: bytes) -> None:
    response = server.session.post(
        server.base + path, data=body, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert len(response.json()["error"]["message"]) < 500


def test_a_body_is_json_only_if_it_says_so(server) -> None:
    """A form on another site cannot send this type without asking first."""
    body = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 1})
    response = server.session.post(
        server.base + "/v1/completions", data=body, headers={"Content-Type": "text/plain"}
    )
    assert response.status_code == 400


def test_an_oversized_body_is_a_413_however_it_comes(engine) -> None:
    with in_thread(engine, ServeConfig(body_bytes=10_000)) as server:
        assert server.complete("x" * 10_001).status_code == 413
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        assert status(talk(server, head + b"Content-Length: 99999999999\r\n\r\n")) == 413
        chunks = (b"400\r\n" + b"x" * 1024 + b"\r\n") * 20 + b"0\r\n\r\n"
        assert status(talk(server, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)) == 413
        for length in (b"-5", b"1e3", b"\xb2"):
            assert 400 <= status(talk(server, head + b"Content-Length: " + length + b"\r\n\r\n")) < 500
        assert server.complete("x", max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n"
        + b"".join(b"X-%d: y\r\n" % i for i in range(20_000))
        + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
        b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x00\xff" * 5000,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
    ids=[
        "many headers",
        "one long header",
        "a long path",
        "noise",
        "version",
        "no host",
        "two lengths",
        "tls",
    ],
)
def test_header_floods_and_noise_are_4xx(server, data: bytes) -> None:
    answer = talk(server, data)
    assert answer == b"" or 400 <= status(answer) < 500  # a reset may overtake the answer
    assert server.get("/health").status_code == 200


def test_connections_that_say_nothing_do_not_hold_up_others(server) -> None:
    host, port = server.base.removeprefix("http://").split(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(100)]
    try:
        for connection in idle:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHo")
        assert server.complete("x", max_tokens=1).status_code == 200
    finally:
        for connection in idle:
            connection.close()


@pytest.mark.parametrize(("host", "right"), [
    ("localhost", True), ("localhost:8080", True), ("127.0.0.1:1", True), ("[::1]:8080", True), ("10.1.2.3", True),
    ("evil.example", False), ("evil.example:8080", False), ("localhost.evil.example", False), ("", False),
])  # fmt: skip
def test_without_a_key_only_local_names_are_answered(server, locked, host: str, right: bool) -> None:
    """DNS rebinding: another site's name for this machine."""
    assert server.get("/v1/models", headers={"Host": host}).status_code == (200 if right else 403)
    assert locked.get("/v1/models", headers={"Host": host or "x"}).status_code == 200


def test_browsers_are_told_to_be_careful(server) -> None:
    page, api = server.get("/"), server.get("/v1/models", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in {name.lower() for name in api.headers}
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy.replace("'", "")
    assert "script-src 'sha256-" in policy and "frame-ancestors 'none'" in policy
    for response in (page, api):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "server" not in response.headers


def test_only_loopback_listens(server) -> None:
    port = int(server.base.rsplit(":", 1)[1])
    listening = [c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening if address.port == port] == ["127.0.0.1"]
    assert {address.ip for address in listening} == {"127.0.0.1"}
