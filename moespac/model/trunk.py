"""The trunk: everything of a model but its experts, run over a window of tokens."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch

from moespac.config import GraphConfig
from moespac.model.cache import FullCache, KvCache
from moespac.model.graphed import GraphedTrunk, graphed_trunk
from moespac.model.lean import LeanTrunk, lean_trunk
from moespac.model.recorder import recorder_for
from moespac.schedule.stats import PassClock


class Cache(Protocol):
    """Keys and values of one sequence."""

    rewinds: bool  # once it can forget tokens
    survives: bool  # a pass that fails in its midst leaves it as it was

    def allow_rewind(self) -> None:
        """The prefill is over: remember enough to forget."""

    def rewind(self, tokens: int) -> None:
        """Forget the last ``tokens``; 0 too."""


class Trunk(Protocol):
    """A model's forward pass."""

    def new_cache(self) -> Any:
        """A ``Cache`` that the calls for one sequence share."""

    def __call__(self, tokens: torch.Tensor, cache: Any, keep: int) -> torch.Tensor:
        """Token ids (T,) on the CPU, which join the cache -> logits (keep, vocabulary) of the last ``keep``,
        float32, on the CPU or the model's device."""
        ...


class ModelTrunk:
    """transformers' own forward pass; ``new_cache`` makes what it takes."""

    def __init__(self, model: Any, new_cache: Any) -> None:
        self._model = model
        self.new_cache = new_cache
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(self, tokens: torch.Tensor, cache: Any, keep: int) -> torch.Tensor:
        limit = {"logits_to_keep": keep} if self._keeps_logits else {}
        out = self._model(
            input_ids=tokens[None].to(self._model.device),
            past_key_values=cache.past_key_values,
            use_cache=True,
            **limit,
        )
        cache.update(out.past_key_values)
        return out.logits[0, -keep:].float().cpu()


def open_trunk(model: Any, threads: int, clock: PassClock, graphs: GraphConfig) -> Trunk:
    """The leanest forward pass of a target, whose experts can be called; ``threads`` for the native kernel.

    Passes over recordings wait, and count what they cost the host, on ``clock``.
    """
    return _lean(model, threads, clock, graphs) or ModelTrunk(model, lambda: KvCache(model))


def open_draft_trunk(model: Any, threads: int, graphs: GraphConfig) -> Trunk:
    """The same of a draft model; its cache can be taken back at any time, to any length."""
    return _lean(model, threads, PassClock(), graphs) or ModelTrunk(model, FullCache)


def _lean(model: Any, threads: int, clock: PassClock, graphs: GraphConfig) -> GraphedTrunk | LeanTrunk | None:
    lean = lean_trunk(model, threads)
    recorder = recorder_for(model.device)
    if lean is None or recorder is None:
        return lean
    return graphed_trunk(model, lean, recorder, clock, graphs) or lean
