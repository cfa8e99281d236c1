"""What the host's cores reach: reading memory, and running an expert."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import cycle
from typing import Any

import numpy as np
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moespac.config import MeasureConfig
from moespac.experts.compute import ExpertMath
from moespac.experts.format import packed_layout
from moespac.experts.kernels.host import HostKernel
from moespac.experts.movers import host_arena
from moespac.model.index import ExpertTensor

_TINY = 64  # hidden size and width of an expert whose arithmetic takes no time


class ExpertProbe:
    """A SwiGLU expert as the engine runs it: its own mathematics, or its own kernel, on its own records.

    The kernel is asked for ``together`` experts at once, as a layer asks: some for each of its threads.
    """

    def __init__(
        self, hidden: int, width: int, format: str, nbytes: int, each: int = 1, device: str = "cpu"
    ) -> None:
        """``nbytes`` of equal records take turns: more than any cache holds, so each is read from memory. ``each``
        thread of the kernel has so many experts of a run."""
        config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=width, num_experts=1)
        with torch.device("meta"):
            prototype = Qwen3MoeExperts(config)
        shapes = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
        layout = packed_layout(
            [ExpertTensor(name, shape, torch.bfloat16, False) for name, shape in shapes.items()], format
        )
        record = torch.empty(layout.nbytes, dtype=torch.uint8)
        generator = torch.Generator().manual_seed(0)
        layout.encode(
            {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, record
        )
        threads = torch.get_num_threads()
        self.hidden = hidden
        self._math = ExpertMath(prototype, layout)
        self._kernel = HostKernel.build(prototype, layout, threads) if device == "cpu" else None
        self.together = each * threads if self._kernel else 1
        runs = -(-nbytes // (layout.nbytes * self.together))
        count = runs * self.together
        if device == "cpu":  # in huge pages, as the engine has them
            self._records = host_arena(count, layout.nbytes)  # (count, record_bytes)
        else:
            self._records = torch.empty(count, layout.nbytes, dtype=torch.uint8, device=device)
        self._records.copy_(record)
        self._turns = cycle(np.arange(count).reshape(runs, self.together))
        self._groups = cache(partial(_groups, self.together, hidden))

    @torch.no_grad()
    def run(self, x: torch.Tensor) -> torch.Tensor:
        """x (M, hidden) -> (M, hidden), through the record whose turn it is; ``together`` of them in the kernel."""
        slots = next(self._turns)
        if self._kernel is None:
            return self._math(x, self._records[slots[0]], None)
        rows, begins, counts, out = self._groups(x.shape[0])
        self._kernel.run(x, self.together, self._records, slots, rows, begins, counts, out)
        return out.view(x.shape[0], self.together, self.hidden)[:, 0]


def _groups(jobs: int, hidden: int, tokens: int) -> tuple[Any, Any, Any, torch.Tensor]:
    """As if each token were routed to all ``jobs``: ``HostKernel.run``'s rows, begins, counts and out."""
    rows = np.ascontiguousarray(np.arange(tokens * jobs).reshape(tokens, jobs).T).ravel()
    return rows, tokens * np.arange(jobs), np.full(jobs, tokens), torch.empty(tokens * jobs, hidden)


def memory_bandwidth(threads: int, config: MeasureConfig) -> float:
    """Bytes/s at which ``threads`` read memory together, each its own part."""
    parts = np.array_split(np.ones(config.memory_bytes // 8, np.int64), threads)
    with ThreadPoolExecutor(threads) as pool:
        spent = typical_seconds(lambda: list(pool.map(np.bitwise_or.reduce, parts)), config.repeats)
    return config.memory_bytes / spent


def host_expert_seconds(
    formats: Sequence[str], config: MeasureConfig, advance: Callable[[], None]
) -> dict[str, dict[int, float]]:
    """Seconds that one expert costs a layer, in float32, the engine's choice on a CPU, by record format and tokens.

    Everything takes one turn in each round, so that a busy second of the machine is one sample of each and not all
    samples of one. ``advance`` is called after each of ``repeats`` + 1 rounds; the first does not count.
    """
    hidden, width = config.expert_hidden, config.expert_width
    each = config.experts_each
    probes = {format: ExpertProbe(hidden, width, format, config.records_bytes, each) for format in formats}
    inputs = {tokens: torch.ones(tokens, hidden) for tokens in config.expert_tokens}
    rounds = []
    for _ in range(config.repeats + 1):
        rounds.append({(f, n): seconds(partial(probes[f].run, inputs[n])) for f in formats for n in inputs})
        advance()
    return {
        f: {n: typical([spent[f, n] for spent in rounds[1:]]) / probes[f].together for n in inputs}
        for f in formats
    }


def expert_overhead(config: MeasureConfig) -> float:
    """Seconds of an expert on the host whose arithmetic takes no time."""
    probe = ExpertProbe(_TINY, _TINY, "f32", nbytes=1, each=config.experts_each)
    x = torch.ones(1, _TINY)
    spent = typical_seconds(lambda: probe.run(x), 100 * config.repeats)  # some microseconds each
    return spent / probe.together


def typical_seconds(work: Callable[[], object], repeats: int) -> float:
    """Of ``repeats`` runs, after one that does not count."""
    work()
    return typical([seconds(work) for _ in range(repeats)])


def typical(samples: list[float]) -> float:
    """The lower quartile: other users of the machine make slow samples, and a single fast one may be luck."""
    return sorted(samples)[len(samples) // 4]


def seconds(work: Callable[[], object]) -> float:
    """How long ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
