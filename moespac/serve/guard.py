"""What stands before the app: who may come in, with how much; and what every answer says to browsers.

Plain ASGI, so that streams pass through untouched.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moespac.serve.errors import ApiError

OPEN_PATHS = frozenset({"/", "/health"})  # the page asks for the key itself; a health check has none

# No CORS headers: other sites' scripts cannot read anything here.
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
}
_POLICY = "default-src 'none'; frame-ancestors 'none'"


class Guard:
    """Checks key, host and size of each request, and tells ``counted`` (path, status) how each ended."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        check_host: bool,
        body_bytes: int,
        counted: Callable[[str, int], None],
    ) -> None:
        """``check_host``: answer only to localhost and to addresses. A site that points its name at this machine
        (DNS rebinding) would else be this server's own origin."""
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._check_host = check_host
        self._body_bytes = body_bytes
        self._counted = counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]

        async def answering(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("content-security-policy", _POLICY)
                self._counted(path, message["status"])
            await send(message)

        refusal = self._refusal(path, Headers(scope=scope))
        if refusal is not None:
            await refusal.response()(scope, receive, answering)
            return
        await self._app(scope, self._limited(receive), answering)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        if self._check_host and not _is_local(headers.get("host", "")):
            return ApiError(
                403, "this server has no key, so it answers to localhost and addresses only; set an API key"
            )
        if self._key is not None and path not in OPEN_PATHS and not self._has_key(headers):
            return ApiError(
                401,
                "the API key is missing or wrong: send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self._body_bytes:
            return ApiError(413, self._too_large())
        return None

    def _has_key(self, headers: Headers) -> bool:
        assert self._key is not None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self._key)  # takes as long whatever was guessed
        return right and scheme.lower() == "bearer"

    def _limited(self, receive: Receive) -> Receive:
        """A body without a length is counted as it comes."""
        seen = 0

        async def counting() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self._body_bytes:
                    raise HTTPException(413, self._too_large())
            return message

        return counting

    def _too_large(self) -> str:
        return f"the body is larger than {self._body_bytes} bytes: shorten it"


def _is_local(host: str) -> bool:
    """Whether a Host header names this machine without a name that somebody else could own."""
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    if name.lower().rstrip(".") == "localhost":
        return True
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True
