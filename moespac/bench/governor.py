"""GOVERNOR: the K that the governor chooses against every fixed K, text by text, in turn, in one process.

Whole runs one after the other differ by a tenth on a shared machine, more than the governor may cost. So each text
is decoded by all engines within seconds, in an order that is drawn, and sums over the same texts are compared.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moespac
from moespac.engine.engine import Engine
from moespac.errors import ConfigError

Window = int | str  # K, or "auto"
GOVERNED: Window = "auto"
_RESAMPLES = 2000  # of the texts: an interval's ends then vary by a tenth of its width
_OUTSIDE = 0.05  # of them lie outside of the interval, half on each side


@dataclass(frozen=True)
class Comparison:
    """``seconds``: of each text by window, decoding ``tokens`` each. ``left_out``: texts that were too long."""

    tokens: int
    seconds: tuple[dict[Window, float], ...]
    left_out: int = 0

    def tokens_per_second(self, window: Window) -> float:
        return self.tokens * len(self.seconds) / sum(text[window] for text in self.seconds)

    @property
    def best(self) -> Window:
        """The fixed K that was fastest over all texts: known only afterwards."""
        return max((w for w in self.seconds[0] if w != GOVERNED), key=self.tokens_per_second)

    @property
    def ratio(self) -> float:
        """The governed engine's speed over that of the best fixed K."""
        return _ratio(self.seconds, self.best)

    def interval(self) -> tuple[float, float]:
        """Within which 95% of such ratios lie over texts drawn anew from these (bootstrap)."""
        rng, best = random.Random(0), self.best
        ratios = sorted(
            _ratio(rng.choices(self.seconds, k=len(self.seconds)), best) for _ in range(_RESAMPLES)
        )
        outside = int(_RESAMPLES * _OUTSIDE / 2)
        return ratios[outside], ratios[-1 - outside]

    def to_dict(self) -> dict[str, Any]:
        return {
            "tokens_per_second": {str(w): self.tokens_per_second(w) for w in self.seconds[0]},
            "best": self.best,
            "ratio": self.ratio,
            "interval": self.interval(),
            "tokens": self.tokens,
            "left_out": self.left_out,
            "seconds": [{str(w): spent for w, spent in text.items()} for text in self.seconds],
        }


def compare(
    pack: Path,
    draft: Path,
    host_memory: str,
    windows: Sequence[int],
    prompts: Sequence[Sequence[int]],
    warmup: Sequence[int],
    tokens: int,
    progress: Callable[[int, int], None],
) -> Comparison:
    """Decode ``tokens`` (2 or more) after each of ``prompts`` (token ids) with each fixed K and with the governor.

    Each has an engine of its own, which learns from text to text, after ``warmup``; memory must hold all of them.
    Raises ConfigError when no prompt fits the model's context.
    """
    with ExitStack() as stack:
        engines = {
            window: stack.enter_context(_engine(pack, draft, host_memory, window))
            for window in (*windows, GOVERNED)
        }
        context = engines[GOVERNED].context
        fitting = [prompt for prompt in prompts if len(prompt) + tokens <= context]
        if not fitting:
            raise ConfigError(
                f"all prompts are longer than the model's context of {context} tokens; shorten one"
            )
        for engine in engines.values():
            _decode_seconds(engine, warmup, tokens)
        seconds = []
        for number, prompt in enumerate(fitting):
            progress(number, len(fitting))
            order = random.Random(number).sample(list(engines), len(engines))
            spent = {window: _decode_seconds(engines[window], prompt, tokens) for window in order}
            seconds.append({window: spent[window] for window in engines})
        progress(len(fitting), len(fitting))
    return Comparison(tokens - 1, tuple(seconds), len(prompts) - len(fitting))


def _engine(pack: Path, draft: Path, host_memory: str, window: Window) -> Engine:
    drafter: str | Path = draft if window else "none"
    settings: Any = {"draft": drafter, "window": window, "host_memory": host_memory, "profile": None}
    engine = moespac.load(pack, **settings)
    engine.model.generation_config.eos_token_id = None  # all decode equally many tokens
    return engine


def _decode_seconds(engine: Engine, prompt: Sequence[int], tokens: int) -> float:
    seconds = engine.generate(prompt, max_new_tokens=tokens).summary.seconds
    return seconds["total"] - seconds["prefill"]


def _ratio(texts: Sequence[dict[Window, float]], best: Window) -> float:
    return sum(text[best] for text in texts) / sum(text[GOVERNED] for text in texts)
