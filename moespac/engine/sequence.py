"""One request: its tokens, the target's KV cache, and how far they have come."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from moespac.config import SamplingConfig
from moespac.model.trunk import Cache
from moespac.speculate.drafters import Drafter, NoDrafter
from moespac.types import Window


class Sequence:
    """Accepted tokens, of which the first ``cached`` are in the KV cache.

    The last accepted token is never cached: the next pass runs it, in front of the drafted ones.
    """

    def __init__(
        self,
        cache: Cache,
        prompt: list[int],
        max_new_tokens: int,
        context: int,
        eos: frozenset[int],
        sampling: SamplingConfig,
    ) -> None:
        self.tokens = list(prompt)
        self.prompt_tokens = len(prompt)
        self.sampling = sampling
        self.generator = torch.Generator().manual_seed(sampling.seed)
        self.cache = cache
        self.cached = 0
        self.lost = False  # the cache does not hold them: a pass failed in its midst
        self.chances: list[float] = []  # what the target gave to each new token; 1 where it does not draw
        self.undrafted = 1  # passes since its drafter was last shown the tokens; the prefill is one
        self.finish_reason: str | None = None
        self.drafter: Drafter = NoDrafter()
        self.top_logprobs: int | None = None  # alternatives to each token; None: no log-probabilities at all
        self._limit = min(len(prompt) + max_new_tokens, context)
        self._limited_by = "length" if len(prompt) + max_new_tokens <= context else "context"
        self._eos = eos

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[self.prompt_tokens :]

    def unseen(self, most: int) -> list[float]:
        """The chances of the last tokens, at most so many, that its drafter was not shown: one of each pass."""
        return self.chances[-min(self.undrafted, most) :]

    @property
    def prefilled(self) -> bool:
        return self.cached >= self.prompt_tokens

    @property
    def room(self) -> int:
        """How many drafted tokens can be of use: one token of what remains comes from the target itself, and
        a draft needs a cache that its rejection can be taken out of."""
        return self._limit - len(self.tokens) - 1 if self.cache.rewinds else 0

    def leading_windows(self, chunk: int) -> Iterator[Window]:
        """A long prompt piece by piece, all but what fits in one last pass. The caller runs and rewinds each."""
        while self.prompt_tokens - self.cached > chunk:
            tokens = np.array(self.tokens[self.cached : self.cached + chunk], dtype=np.int64)
            yield Window(tokens, prefill=True)

    def cached_windows(self, chunk: int) -> Iterator[Window]:
        """What the cache should hold, piece by piece."""
        for start in range(0, self.cached, chunk):
            tokens = np.array(self.tokens[start : min(start + chunk, self.cached)], dtype=np.int64)
            yield Window(tokens, prefill=True)

    def window(self, draft: list[int]) -> Window:
        """The tokens that the next pass runs."""
        tokens = np.array(self.tokens[self.cached :] + draft, dtype=np.int64)
        return Window(tokens, drafted=len(draft), prefill=not self.prefilled)

    def rewind(self, window: Window, accepted: int) -> None:
        """The pass ran ``window``; forget the keys and values of the drafts that were rejected."""
        rejected = window.drafted - accepted
        self.cache.rewind(rejected)
        self.cached += len(window.tokens) - rejected
        if self.prefilled:
            self.cache.allow_rewind()

    def accept(self, tokens: list[int]) -> list[int]:
        """Append what verification gave, up to the end of text or the limit; returns what was appended."""
        taken = tokens[: self._limit - len(self.tokens)]
        ends = [i for i, token in enumerate(taken) if token in self._eos]
        if ends:
            taken = taken[: ends[0] + 1]
            self.finish_reason = "stop"
        self.tokens.extend(taken)
        if self.finish_reason is None and len(self.tokens) >= self._limit:
            self.finish_reason = self._limited_by
        return taken
