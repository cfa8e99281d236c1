"""What a client is told when something is wrong: OpenAI's error objects, whatever went wrong and wherever.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from moespac.errors import CheckpointError, ConfigError, MoespacError, StorageError

log = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is refused, or an answer that ends in an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def encoded(self) -> bytes:
        """As ASCII: a client's odd characters may be quoted in it, lone surrogates too."""
        return json.dumps(self.body()).encode("ascii")

    def response(self) -> Response:
        return Response(self.encoded(), self.status, self.headers, "application/json")


def queue_full(retry_after: int) -> ApiError:
    return ApiError(
        429,
        f"the queue is full: try again in {retry_after} s",
        code="queue_full",
        headers={"Retry-After": str(retry_after)},
    )


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down: try again later", code="shutting_down")


def unsupported(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="unsupported_parameter")


def from_failure(error: Exception) -> ApiError:
    """What the engine raised, as the client may know it. A defect is logged, and not described."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ConfigError):
        return ApiError(400, str(error))
    if isinstance(error, (StorageError, CheckpointError)):
        log.error("a request failed: %s", error)
        return ApiError(500, "an expert could not be read from storage: see the server's log", code="storage")
    if isinstance(error, MoespacError):
        log.error("a request failed: %s", error)
        return ApiError(500, "the engine failed: see the server's log")
    log.error("a request failed", exc_info=error)
    return ApiError(500, "internal error: see the server's log")


def install(app: FastAPI) -> None:
    """Have ``app`` answer every failure with an error object."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _invalid(error).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        messages = {
            404: f"there is no {request.url.path} here: see /openapi.json",
            405: f"{request.method} is not allowed on {request.url.path}",
        }
        message = messages.get(error.status_code) or error.detail or HTTPStatus(error.status_code).phrase
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        return ApiError(
            500, "internal error: see the server's log"
        ).response()  # whose traceback uvicorn logs


def _invalid(error: RequestValidationError) -> ApiError:
    """The first of what is wrong, and where."""
    found = error.errors()
    if found[0]["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {found[0]['ctx']['error']}")
    if not isinstance(error.body, dict):
        return ApiError(400, "the body must be a JSON object, sent as Content-Type: application/json")
    places = [_place(each["loc"], error.body) for each in found]
    # Of the members of a union, each of which complains, the one that got furthest was meant.
    path, first = max(zip(places, found, strict=True), key=lambda each: len(each[0]))
    param = ".".join(path) or None
    if first["type"] == "extra_forbidden":
        return unsupported(param or "", f"{param}: this server knows no such parameter; leave it out")
    message = "is required" if first["type"] == "missing" else first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message}" if param else message, param=param)


def _place(location: tuple[str | int, ...], body: Any) -> list[str]:
    """The path within the body. What pydantic adds for the members of a union is no part of it."""
    path: list[str] = []
    for part in location[1:]:
        try:
            body = body[part]
        except (LookupError, TypeError):
            if not (isinstance(body, dict) and part == location[-1]):
                continue
            body = None  # what is missing
        path.append(str(part))
    return path
