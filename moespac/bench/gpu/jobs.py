"""What is to be done, the most important first, each job with the seconds that it may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moespac.bench.gpu import job
from moespac.bench.gpu.contenders import COMPILED, LLAMA, OFFLOAD, RESIDENT, all_contenders, main_contenders
from moespac.bench.gpu.job import PAIR, SHAPE, Job, Setting
from moespac.bench.gpu.shape import record_bytes
from moespac.bench.paper import OURS, OURS_PLAIN
from moespac.config import GpuBenchConfig

_START = 8.0  # seconds until a process has its libraries and the device
_LOAD = 5.0  # making a trunk, capturing it
_FILL_RATE = 5e9  # bytes/s at which host memory is filled with experts and page-locked
_PAIR_LOAD = 6.0
_PAIR_MAKE = 20.0  # the first time: two copies of it are written
_COMPILE = 45.0
_TYPICAL = 0.7  # of the most that a run may take: the fast ones have their tokens sooner
_PAIR_RUNS = (OURS, OURS_PLAIN, "llama.cpp+sd", "sp-moe", "lru", "hybrimoe", "llama.cpp", "accelerate")


@dataclass(frozen=True)
class Wish:
    """What is asked for."""

    setting: Setting
    budgets: Sequence[float]
    work: str
    contenders: Sequence[str] = ()  # empty: all at the first budget, the main ones at the others


def jobs_of(wish: Wish) -> list[Job]:
    """In order. The goals are about the first budget: that comes first, whole; then the pair, then others."""
    setting, config = wish.setting, wish.setting.config
    first, *others = wish.budgets
    every = list(wish.contenders) or [each.name for each in all_contenders(config.window)]
    main = list(wish.contenders) or [each.name for each in main_contenders(config.window)]
    pair = list(wish.contenders) or list(_PAIR_RUNS)
    size = setting.layers * config.experts * record_bytes(config, setting.format)
    shape_load = _LOAD + size / _FILL_RATE
    a_run = _TYPICAL * (config.decode_seconds + config.warmup_seconds)

    def make(kind: str, model: str, budget: float, runs: Sequence[str], seconds: float) -> Job:
        resident = kind in (job.RESIDENT_JOB, job.COMPILED_JOB)
        layers = min(config.resident_layers, setting.layers) if resident else setting.layers
        tokens = config.resident_tokens if resident else setting.tokens
        own = (layers, tokens, setting, wish.work)
        return Job(kind, model, budget, tuple(runs), _START + seconds, *own)

    def engine(model: str, budget: float, runs: Sequence[str]) -> Job:
        load = shape_load if model == SHAPE else _PAIR_LOAD
        return make(job.ENGINE, model, budget, runs, load + a_run * len(runs))

    def offload(model: str, budget: float) -> Job:
        load = 2 * shape_load if model == SHAPE else 2 * _PAIR_LOAD
        return make(job.OFFLOAD_JOB, model, budget, [OFFLOAD], load + 2 * a_run)

    return [
        make(job.LINK_JOB, SHAPE, 1.0, ["link"], 4.0),
        engine(SHAPE, first, every),
        offload(SHAPE, first),
        make(job.RESIDENT_JOB, SHAPE, 1.0, [RESIDENT], _PAIR_LOAD + 2 * a_run),
        make(job.COMPILED_JOB, SHAPE, 1.0, [COMPILED], _COMPILE + a_run),
        make(job.EXACT_JOB, PAIR, first, ["exactness"], _PAIR_MAKE + 2 * _PAIR_LOAD),
        engine(PAIR, first, pair),
        *(engine(SHAPE, budget, main) for budget in others),
        offload(PAIR, first),
        make(job.LLAMA_JOB, PAIR, first, [LLAMA], _PAIR_MAKE + a_run),
        *(engine(PAIR, budget, pair) for budget in others),
        *(offload(SHAPE, budget) for budget in others),
    ]


def layers_that_fit(
    config: GpuBenchConfig, format: str, most_budget: float, host_free: int, device_bytes: int | None
) -> int:
    """Of the shape, as many layers as host memory, and at the largest budget the device, have room for; 0 if none.
    ``device_bytes``: None where the device's memory is the host's."""
    layer = config.experts * record_bytes(config, format)
    fits = [config.layers]
    if device_bytes is None:
        fits.append(int(config.host_share * host_free / (layer * (1 + most_budget))))
    else:
        fits.append(int(config.host_share * host_free / layer))
        fits.append(int((device_bytes - config.device_reserve) / (layer * most_budget)))
    return max(min(fits), 0)
