"""Pairs: where a token went when it last came after the same predecessor. A word in its phrase routes alike."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from moespac.config import SensorConfig
from moespac.types import Ids, ModelShape


class PairMemory:
    """The routing of the latest tokens, in a ring, with the earlier places of each pair of tokens chained."""

    def __init__(self, shape: ModelShape, config: SensorConfig) -> None:
        self._config = config
        self._width = shape.total
        dtype = np.min_scalar_type(-shape.total)
        self._room = max(1, config.pair_bytes // (shape.layers * shape.top_k * dtype.itemsize))
        self._routed = np.empty((self._room, shape.layers * shape.top_k), dtype)
        self._pair: list[tuple[int, int]] = []  # (predecessor, token) at each place of the ring
        self._before: list[int] = []  # when the same pair came before; times count all tokens ever learned
        self._latest: dict[tuple[int, int], int] = {}  # when each pair came last
        self._time = 0
        self._last_token = -1

    @property
    def tokens(self) -> Ids:
        """(n,) the tokens remembered, the oldest first."""
        return np.array([self._pair[time % self._room][1] for time in self._times()], np.int64)

    @property
    def routed(self) -> NDArray[np.signedinteger]:
        """(n, layers * k) the flat ids they went to."""
        return self._routed[[time % self._room for time in self._times()]]

    def learn(self, tokens: Ids, routed: Ids) -> None:
        """The next ``tokens`` (T,) of the text went to the flat ids ``routed`` (T, layers * k); -1: none."""
        for token, ids in zip(tokens.tolist(), routed, strict=True):
            self._append((self._last_token, token), ids)
            self._last_token = token

    def blend(self, chance: NDArray[np.float32], tokens: Ids) -> NDArray[np.float32]:
        """``chance`` (T, layers * experts) of the ``tokens`` to come next, moved towards what was seen of them."""
        sightings = [
            (row, time % self._room, weight)
            for row, pair in enumerate(pairwise([self._last_token, *tokens.tolist()]))
            for time, weight in self._sightings(pair)
        ]
        if not sightings:
            return chance
        row, place, weight = (np.array(column) for column in zip(*sightings, strict=True))
        routed = self._routed[place].astype(np.int64)
        cells = np.where(routed < 0, -1, row[:, None] * self._width + routed)
        real = cells >= 0
        weights = np.broadcast_to(weight[:, None], cells.shape)
        seen = np.bincount(cells[real], weights[real], chance.size).astype(np.float32).reshape(chance.shape)
        total = np.bincount(row, weight, len(chance)).astype(np.float32)[:, None]
        prior = np.float32(self._config.pair_prior)
        return (prior * chance + seen) / (prior + total)

    def _sightings(self, pair: tuple[int, int]) -> list[tuple[int, float]]:
        """The latest times of ``pair``, each with its weight."""
        found: list[tuple[int, float]] = []
        time, weight = self._latest.get(pair, -1), 1.0
        while time >= max(0, self._time - self._room) and len(found) < self._config.pair_sightings:
            found.append((time, weight))
            time, weight = self._before[time % self._room], weight * self._config.pair_fade
        return found

    def _append(self, pair: tuple[int, int], ids: Ids) -> None:
        place = self._time % self._room
        if self._time < self._room:
            self._pair.append(pair)
            self._before.append(-1)
        elif self._latest[self._pair[place]] == self._time - self._room:
            del self._latest[self._pair[place]]  # its only sighting is overwritten
        self._pair[place], self._before[place] = pair, self._latest.get(pair, -1)
        self._latest[pair] = self._time
        self._routed[place] = ids
        self._time += 1

    def _times(self) -> range:
        return range(max(0, self._time - self._room), self._time)
