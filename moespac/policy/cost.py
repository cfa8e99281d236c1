"""What things cost in seconds: priors from sizes and bandwidths, replaced by what the engine measures."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moespac.config import CostConfig
from moespac.policy.native_samples import NativeSamples

Seconds = NDArray[np.float64]

_FAR = 2.0**40  # tokens; no window is as long
_TABLE = 64  # token counts that are answered from a table: any window of speculation


@dataclass(frozen=True)
class MeasuredCosts:
    """What a machine was measured to take, in seconds."""

    host: Mapping[int, float]  # of one expert, by tokens
    accelerator: Mapping[int, float]
    link: float  # of one record
    storage: float


class _Median:
    """The median of the latest samples; the lower one of two, since a stray measurement is a slow one."""

    def __init__(self, samples: int) -> None:
        self._latest: deque[float] = deque(maxlen=samples)
        self.value: float | None = None

    def observe(self, *seconds: float) -> None:
        self._latest.extend(seconds)
        self.value = sorted(self._latest)[(len(self._latest) - 1) // 2]


class _Samples:
    """The latest of what was measured at powers of two of tokens, scaled to them in the prior's proportion.

    In native code where there is any: in a layer of a window there are dozens.
    """

    def __init__(self, first: float, further: float, there: Seconds, samples: int) -> None:
        """The prior: ``first`` seconds for one token, ``further`` for each token after it, ``there`` (buckets,)."""
        self._prior = (first, further, there)
        self._latest = np.zeros((len(there), samples))
        self._seen = np.zeros(len(there), np.int64)
        native = NativeSamples.over(first, further, there, self._latest, self._seen)
        self.add = native.add if native else self.add_in_python
        self.add_one = native.add_one if native else self.add_one_in_python

    def add_one_in_python(self, tokens: int, seconds: float) -> None:
        self.add_in_python(np.array([tokens]), np.array([seconds]))

    def add_in_python(self, tokens: NDArray[np.int64], seconds: Seconds) -> None:
        """One after the other."""
        first, further, there = self._prior
        for count, spent in zip(tokens.tolist(), seconds.tolist(), strict=True):
            bucket = min(round(math.log2(count)), len(there) - 1)
            here = first + further * (count - 1)
            place = self._seen[bucket] % self._latest.shape[1]
            self._latest[bucket, place] = spent * there[bucket] / here
            self._seen[bucket] += 1

    def medians(self) -> dict[int, float]:
        """By bucket, of those that have any; the lower one of two, since a stray measurement is a slow one."""
        found = {}
        for bucket in np.flatnonzero(self._seen).tolist():
            latest = sorted(self._latest[bucket, : self._seen[bucket]].tolist())
            found[bucket] = latest[(len(latest) - 1) // 2]
        return found


class _Curve:
    """Seconds as a function of tokens: at powers of two, measured or prior; linear between and beyond them.

    A bucket without a measurement takes the prior scaled like its nearest measured neighbour. More tokens are
    never cheaper. Measurements come once an expert and questions once a layer, so the curve is drawn anew when half
    as many have come as it was drawn from, at most ``config.redraw``, and read from a table for windows of ordinary
    size.
    """

    def __init__(self, first: float, further: float, config: CostConfig) -> None:
        """The prior: ``first`` seconds for one token, ``further`` for each token after it."""
        self._first, self._further = first, further
        self._nodes = 2.0 ** np.arange(config.buckets)
        self._shape: Seconds = np.asarray(first + further * (self._nodes - 1), np.float64)
        self._prior = self._shape
        self._samples = _Samples(first, further, self._shape, config.samples)
        self._redraw = config.redraw
        self._seen = 0  # measurements
        self._draw()

    def start_from(self, measured: Mapping[int, float]) -> None:
        """The prior goes through these, and keeps its shape between and beyond them."""
        tokens = np.array(sorted(measured), dtype=np.float64)
        ratios = np.array([measured[int(n)] for n in tokens]) / (self._first + self._further * (tokens - 1))
        prior = self._shape * np.interp(np.log2(self._nodes), np.log2(tokens), ratios)
        self._prior = np.maximum.accumulate(prior)
        self._draw()

    def observe(self, tokens: int, seconds: float) -> None:
        self._samples.add_one(tokens, seconds)
        self._seen += 1

    def observe_all(self, tokens: NDArray[np.int64], seconds: Seconds) -> None:
        """``observe`` for several, in this order."""
        self._samples.add(tokens, seconds)
        self._seen += len(seconds)

    def __call__(self, tokens: NDArray) -> Seconds:
        table = self.table()
        if tokens.dtype.kind == "i" and tokens.size and tokens.max() < _TABLE:
            return table[tokens]
        return np.interp(tokens, self._x, self._y)

    def table(self) -> Seconds:
        """(64,) the seconds of 0, 1 ... tokens."""
        if self._seen - self._drawn >= max(1, min(self._drawn // 2, self._redraw)):
            self._draw()
        return self._table

    def _draw(self) -> None:
        """Through the nodes, and on along the last piece."""
        seconds = self._prior
        medians = self._samples.medians()
        if medians:
            known = list(medians)
            ratios = np.array(list(medians.values())) / self._prior[known]
            nearest = np.abs(np.arange(len(self._nodes))[:, None] - known).argmin(axis=1)
            seconds = np.maximum.accumulate(self._prior * ratios[nearest])
        slope = (seconds[-1] - seconds[-2]) / (self._nodes[-1] - self._nodes[-2])
        self._x = np.append(self._nodes, _FAR)
        self._y = np.append(seconds, seconds[-1] + slope * (_FAR - self._nodes[-1]))
        self._table = np.interp(np.arange(_TABLE), self._x, self._y)
        self._drawn = self._seen


class CostModel:
    """Seconds for one expert on either device and for one record over either way; learns online."""

    def __init__(self, config: CostConfig, record_bytes: int) -> None:
        on_host = record_bytes / config.host_bandwidth
        on_accelerator = record_bytes / config.accelerator_bandwidth
        self._host = _Curve(on_host, on_host * config.host_token_share, config)
        self._accelerator = _Curve(
            config.accelerator_launch + on_accelerator,
            on_accelerator * config.accelerator_token_share,
            config,
        )
        self._beside_copy = _Median(config.samples)
        self._link = _Median(config.samples)
        self._storage = _Median(config.samples)
        self._link_prior = record_bytes / config.link_bandwidth
        self._storage_prior = record_bytes / config.storage_bandwidth

    def start_from(self, measured: MeasuredCosts) -> None:
        """Take these in place of what sizes and bandwidths suggest; what is observed from now on refines them."""
        self._host.start_from(measured.host)
        self._accelerator.start_from(measured.accelerator)
        self._link_prior, self._storage_prior = measured.link, measured.storage

    def host_expert(self, tokens: NDArray) -> Seconds:
        """Seconds of one expert's FFN on the host for each number of tokens; 1 or more."""
        return self._host(tokens)

    def accelerator_expert(self, tokens: NDArray) -> Seconds:
        """The same on the accelerator, its weights being there."""
        return self._accelerator(tokens)

    def tables(self) -> tuple[Seconds, Seconds]:
        """(64,) of ``host_expert`` and of ``accelerator_expert``, by tokens: for who asks in every layer."""
        return self._host.table(), self._accelerator.table()

    @property
    def link(self) -> float:
        """Seconds to copy one record from host to accelerator."""
        return self._link_prior if self._link.value is None else self._link.value

    @property
    def storage(self) -> float:
        """Seconds to read one record from storage, other reads running: the inverse of records per second."""
        return self._storage_prior if self._storage.value is None else self._storage.value

    @property
    def copy_toll(self) -> float:
        """How many times longer an expert on the host takes while records are copied: both read host memory."""
        return 1.0 if self._beside_copy.value is None else max(self._beside_copy.value, 1.0)

    @property
    def copy_price(self) -> float:
        """Seconds that one copy takes from a host that computes all the while."""
        return self.link * (1 - 1 / self.copy_toll)

    def observe_host(self, tokens: int, seconds: float) -> None:
        """One expert took ``seconds`` for ``tokens`` on the host, nothing being copied."""
        self._host.observe(tokens, seconds)

    def observe_host_beside_copy(self, tokens: int, seconds: float) -> None:
        """The same, records being copied all the while."""
        self.observe_host_experts_beside_copy(np.array([tokens]), np.array([seconds]))

    def observe_host_experts(self, tokens: NDArray[np.int64], seconds: Seconds) -> None:
        """``observe_host`` for each of several experts."""
        self._host.observe_all(tokens, seconds)

    def observe_host_experts_beside_copy(self, tokens: NDArray[np.int64], seconds: Seconds) -> None:
        """``observe_host_beside_copy`` for each of several experts."""
        self._beside_copy.observe(*(seconds / self._host(tokens)).tolist())

    def observe_accelerator(self, tokens: int, seconds: float) -> None:
        """One expert took ``seconds`` for ``tokens`` on the accelerator."""
        self._accelerator.observe(tokens, seconds)

    def observe_link(self, seconds: float) -> None:
        """One record took ``seconds`` from host to accelerator."""
        self._link.observe(seconds)

    def observe_storage(self, seconds: float) -> None:
        """One record took ``seconds`` from storage."""
        self._storage.observe(seconds)
