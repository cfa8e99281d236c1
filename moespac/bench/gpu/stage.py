"""The models that runs share. Loading takes longer than a run, so one engine serves them all: each contender finds
an empty accelerator, a policy of its own that has learned nothing, and all experts in host memory."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import moespac
from moespac.bench.decode.files import ModelFiles, make_files
from moespac.bench.decode.prompts import BUILT_IN, WARMUP, tokenize
from moespac.bench.gpu.contenders import Contender
from moespac.bench.gpu.job import Job, Setting
from moespac.bench.gpu.replay import Replay, ReplayDrafter, ReplayTrunk, Routes, decoded_only, put_routers
from moespac.bench.gpu.shape import RepeatedStore, draft_model, write_config
from moespac.bench.gpu.timing import GivenPrompts, Prompts
from moespac.config import EngineConfig, GpuBenchConfig, MemoryConfig
from moespac.engine.build import ModelParts, assemble
from moespac.engine.engine import Engine
from moespac.errors import ConfigError
from moespac.experts.runtime import ExpertRuntime
from moespac.model.load import choose_dtype, random_trunk
from moespac.model.trunk import Trunk
from moespac.policy.registry import make_policy
from moespac.sim.synthetic import synthetic_routing
from moespac.speculate.drafters import Drafter, ModelDrafter, NoDrafter
from moespac.trace.importer import load as load_trace
from moespac.trace.schema import Trace
from moespac.types import Capacity, ModelShape

_MOST_DRAFTS = 16  # that a text has room for behind its last token: more than any governor chooses


@dataclass(frozen=True)
class Stage:
    """A loaded model and the texts it decodes."""

    engine: Engine
    trunk: Trunk  # as contenders are to run it
    drafter: Drafter  # of those that draft
    prompts: Prompts

    def engine_for(self, contender: Contender) -> Engine:
        """The same parts under this contender's policy."""
        runtime, config = self.engine.runtime, self.engine.config
        capacity = _capacity(runtime)
        runtime.adopt(make_policy(contender.policy, self.engine.shape, capacity, config.method))
        self.drafter.reset()
        drafter = self.drafter if contender.window else NoDrafter()
        config = replace(config, policy=contender.policy, window=contender.window)
        return Engine(self.engine.model, self.trunk, self.engine.tokenizer, runtime, drafter, config)

    def close(self) -> None:
        self.engine.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class ReplayedTexts:
    """Texts of a trace, by number."""

    def __init__(self, replay: Replay, count: int) -> None:
        self._replay = replay
        self._count = count

    def begin(self, number: int) -> list[int]:
        return self._replay.begin(number)

    def __len__(self) -> int:
        return self._count


def shape_stage(job: Job, replayed: bool = True) -> Stage:
    """A model of Qwen3-30B-A3B's shape; not ``replayed``: its own random routers route, and its own text it speaks.

    Raises ConfigError for a trace of another shape or with texts that are too short, and what ``assemble`` raises.
    """
    setting, config = job.setting, job.setting.config
    device = torch.device(setting.device)
    dtype = choose_dtype(config.dtype, device)
    skeleton = write_config(config, job.layers, job.folder / f"shape-{job.layers}")
    store = RepeatedStore(skeleton, setting.format, setting.seed)
    network, modules = random_trunk(skeleton, dtype, device, setting.seed)
    routes = None
    if replayed:
        trace = replayed_trace(setting, store.shape)
        replay = Replay(trace, setting.acceptance, config.prompt_tokens, config.vocabulary, setting.seed)
        rows = max(config.prompt_tokens, _LARGEST_CHECK)
        routes = Routes(store.shape.layers, rows, store.shape.top_k, device)
        put_routers(modules, network, routes)
    memory = MemoryConfig(host_memory="100%", accelerator_memory=_percent(job.budget))
    fingerprint = f"shape-{job.layers}-{config.hidden}-{config.width}-{setting.format}"
    parts = ModelParts(skeleton, store, fingerprint, network, modules, None)
    engine = assemble(parts, "none", EngineConfig(memory))
    fill_host(engine.runtime, config.filling_reads)
    if routes is None:
        rng = np.random.default_rng(setting.seed)
        tokens = rng.integers(config.vocabulary, size=(2, config.prompt_tokens)).tolist()
        return Stage(engine, engine.trunk, NoDrafter(), GivenPrompts(tokens))
    timed: Drafter = NoDrafter()
    if setting.draft == "model":
        model = draft_model(config, dtype, device)
        timed = ModelDrafter(model, config.vocabulary, tick=engine.runtime.pump)
    drafter = ReplayDrafter(replay, timed, engine.runtime, setting.seed)
    texts = ReplayedTexts(replay, config.texts + 1)
    return Stage(engine, ReplayTrunk(engine.trunk, routes, replay), drafter, texts)


_LARGEST_CHECK = 80  # tokens of a pass in which the lean trunk is compared with transformers' own


def replayed_trace(setting: Setting, shape: ModelShape) -> Trace:
    """Decoded texts of the shape's routing, enough of them and long enough. Raises ConfigError for others."""
    config = setting.config
    length = config.prompt_tokens + setting.tokens + _MOST_DRAFTS
    count = config.texts + 1  # one warms up
    if setting.trace == "synthetic":
        made = synthetic_routing(shape, [length] * count, setting.seed)
        return decoded_only(made.to_trace(shape.experts, "synthetic"), shape.layers, config.vocabulary)
    trace = load_trace(Path(setting.trace))
    found = trace.shape
    if (found.experts, found.top_k) != (shape.experts, shape.top_k) or found.layers < shape.layers:
        raise ConfigError(
            f"--trace {setting.trace}: is of {found.layers} x {found.experts} experts, top-{found.top_k}, and the"
            f" model of {shape.layers} x {shape.experts}, top-{shape.top_k}; give a trace of the model's shape"
        )
    return _long_enough(decoded_only(trace, shape.layers, config.vocabulary), length, count, setting.trace)


def _long_enough(trace: Trace, length: int, count: int, name: str) -> Trace:
    """The longest ``count`` sequences, of ``length`` tokens at least."""
    lengths = np.diff(trace.sequence_offsets)
    if np.count_nonzero(lengths >= length) < count:
        raise ConfigError(
            f"--trace {name}: has not {count} sequences of {length} decoded tokens; give --tokens less, or another"
        )
    chosen = np.sort(np.argsort(-lengths, kind="stable")[:count])
    parts = [slice(*trace.sequence_offsets[at : at + 2].tolist()) for at in chosen]  # a token is a pass

    def of(values: Any) -> Any:
        return np.concatenate([values[part] for part in parts])

    total = int(lengths[chosen].sum())
    return replace(
        trace,
        tokens=of(trace.tokens),
        routing=of(trace.routing),
        pass_offsets=np.arange(total + 1),
        drafted=of(trace.drafted),
        accepted=of(trace.accepted),
        prefill=of(trace.prefill),
        sequence_offsets=np.cumsum([0, *lengths[chosen].tolist()]),
        categories=tuple(trace.categories[at] for at in chosen),
    )


def pair_files(job: Job) -> ModelFiles:
    """The embedded pair with wide experts, made where it is not there yet."""
    config = job.setting.config
    return make_files(job.folder, config.factor, config.pair_format, gguf=False)


def pair_stage(job: Job, dtype: str = "auto") -> Stage:
    """The pair: routing, drafts and acceptance are its own."""
    config = job.setting.config
    files = pair_files(job)
    engine = moespac.load(
        files.pack,
        draft=files.draft,
        host_memory="100%",
        accelerator_memory=_percent(job.budget),
        dtype=dtype,
        profile=None,
    )
    engine.model.generation_config.eos_token_id = None  # all decode equally many tokens
    fill_host(engine.runtime, config.filling_reads)
    prompts = pair_prompts(files, config)
    return Stage(engine, engine.trunk, engine.drafter, GivenPrompts(prompts))


def pair_prompts(files: ModelFiles, config: GpuBenchConfig) -> Sequence[list[int]]:
    """Token ids; the last is for warming up."""
    return tokenize([*BUILT_IN[: config.texts], WARMUP], files.checkpoint)


def fill_host(runtime: ExpertRuntime, at_once: int) -> None:
    """Every expert in host memory, ``at_once`` reads in flight: what is measured has no need of a disk."""
    memory = runtime.memory
    everything = np.arange(runtime.store.shape.total)
    for start in range(0, len(everything), at_once):
        for expert in everything[start : start + at_once].tolist():
            memory.demand_host(expert, lambda tier: np.zeros(len(everything)))
        memory.quiesce()
    assert memory.host.ready.all()


def fill_accelerator(runtime: ExpertRuntime, at_once: int) -> None:
    """Every expert there too; host memory holds them all, and so does the accelerator."""
    memory = runtime.memory
    everything = np.arange(runtime.store.shape.total)
    for start in range(0, len(everything), at_once):
        for expert in everything[start : start + at_once].tolist():
            memory.demand_accelerator(expert, lambda tier: np.zeros(len(everything)))
        memory.quiesce()
    assert memory.all_at_hand


def _capacity(runtime: ExpertRuntime) -> Capacity:
    tier = runtime.memory.accelerator
    return Capacity(runtime.memory.host.slots, tier.slots if tier else 0)


def _percent(share: float) -> str:
    return f"{share:.4%}"
