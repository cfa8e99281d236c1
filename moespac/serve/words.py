"""The text of single tokens, as log-probabilities name them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from moespac.engine.text import REPLACEMENT


class Words:
    """``tokenizer`` is the model's, or None: tokens are then named by their numbers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.text = lru_cache(maxsize=65536)(self._text)
        # Some decoders drop the space that a token begins with at the start of a text: so it never stands there.
        self._before: list[int] = tokenizer.encode("a", add_special_tokens=False) if tokenizer else []
        self._skip = len(self._decode(self._before)) if tokenizer else 0

    def data(self, token: int) -> bytes | None:
        """The token's bytes; None where they are part of a character only."""
        text = self.text(token)
        return None if REPLACEMENT in text else text.encode("utf-8")

    def _text(self, token: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token}"
        return self._decode([*self._before, token])[self._skip :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)
