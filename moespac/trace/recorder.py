"""Recording: the observations that a policy gets, kept."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moespac.trace.schema import Trace, by_layer, compact
from moespac.types import ModelShape, Observation, Window


class TraceRecorder:
    """Called with each pass of a run, in order (``ExpertRuntime.recorder``); ``trace`` is what was seen so far.

    Example: ``engine.runtime.recorder = recorder``, then ``recorder.begin_sequence("poetry")`` before each text.
    """

    def __init__(self, shape: ModelShape, source: str) -> None:
        self._shape = shape
        self._source = source
        self._windows: list[Window] = []
        self._accepted: list[int] = []
        self._routing: list[NDArray[np.unsignedinteger]] = []  # compact at once: a run is long
        self._weights: list[NDArray[np.float16]] = []
        self._categories: list[str] = []
        self._begins: list[int] = []  # the pass that each sequence begins with

    def begin_sequence(self, category: str = "") -> None:
        """The passes to come are of a new text."""
        self._categories.append(category)
        self._begins.append(len(self._windows))

    def __call__(self, observation: Observation) -> None:
        """Keep one pass. All passes of a run have weights, or none has."""
        assert self._begins, "begin_sequence() comes before the first pass"
        self._windows.append(observation.window)
        self._accepted.append(observation.accepted)
        self._routing.append(compact(by_layer(observation.routing), self._shape.experts))
        if observation.weights is not None:
            self._weights.append(by_layer(observation.weights).astype(np.float16))

    def trace(self) -> Trace:
        windows = self._windows
        assert len(self._weights) in (0, len(windows))
        empty = np.empty((0, self._shape.layers, self._shape.top_k), np.int64)
        return Trace(
            experts=self._shape.experts,
            tokens=np.concatenate([[], *(window.tokens for window in windows)]).astype(np.int32),
            routing=np.concatenate([compact(empty, self._shape.experts), *self._routing]),
            weights=np.concatenate(self._weights) if self._weights else None,
            pass_offsets=np.cumsum([0, *(len(window.tokens) for window in windows)], dtype=np.int64),
            drafted=np.array([window.drafted for window in windows], np.int32),
            accepted=np.array(self._accepted, np.int32),
            prefill=np.array([window.prefill for window in windows], np.bool_),
            sequence_offsets=np.array([*self._begins, len(windows)], np.int64),
            categories=tuple(self._categories),
            source=self._source,
        )
