"""What a trace says about caching: reuse, skew, overlap, hits. Decoded tokens only, one layer at a time.

Functions take the routing of each sequence, (n, layers, k), and return arrays per layer; the tables and plots
average over layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moespac.config import AnalysisConfig
from moespac.trace.schema import Trace
from moespac.types import ModelShape

Routing = NDArray[np.int64]  # (n, layers, k); -1: not routed


@dataclass(frozen=True)
class Analysis:
    """All figures of a trace."""

    shape: ModelShape
    tokens: int  # decoded
    reuse: NDArray[np.int64]  # (longest + 1,) uses of an expert by tokens since its last use; [0]: first uses
    frequency: NDArray[np.float64]  # (layers, experts) share of a layer's routings, the most used first
    lengths: tuple[int, ...]  # of the windows below, in tokens
    unique: NDArray[np.float64]  # (lengths, layers) distinct experts in a window
    overlap: NDArray[np.float64]  # (lengths, layers) share of them that the window before had used
    lru_hits: NDArray[np.float64]  # (layers, experts) share of uses that an LRU of 1, 2 .. slots serves

    @property
    def median_reuse(self) -> int | None:
        """Tokens from one use of an expert to the next, first uses left out; None where nothing repeats."""
        share = np.cumsum(self.reuse[1:])
        if not share.any():
            return None
        return 1 + int(np.searchsorted(share, share[-1] / 2))

    def repeated_within(self, tokens: int) -> float:
        """Share of all uses whose expert had been used at most ``tokens`` earlier."""
        return float(self.reuse[1 : tokens + 1].sum() / self.reuse.sum())

    @property
    def entropy(self) -> NDArray[np.float64]:
        """(layers,) of the experts' frequencies, over that of even use: 1 is no skew."""
        logs = np.log(self.frequency, where=self.frequency > 0, out=np.zeros_like(self.frequency))
        return -(self.frequency * logs).sum(axis=1) / np.log(self.shape.experts)


def analyse(trace: Trace, config: AnalysisConfig | None = None) -> Analysis:
    """Raises ValueError for a trace without decoded tokens."""
    sequences = [trace.decode_tokens(index).routing for index in range(trace.sequences)]
    tokens = sum(map(len, sequences))
    if tokens == 0:
        raise ValueError("it has no decoded tokens")
    experts = trace.experts
    lengths = (config or AnalysisConfig()).lengths
    windows = np.array([_windows(sequences, experts, length) for length in lengths])  # (lengths, 2, layers)
    return Analysis(
        shape=trace.shape,
        tokens=tokens,
        reuse=reuse(sequences, experts),
        frequency=frequency(sequences, experts),
        lengths=lengths,
        unique=windows[:, 0],
        overlap=windows[:, 1],
        lru_hits=lru_hits(sequences, experts),
    )


def reuse(sequences: Sequence[Routing], experts: int) -> NDArray[np.int64]:
    """How many uses come 1, 2 .. tokens after the expert's last use; [0]: after none, in that sequence."""
    found = [_distances(routing, experts) for routing in sequences]
    return np.bincount(np.concatenate(found))


def _distances(routing: Routing, experts: int) -> NDArray[np.int64]:
    """One for each use of an expert, in no order."""
    layers = np.arange(routing.shape[1])[:, None] * experts
    ids, times = np.where(routing < 0, -1, routing + layers), np.arange(len(routing))[:, None, None]
    order = np.argsort(ids, axis=None, kind="stable")  # of one expert, uses stay in order of time
    ids, times = ids.ravel()[order], np.broadcast_to(times, routing.shape).ravel()[order]
    again = np.diff(ids, prepend=-1) == 0
    return np.where(again, np.diff(times, prepend=0), 0)[ids >= 0]


def frequency(sequences: Sequence[Routing], experts: int) -> NDArray[np.float64]:
    """(layers, experts) share of each layer's uses, the most used expert first."""
    uses = np.sum([_counts(routing, experts) for routing in sequences], axis=0)
    return -np.sort(-uses / np.maximum(uses.sum(axis=1, keepdims=True), 1), axis=1)


def _counts(routing: Routing, experts: int) -> NDArray[np.int64]:
    """(layers, experts) uses."""
    layers = routing.shape[1]
    ids = (routing + np.arange(layers)[:, None] * experts)[routing >= 0]
    return np.bincount(ids, minlength=layers * experts).reshape(layers, experts)


def _windows(sequences: Sequence[Routing], experts: int, length: int) -> NDArray[np.float64]:
    """(2, layers): distinct experts in a window of ``length`` tokens, and the share that the last one used."""
    layers = sequences[0].shape[1]
    distinct, windows = np.zeros(layers), 0
    shared, followers = np.zeros(layers), np.zeros(layers)
    for routing in sequences:
        used = np.zeros((len(routing) // length, layers, experts), np.bool_)
        for index in range(len(used)):
            used[index] = _counts(routing[index * length : (index + 1) * length], experts) > 0
        distinct += used.sum(axis=(0, 2))
        windows += len(used)
        shared += (used[1:] & used[:-1]).sum(axis=(0, 2))
        followers += used[1:].sum(axis=(0, 2))
    nan = np.full(layers, np.nan)  # where every sequence is shorter
    return np.stack([
        distinct / windows if windows else nan,
        np.divide(shared, followers, out=nan.copy(), where=followers > 0),
    ])  # fmt: skip


def lru_hits(sequences: Sequence[Routing], experts: int) -> NDArray[np.float64]:
    """(layers, experts): share of uses that find their expert among the 1, 2 .. most recently used of its layer.

    A token's experts are used in the router's order, sequences follow each other over one cache (Mattson's stack
    distances: one replay serves every size).
    """
    layers = sequences[0].shape[1]
    last = np.zeros((layers, experts), np.int64)  # when each was used; 0: never
    at_depth = np.zeros((layers, experts + 1), np.int64)
    every, now = np.arange(layers), 0
    for routing in sequences:
        for chosen in routing.swapaxes(1, 2).reshape(-1, layers):  # (layers,) at each step
            now += 1
            rows = every if chosen.min() >= 0 else np.flatnonzero(chosen >= 0)
            chosen = chosen[rows]
            before = last[rows, chosen]
            depth = (last[rows] > before[:, None]).sum(axis=1)
            at_depth[rows, np.where(before > 0, depth, experts)] += 1
            last[rows, chosen] = now
    return np.cumsum(at_depth[:, :-1], axis=1) / np.maximum(at_depth.sum(axis=1, keepdims=True), 1)
