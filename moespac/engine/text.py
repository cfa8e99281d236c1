"""From tokens to text while they arrive: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from moespac.errors import ConfigError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoders put where bytes are not (yet) a character

# A character has at most 4 bytes, so real text reaches a boundary within a few tokens. Tokens that do not are
# not UTF-8 and never will be: they are shown as they are, or the window to decode would grow without end.
MAX_PENDING_TOKENS = 16


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


class TextStream:
    """Decodes a growing sequence once, holding back what the next token may still change.

    Tokens are decoded together with those up to the last boundary, as some decoders treat the start of a text
    differently; nothing older is decoded again, so a token costs a constant. Of the stop strings the one that
    completes first counts, the longest if several do: the text does not depend on how tokens cut it.
    """

    def __init__(self, tokenizer: Decoder, stop: Sequence[str] = ()) -> None:
        """Raises ConfigError for an empty stop string."""
        if "" in stop:
            raise ConfigError("a stop string is empty: give at least one character, or no stop string")
        self.kept = 0  # tokens taken in all; once stopped, the last of them completed the stop string
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._window: list[int] = []  # tokens of the last boundary's text, then those that came after
        self._context = 0  # how many of the window are the former
        self._shown = 0  # characters of the window's text that were taken
        self._held = ""  # text taken but not given out: it may be the beginning of a stop string

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that has become final. Tokens after the one that completes a stop string are not taken."""
        text = ""
        for token in token_ids:
            if self.stopped:
                break
            self.kept += 1
            self._window.append(token)
            text += self._release(self._decode_new())
        return text

    def flush(self) -> str:
        """The rest: no more tokens will come."""
        if self.stopped:
            return ""
        rest = self._release(self._decode(self._window)[self._shown :]) + self._held
        self._window, self._context, self._shown, self._held = [], 0, 0, ""
        return rest

    def _decode_new(self) -> str:
        """What the last token added, without an incomplete character at its end."""
        text = self._decode(self._window)
        hopeless = len(self._window) - self._context >= MAX_PENDING_TOKENS
        whole = text if hopeless else text.rstrip(REPLACEMENT)
        new = whole[self._shown :]
        self._shown = max(self._shown, len(whole))
        if (new and whole == text) or hopeless:
            self._start_window()
        return new

    def _start_window(self) -> None:
        """A boundary: what was new becomes the context of what comes."""
        del self._window[: self._context]
        self._context = len(self._window)
        self._shown = len(self._decode(self._window))

    def _release(self, new: str) -> str:
        """The part of held and new text that no later text can make part of a stop string."""
        text = self._held + new
        ends = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            self._held = ""
            return text[: min(ends)[1]]
        final = len(text) - self._stop_beginning(text)
        self._held = text[final:]
        return text[:final]

    def _stop_beginning(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)
