"""What longer windows would have cost, told from the passes that ran: no draft has to be tried for it.

The tokens that a text came to, one pass after the other, are what a perfect draft would have proposed. So passes
are looked back on as the begin of windows of two, three and more tokens, over the residency that they found; the
experts that only the later tokens needed are what such a window would have cost more. Ours; for the governor of K.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moespac.policy.cost import CostModel
from moespac.types import Grid, Ids, ModelShape, Observation, Residency, Window

_ENOUGH = 3  # windows of a size, before their mean is more than chance
_AT_ONCE = 3  # windows looked back on at a time: a mean needs no more, and each takes some 30 us a token


class LookedBack(NamedTuple):
    """What the governor is told of a pass. Seconds, of experts alone."""

    first: float  # what its first token alone would have cost
    extra: list[float]  # [n] what n further tokens have been seen to cost more; as many as are known


NOTHING = LookedBack(0.0, [])  # where nobody looks back


class _Begun(NamedTuple):
    """A window that began with a pass, and goes on."""

    on_accelerator: Grid  # as the pass found them, flat
    in_host: Grid
    counts: NDArray[np.int64]  # (layers * experts,) its tokens so far
    seconds: list[float]  # of experts, for the window of 1, 2 ... tokens


class WindowCosts:
    """Looks back on passes as they come; the means that it keeps have a limited life."""

    def __init__(self, shape: ModelShape, costs: CostModel, most: int, memory: float) -> None:
        """``most`` tokens a window; ``memory`` windows is the mean life of what was seen."""
        self._shape = shape
        self._costs = costs
        self._most = most
        self._memory = memory
        self._layer = np.arange(shape.total) // shape.experts
        self._first_of_layer = np.arange(shape.layers)[:, None, None] * shape.experts
        self._extra = np.zeros(most)
        self._seen = np.zeros(most, np.int64)
        self.reset()

    def latest(self) -> LookedBack:
        """About the pass that was observed last."""
        known = int(np.argmin(np.append(self._seen >= _ENOUGH, False)))
        return LookedBack(self._first, self._extra[: max(known, 1)].tolist())

    def reset(self) -> None:
        """Another text: its tokens do not go on with the windows of the last one."""
        self._begun: deque[_Begun] = deque()
        self._now: _Begun | None = None
        self._first = 0.0

    def begin(self, window: Window, residency: Residency) -> None:
        """A pass begins, over this ``residency``."""
        if window.prefill:
            self.reset()
            return
        grids = residency.accelerator.ravel().copy(), residency.host.ravel().copy()
        self._now = _Begun(*grids, np.zeros(self._shape.total, np.int64), [])

    def observe(self, seen: Observation) -> None:
        """That pass is verified."""
        now, self._now = self._now, None
        if now is None:
            return
        kept = len(seen.window.tokens) - seen.window.drafted + seen.accepted
        routing = seen.routing[:, : min(kept, self._most)]
        flat = np.where(routing < 0, -1, routing + self._first_of_layer)
        if len(self._begun) < _AT_ONCE:
            self._begun.append(now)
        else:
            self._add(now, flat[:, 0])
        for token in range(flat.shape[1]):
            for window in self._begun:
                self._add(window, flat[:, token])
                self._learn(window.seconds)
            while self._begun and len(self._begun[0].seconds) >= self._most:
                self._begun.popleft()
        self._first = now.seconds[0]

    def _add(self, window: _Begun, ids: Ids) -> None:
        window.counts[ids[ids >= 0]] += 1
        window.seconds.append(self._seconds(window))

    def _learn(self, seconds: list[float]) -> None:
        further = len(seconds) - 1
        self._seen[further] += 1
        step = max(1 / self._seen[further], 1 / self._memory)
        self._extra[further] += step * (seconds[-1] - seconds[0] - self._extra[further])

    def _seconds(self, window: _Begun) -> float:
        """Of a window's experts: in each layer the accelerator's, the host's and the reads run side by side."""
        active = np.flatnonzero(window.counts)
        tokens, layer = window.counts[active], self._layer[active]
        layers, there = self._shape.layers, window.on_accelerator[active]
        here = ~there
        each = np.bincount(layer[here], self._costs.host_expert(tokens[here]), layers)
        if there.any():
            on_accelerator = self._costs.accelerator_expert(tokens[there])
            each = np.maximum(each, np.bincount(layer[there], on_accelerator, layers))
        read = here & ~window.in_host[active]
        if read.any():
            each = np.maximum(each, np.bincount(layer[read], minlength=layers) * self._costs.storage)
        return float(each.sum())
