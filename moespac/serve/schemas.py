"""What clients send, checked as it comes in. What is not supported is refused by name, never ignored.

The fields are those of OpenAI's API (Chat Completions and Completions), and ``top_k`` and ``min_p``, which other
local servers have too.
"""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moespac.serve.errors import ApiError, unsupported

# Accepted and without effect here: they are the account's, the cloud's, or about tools, of which there are none.
_WITHOUT_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "prompt_cache_key", "safety_identifier"}
)  # fmt: skip

# What is not supported, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "one answer a request: send several requests"),
    "best_of": ((1,), "one answer a request"),
    "response_format": (({"type": "text"},), "only text is supported, not JSON modes or schemas"),
    "tools": (([],), "tools are not supported"),
    "tool_choice": (("none", "auto"), "tools are not supported"),
    "functions": (([],), "functions are not supported"),
    "function_call": (("none", "auto"), "functions are not supported"),
    "presence_penalty": ((0,), "penalties are not supported: leave it out or 0"),
    "frequency_penalty": ((0,), "penalties are not supported: leave it out or 0"),
    "logit_bias": (({},), "logit_bias is not supported"),
    "suffix": (("",), "suffix is not supported"),
    "echo": ((False,), "echo is not supported"),
    "modalities": ((["text"],), "only text is supported"),
    "audio": ((), "only text is supported"),
    "prediction": ((), "predicted outputs are not supported: speculation needs none"),
}

Count = Annotated[int, Field(ge=1, le=2**31)]


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation. Its other fields (name, refusal ...) have no effect."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """As chat templates want it."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        return {"role": role, "content": "".join(part.text for part in self.content)}


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool = False


class CommonRequest(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    model: str
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=1024)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(max_length=16)]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        try:
            json.dumps(data, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ApiError(
                400, "the body has half a surrogate pair (\\ud800 to \\udfff): no text has that"
            ) from None
        for name, (neutral, reason) in _NEUTRAL.items():
            if name in data and data[name] is not None and data[name] not in neutral:
                raise unsupported(name, f"{name}: {reason}")
        return {name: value for name, value in data.items() if name not in _NEUTRAL.keys() | _WITHOUT_EFFECT}

    @model_validator(mode="after")
    def _check_together(self) -> CommonRequest:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options: only where stream is true", param="stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def limit(self) -> int | None:
        """Tokens of the answer at most, where the client says so."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """Alternatives to each token; None: no log-probabilities."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """For ``Engine.stream``, all but the length. OpenAI's defaults: the model's own distribution, any seed."""
        stop = self.stop or []
        return {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": max(self.top_k or 0, 0),
            "min_p": self.min_p or 0.0,
            "seed": secrets.randbits(63) if self.seed is None else self.seed % 2**63,
            "stop": [stop] if isinstance(stop, str) else stop,
            "top_logprobs": self.alternatives,
        }


class ChatRequest(CommonRequest):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None  # its newer name
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs: only where logprobs is true", param="top_logprobs")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(CommonRequest):
    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens or 16  # OpenAI's default here

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    def one_prompt(self) -> str | list[int]:
        """Text or token ids. Raises ApiError for several prompts."""
        prompt = self.prompt
        if isinstance(prompt, str) or all(isinstance(token, int) for token in prompt):
            return prompt  # type: ignore[return-value]
        if len(prompt) != 1:
            raise unsupported("prompt", "prompt: one prompt a request; send several requests")
        return prompt[0]  # type: ignore[return-value]


# ---- what they get: for /openapi.json; answers are built as plain dicts (replies.py) -------------------------


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: ErrorDetail


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class Health(BaseModel):
    status: Literal["ok", "stopping"]
    model: str
    version: str
    active: int
    waiting: int
