"""The token table: P(expert | token, layer). What a token is says much about where it is routed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moespac.config import SensorConfig
from moespac.types import Ids, ModelShape

_FIRST_ROWS = 256  # allocated at first; doubled on demand


class TokenTable:
    """One row for each token id met, bounded in memory: two running averages of where the token was routed.

    One is over all its sightings, one over the latest few: what a token means in this text outweighs what it
    meant in others.
    """

    def __init__(self, shape: ModelShape, config: SensorConfig) -> None:
        self._config = config
        self._width = shape.total
        self._limit = max(1, config.table_bytes // (self._width * 2 * 2))  # two averages in float16
        self._row: dict[int, int] = {}
        self._clock = 0
        self._allocate(min(_FIRST_ROWS, self._limit))

    def __len__(self) -> int:
        return len(self._row)

    @property
    def tokens(self) -> Ids:
        """(rows,) the token of each row."""
        return self._token[: len(self)]

    @property
    def sightings(self) -> NDArray[np.float32]:
        """(rows,) how often each was seen."""
        return self._seen[: len(self)]

    @property
    def frequencies(self) -> NDArray[np.float16]:
        """(rows, layers * experts): share of all sightings of a token that went to each expert."""
        return self._mean[: len(self)]

    def lookup(self, tokens: Ids, rate: NDArray[np.float32]) -> NDArray[np.float32]:
        """P(expert | token), smoothed towards ``rate`` (layers * experts,), which stands for unknown tokens.

        Returns (T, layers * experts).
        """
        rows = np.fromiter((self._row.get(token, -1) for token in tokens.tolist()), np.int64, len(tokens))
        ever = np.where(rows < 0, 0, np.minimum(self._seen[rows], self._config.table_memory))
        lately = np.where(rows < 0, 0, self._config.recent_weight * self._seen_recently[rows])
        prior = self._config.table_prior
        parts = np.stack([ever, lately, np.full(len(rows), prior)])
        share = (parts / parts.sum(axis=0)).astype(np.float32)[:, :, None]  # (3, T, 1)
        return share[0] * self._mean[rows] + share[1] * self._recent_mean[rows] + share[2] * rate

    def learn(self, tokens: Ids, counts: NDArray[np.float32], times: NDArray[np.int64]) -> None:
        """Distinct ``tokens`` (T,) were seen ``times`` (T,), routed as ``counts`` (T, layers * experts)."""
        rows = np.array([self._claim(token) for token in tokens.tolist()], dtype=np.int64)
        sample = counts / times[:, None].astype(np.float32)
        self._seen[rows] += times
        fade = (1 - 1 / self._config.recent_memory) ** times
        self._seen_recently[rows] = self._seen_recently[rows] * fade + times
        averaged = np.minimum(self._seen[rows], self._config.table_memory)
        self._average(self._mean, rows, sample, times / averaged)
        self._average(self._recent_mean, rows, sample, times / self._seen_recently[rows])
        self._clock += 1
        self._last[rows] = self._clock

    def restore(self, tokens: Ids, sightings: NDArray[np.float32], frequencies: NDArray[np.float16]) -> None:
        """Take over the rows of a saved table, the most seen ones where not all fit."""
        kept = np.argsort(-sightings, kind="stable")[: self._limit]
        self._allocate(max(len(kept), 1))
        self._row = {token: row for row, token in enumerate(tokens[kept].tolist())}
        self._token[: len(kept)] = tokens[kept]
        self._seen[: len(kept)] = sightings[kept]
        self._mean[: len(kept)] = frequencies[kept]

    @staticmethod
    def _average(means: NDArray[np.float16], rows: Ids, sample: NDArray, step: NDArray) -> None:
        mean = means[rows].astype(np.float32)  # once: half precision is converted slowly
        means[rows] = mean + np.minimum(step, 1).astype(np.float32)[:, None] * (sample - mean)

    def _claim(self, token: int) -> int:
        """The row of ``token``: its own, a free one, or the least seen (of those, the longest unseen)."""
        if token in self._row:
            return self._row[token]
        row = len(self._row)
        if row == self._limit:
            row = int(np.argmin(self._seen + self._last / (self._clock + 1)))
            del self._row[int(self._token[row])]
        elif row == len(self._token):
            self._grow()
        self._row[token] = row
        self._token[row], self._seen[row], self._seen_recently[row] = token, 0, 0
        self._last[row] = np.inf  # until learned: not to be taken by the next new token of the same window
        return row

    def _allocate(self, rows: int) -> None:
        self._token = np.zeros(rows, np.int64)
        self._seen = np.zeros(rows, np.float32)
        self._seen_recently = np.zeros(rows, np.float32)
        self._last = np.zeros(rows, np.float64)
        self._mean = np.zeros((rows, self._width), np.float16)
        self._recent_mean = np.zeros((rows, self._width), np.float16)

    def _grow(self) -> None:
        old = self._columns()
        used = len(self._token)
        self._allocate(min(2 * used, self._limit))
        for new, values in zip(self._columns(), old, strict=True):
            new[:used] = values

    def _columns(self) -> tuple[NDArray, ...]:
        return self._token, self._seen, self._seen_recently, self._last, self._mean, self._recent_mean
