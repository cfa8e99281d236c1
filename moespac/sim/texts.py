"""What the passes over a text show: as they were recorded, or as a stated acceptance rate would have had them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np

from moespac.trace.schema import DecodedTokens, Trace, by_layer
from moespac.types import Observation, Window


class Text(Protocol):
    """One sequence, pass by pass."""

    def upcoming(self) -> Window | None:
        """What the next pass runs before any draft; None at the end."""
        ...

    def room(self) -> int:
        """How many drafts can be of use in the next pass."""
        ...

    def read(self, drafts: int) -> Observation:
        """The next pass, with at most so many drafts."""
        ...

    def look_back(self, tokens: int) -> list[float]:
        """Whether drafts of the last ``tokens`` would have been right, 1 or 0, where that is known."""
        ...


class RecordedText:
    """A sequence with real drafts and acceptance: its passes are what they were, whatever is asked for."""

    def __init__(self, trace: Trace, sequence: int, tokens: int | None) -> None:
        """The passes until ``tokens`` are decoded; None: all."""
        self._passes = deque(_until(trace.passes(sequence), tokens))

    def upcoming(self) -> Window | None:
        if not self._passes:
            return None
        window = self._passes[0].window
        return Window(window.tokens[: len(window.tokens) - window.drafted], prefill=window.prefill)

    def room(self) -> int:
        return self._passes[0].window.drafted

    def read(self, drafts: int) -> Observation:
        return self._passes.popleft()

    def look_back(self, tokens: int) -> list[float]:
        return []


class DrawnText:
    """A sequence of decoded tokens, with drafts as they might have been.

    The draft for each position is right with probability ``acceptance``, drawn once for the position, and a pass
    accepts the drafts before its first wrong one: all policies see the same text. A wrong draft and those after
    it are stood in for by other tokens of the text, with their routing. A text that was recorded without its
    prompt is prompted by its first ``prompt`` tokens (half of a short one).
    """

    def __init__(
        self,
        trace: Trace,
        sequence: int,
        tokens: int | None,
        acceptance: float,
        prompt: int,
        rng: np.random.Generator,
    ) -> None:
        """The first ``tokens`` after the prompt; None: all."""
        text = trace.decode_tokens(sequence)
        self._prompt = deque(seen for seen in trace.passes(sequence) if seen.window.prefill)
        prompt = 0 if self._prompt else min(prompt, len(text.tokens) // 2)
        if prompt:
            self._prompt.append(_prefill(DecodedTokens(text.tokens[:prompt], text.routing[:prompt])))
            text = DecodedTokens(text.tokens[prompt:], text.routing[prompt:])
        self._tokens, self._routing = text
        length = len(self._tokens)
        self._right = rng.random(length) < acceptance
        self._stand_in = rng.integers(max(length, 1), size=length)
        self._end = length if tokens is None else min(length, tokens)
        self._at = 0

    def upcoming(self) -> Window | None:
        if self._prompt:
            return self._prompt[0].window
        return Window(self._tokens[self._at : self._at + 1]) if self._at < self._end else None

    def room(self) -> int:
        return 0 if self._prompt else self._end - self._at - 1

    def read(self, drafts: int) -> Observation:
        if self._prompt:
            return self._prompt.popleft()
        drafted = min(drafts, self.room())
        run = np.arange(self._at, self._at + 1 + drafted)
        wrong = np.flatnonzero(~self._right[run[1:]])
        accepted = int(wrong[0]) if wrong.size else drafted
        self._at += 1 + accepted
        run[1 + accepted :] = self._stand_in[run[1 + accepted :]]
        return Observation(Window(self._tokens[run], drafted), by_layer(self._routing[run]), accepted)

    def look_back(self, tokens: int) -> list[float]:
        return self._right[max(self._at + 1 - tokens, 0) : self._at + 1].astype(float).tolist()


def _prefill(text: DecodedTokens) -> Observation:
    return Observation(Window(text.tokens, prefill=True), by_layer(text.routing), accepted=0)


def _until(passes: Iterable[Observation], tokens: int | None) -> Iterator[Observation]:
    decoded = 0
    for seen in passes:
        if tokens is not None and decoded >= tokens:
            return
        yield seen
        decoded += 0 if seen.window.prefill else seen.accepted + 1
