"""What things cost in seconds: priors from sizes and bandwidths, replaced by what the engine measures."""

from __future__ import annotations

import ctypes
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moespac.config import CostConfig
from moespac.experts.kernels.library import Curve, address, load_library

Seconds = NDArray[np.float64]

_FAR = 2.0**40  # tokens; no window is as long
TABLE = 64  # token counts that are answered from a table: any window of speculation


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


class _Curve:
    """Seconds as a function of tokens: at powers of two, measured or prior; linear between and beyond them.

    The latest measurements are scaled to powers of two in the prior's proportion. A bucket without any takes the
    prior scaled like its nearest measured neighbour. More tokens are never cheaper. Measurements come once an
    expert and questions once a layer, so the curve is drawn anew when half as many have come as it was drawn from,
    at most ``config.redraw``, and read from a table for windows of ordinary size. In native code where there is any
    (csrc/costs.c), over the same arrays.
    """

    def __init__(self, first: float, further: float, config: CostConfig) -> None:
        """The prior: ``first`` seconds for one token, ``further`` for each token after it."""
        self._first, self._further = first, further
        self._nodes = 2.0 ** np.arange(config.buckets)
        self._shape: Seconds = np.asarray(first + further * (self._nodes - 1), np.float64)
        self._prior = self._shape.copy()
        self._latest = np.zeros((config.buckets, config.samples))
        self._seen = np.zeros(config.buckets, np.int64)
        self._x = np.append(self._nodes, _FAR)
        self._y = np.empty(config.buckets + 1)
        self._table = np.empty(TABLE)
        arrays = (self._shape, self._prior, self._latest, self._seen, self._y, self._table)
        sizes = (*self._latest.shape, TABLE, config.redraw)
        self._state = Curve(*sizes, 0, 0, first, further, _FAR, *(address(array) for array in arrays))
        self.address = ctypes.addressof(self._state)  # for native code that observes, or asks
        self._library = load_library()
        self._draw()

    def start_from(self, measured: Mapping[int, float]) -> None:
        """The prior goes through these, and keeps its shape between and beyond them."""
        tokens = np.array(sorted(measured), dtype=np.float64)
        ratios = np.array([measured[int(n)] for n in tokens]) / (self._first + self._further * (tokens - 1))
        prior = self._shape * np.interp(np.log2(self._nodes), np.log2(tokens), ratios)
        self._prior[:] = np.maximum.accumulate(prior)
        self._draw()

    def observe(self, tokens: NDArray[np.int64], seconds: Seconds) -> None:
        """Experts took ``seconds`` for so many ``tokens``, in this order."""
        if self._library is None:
            self.observe_in_python(tokens, seconds)
            return
        assert tokens.dtype == np.int64 and tokens.size == seconds.size
        if not seconds.flags.c_contiguous:
            seconds = seconds.copy()
        self._library.moespac_observe(self.address, address(tokens), address(seconds), tokens.size)

    def observe_in_python(self, tokens: NDArray[np.int64], seconds: Seconds) -> None:
        for count, spent in zip(tokens.tolist(), seconds.tolist(), strict=True):
            bucket = min(round(math.log2(count)), len(self._nodes) - 1)
            here = self._first + self._further * (count - 1)
            place = self._seen[bucket] % self._latest.shape[1]
            self._latest[bucket, place] = spent * self._shape[bucket] / here
            self._seen[bucket] += 1
        self._state.measured += len(seconds)

    def __call__(self, tokens: NDArray) -> Seconds:
        table = self.table()
        if tokens.dtype.kind == "i" and tokens.size and tokens.max() < TABLE:
            return table[tokens]
        return np.interp(tokens, self._x, self._y)

    def table(self) -> Seconds:
        """(64,) the seconds of 0, 1 ... tokens; the same array each time."""
        if self._state.measured >= self._state.due:
            self._draw()
        return self._table

    def _draw(self) -> None:
        if self._library is None:
            self.draw_in_python()
        else:
            self._library.moespac_draw(self.address)

    def draw_in_python(self) -> None:
        """Through the nodes, and on along the last piece."""
        seconds = self._prior
        medians = self._medians()
        if medians:
            known = list(medians)
            ratios = np.array(list(medians.values())) / self._prior[known]
            nearest = np.abs(np.arange(len(self._nodes))[:, None] - known).argmin(axis=1)
            seconds = np.maximum.accumulate(self._prior * ratios[nearest])
        slope = (seconds[-1] - seconds[-2]) / (self._nodes[-1] - self._nodes[-2])
        self._y[:] = np.append(seconds, seconds[-1] + slope * (_FAR - self._nodes[-1]))
        self._table[:] = np.interp(np.arange(TABLE), self._x, self._y)
        state = self._state
        state.due = state.measured + max(1, min(state.measured // 2, state.redraw))

    def _medians(self) -> dict[int, float]:
        """By bucket, of those that have any; the lower one of two, since a stray measurement is a slow one."""
        found = {}
        for bucket in np.flatnonzero(self._seen).tolist():
            latest = sorted(self._latest[bucket, : self._seen[bucket]].tolist())
            found[bucket] = latest[(len(latest) - 1) // 2]
        return found


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
        # For native code:
        self.host_curve, self.accelerator_curve = self._host.address, self._accelerator.address
        self._beside_copy = _Median(config.samples)
        self._link = _Median(config.samples)
        self._storage = _Median(config.samples)
        self._link_prior = record_bytes / config.link_bandwidth
        self._storage_prior = record_bytes / config.storage_bandwidth
        self.rates = np.zeros(3)  # ``link``, ``storage`` and ``copy_toll``, for native code
        self._note_rates()

    def start_from(self, measured: MeasuredCosts) -> None:
        """Take these in place of what sizes and bandwidths suggest; what is observed from now on refines them."""
        self._host.start_from(measured.host)
        self._accelerator.start_from(measured.accelerator)
        self._link_prior, self._storage_prior = measured.link, measured.storage
        self._note_rates()

    def host_expert(self, tokens: NDArray) -> Seconds:
        """Seconds of one expert's FFN on the host for each number of tokens; 1 or more."""
        return self._host(tokens)

    def accelerator_expert(self, tokens: NDArray) -> Seconds:
        """The same on the accelerator, its weights being there."""
        return self._accelerator(tokens)

    def tables(self) -> tuple[Seconds, Seconds]:
        """(64,) of ``host_expert`` and of ``accelerator_expert``, by tokens: live."""
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
        self._host.observe(np.array([tokens]), np.array([seconds]))

    def observe_host_beside_copy(self, tokens: int, seconds: float) -> None:
        """The same, records being copied all the while."""
        self.observe_host_experts_beside_copy(np.array([tokens]), np.array([seconds]))

    def observe_host_experts(self, tokens: NDArray[np.int64], seconds: Seconds) -> None:
        """``observe_host`` for each of several experts."""
        self._host.observe(tokens, seconds)

    def observe_host_experts_beside_copy(self, tokens: NDArray[np.int64], seconds: Seconds) -> None:
        """``observe_host_beside_copy`` for each of several experts."""
        self._beside_copy.observe(*(seconds / self._host(tokens)).tolist())
        self._note_rates()

    def observe_accelerator(self, tokens: int, seconds: float) -> None:
        """One expert took ``seconds`` for ``tokens`` on the accelerator."""
        self._accelerator.observe(np.array([tokens]), np.array([seconds]))

    def observe_link(self, seconds: float) -> None:
        """One record took ``seconds`` from host to accelerator."""
        self._link.observe(seconds)
        self.rates[0] = self.link

    def observe_storage(self, seconds: float) -> None:
        """One record took ``seconds`` from storage."""
        self._storage.observe(seconds)
        self.rates[1] = self.storage

    def _note_rates(self) -> None:
        self.rates[:] = self.link, self.storage, self.copy_toll
