"""Answers in the shapes of OpenAI's API: one for each endpoint, whole or in chunks."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from typing import Any

from moespac.engine.engine import Piece
from moespac.serve.words import Words
from moespac.speculate.logprobs import TokenLogprob


class Reply:
    """Builds what one request gets. Streamed or not, the pieces go through here."""

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, model: str, words: Words, prompt_tokens: int) -> None:
        self._words = words
        self._prompt_tokens = prompt_tokens
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] | None = None
        self._tokens = 0

    def add(self, piece: Piece) -> None:
        self._texts.append(piece.text)
        self._tokens += len(piece.tokens)
        if piece.logprobs is not None:
            self._logprobs = (self._logprobs or []) + piece.logprobs

    def whole(self, finish_reason: str) -> dict[str, Any]:
        choice = self._choice("".join(self._texts), self._logprobs, finish_reason)
        return self._head | {"object": self.kind, "choices": [choice], "usage": self.usage()}

    def first_chunk(self) -> dict[str, Any] | None:
        """What is said before there is any text."""
        return None

    def chunk(self, piece: Piece) -> dict[str, Any]:
        return self._chunk([self._delta(piece.text, piece.logprobs, None)])

    def last_chunk(self, finish_reason: str) -> dict[str, Any]:
        return self._chunk([self._delta(None, None, finish_reason)])

    def usage_chunk(self) -> dict[str, Any]:
        return self._chunk([]) | {"usage": self.usage()}

    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._tokens,
            "total_tokens": self._prompt_tokens + self._tokens,
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"object": self.chunk_kind, "choices": choices}

    def _choice(self, text: str, logprobs: list[TokenLogprob] | None, finish_reason: str) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(
        self, text: str | None, logprobs: list[TokenLogprob] | None, finish_reason: str | None
    ) -> dict[str, Any]:
        raise NotImplementedError


class ChatReply(Reply):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first_chunk(self) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _choice(self, text: str, logprobs: list[TokenLogprob] | None, finish_reason: str) -> dict[str, Any]:
        return {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "logprobs": self._told(logprobs),
            "finish_reason": finish_reason,
        }

    def _delta(
        self, text: str | None, logprobs: list[TokenLogprob] | None, finish_reason: str | None
    ) -> dict[str, Any]:
        return {
            "index": 0,
            "delta": {} if text is None else {"content": text},
            "logprobs": self._told(logprobs),
            "finish_reason": finish_reason,
        }

    def _told(self, logprobs: list[TokenLogprob] | None) -> dict[str, Any] | None:
        if logprobs is None:
            return None
        content = [
            self._token(entry.token, entry.logprob)
            | {"top_logprobs": [self._token(token, value) for token, value in entry.top]}
            for entry in logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text, data = self._words.text(token), self._words.data(token)
        return {"token": text, "logprob": logprob, "bytes": None if data is None else list(data)}


class TextReply(Reply):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, words: Words, prompt_tokens: int) -> None:
        super().__init__(model, words, prompt_tokens)
        self._offset = 0  # of the next token, in the text of all tokens

    def _choice(self, text: str, logprobs: list[TokenLogprob] | None, finish_reason: str) -> dict[str, Any]:
        return {
            "index": 0,
            "text": text,
            "logprobs": self._told(logprobs),
            "finish_reason": finish_reason,
        }

    def _delta(
        self, text: str | None, logprobs: list[TokenLogprob] | None, finish_reason: str | None
    ) -> dict[str, Any]:
        return {
            "index": 0,
            "text": text or "",
            "logprobs": self._told(logprobs),
            "finish_reason": finish_reason,
        }

    def _told(self, logprobs: list[TokenLogprob] | None) -> dict[str, Any] | None:
        if logprobs is None:
            return None
        texts = [self._words.text(entry.token) for entry in logprobs]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": [
                {self._words.text(token): value for token, value in entry.top} for entry in logprobs
            ],
            "text_offset": offsets,
        }


ReplyFactory = Callable[[str, Words, int], Reply]

DONE = b"data: [DONE]\n\n"


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode("ascii") + b"\n\n"
