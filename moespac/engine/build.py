"""From a path and a few wishes to an engine: the one place where all parts meet."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import platformdirs
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moespac.config import EngineConfig, MemoryConfig, SpeculationConfig
from moespac.engine.engine import Engine
from moespac.errors import ConfigError
from moespac.experts.accelerator import Accelerator
from moespac.experts.budget import available_device_bytes, available_host_bytes, is_none, slots_for
from moespac.experts.compute import ExpertMath
from moespac.experts.devices import Computers
from moespac.experts.grouped import GroupedExperts
from moespac.experts.kernels import HostKernel
from moespac.experts.manifest import is_pack
from moespac.experts.movers import LinkCopier, StorageReader, host_arena
from moespac.experts.runtime import ExpertRuntime
from moespac.experts.store import CheckpointStore, ExpertStore, PackedStore
from moespac.experts.workers import Bell
from moespac.model.graphed import GraphedTrunk
from moespac.model.index import build_index
from moespac.model.lean import LeanTrunk
from moespac.model.load import choose_dtype, load_tokenizer, load_trunk
from moespac.model.routers import find_routers
from moespac.model.safetensors import TensorEntry, read_header
from moespac.model.skeleton import Skeleton, build_skeleton
from moespac.model.trunk import open_trunk
from moespac.policy.registry import make_policy
from moespac.schedule.memory import ExpertMemory
from moespac.schedule.stats import PassClock
from moespac.speculate.drafters import (
    Drafter,
    ModelDrafter,
    NoDrafter,
    PromptLookupDrafter,
    load_draft_model,
)
from moespac.types import Capacity, ModelShape

log = logging.getLogger(__name__)

DEMO = Path(__file__).parent.parent / "model" / "demo"


def load(
    model: str | Path | None = None,
    *,
    draft: str | Path = "auto",
    host_memory: str = "auto",
    accelerator_memory: str = "none",
    policy: str = "moe-spac",
    window: int | Literal["auto"] = "auto",
    dtype: str = "auto",
    profile: str | Path | None = "auto",
    asynchronous: bool = True,
) -> Engine:
    """Load a model whose experts do not fit fast memory.

    model: directory of a Hugging Face checkpoint or of a pack; None is the small embedded pair.
    draft: "auto" (the embedded drafter for the embedded model, else prompt lookup), "lookup", "none", or the
        directory of a draft model with the target's vocabulary.
    host_memory, accelerator_memory: what experts may take there: bytes ("2GiB"), percent of all experts ("25%"),
        "auto" (what is free, with room left for everything else); "none" for no accelerator.
    policy: who decides what is where, see ``moespac.policy.registry``.
    window: drafted tokens a pass (K); 0 does not speculate, "auto" drafts as many as measurably pay.
    dtype: what is computed in; "auto" is float32 on a CPU and bfloat16 on a GPU.
    profile: where what is learned about the model's routing is kept between runs; "auto" is the user's cache
        directory, None keeps nothing.
    asynchronous: False runs every transfer where it is issued, on one thread.

    Raises ModelError, CheckpointError, DraftError or ConfigError, each with one line on what to do.
    """
    if window != "auto" and window < 0:
        raise ConfigError(f"window {window}: must be 0 or more drafted tokens, or auto")
    memory = replace(
        MemoryConfig(),
        host_memory=host_memory,
        accelerator_memory=accelerator_memory,
        asynchronous=asynchronous,
    )
    config = EngineConfig(memory=memory, policy=policy, window=window)
    path = DEMO / "target" if model is None else Path(model)
    if draft == "auto":
        draft = DEMO / "draft" if model is None else "lookup"

    skeleton = build_skeleton(path)
    store, entries, fingerprint = _open_store(path, skeleton)
    device = _device(config)
    compute_dtype = choose_dtype(dtype, device)
    network, modules = load_trunk(path, skeleton, entries, compute_dtype, device)
    tokenizer = load_tokenizer(path)

    for module in modules:
        module.stand_in()
    clock = PassClock(time.perf_counter)
    trunk = open_trunk(network, torch.get_num_threads(), clock, config.graphs)
    routers = find_routers(network, modules)
    runtime = _build_runtime(store, skeleton, routers, config, device, compute_dtype, clock)
    for layer, module in enumerate(modules):
        module.attach(layer, runtime)
    if isinstance(trunk, LeanTrunk | GraphedTrunk):
        trunk.attach(runtime)
    drafter = _build_drafter(draft, network, tokenizer, compute_dtype, runtime)
    profile_file = _profile_file(profile, fingerprint)
    if profile_file is not None:
        runtime.policy.load_profile(profile_file)
    return Engine(network, trunk, tokenizer, runtime, drafter, config, profile_file)


def _open_store(path: Path, skeleton: Skeleton) -> tuple[ExpertStore, list[TensorEntry], str]:
    """The experts, the tensors of the trunk, and a name for what is learned about the model."""
    if is_pack(path):
        packed = PackedStore(path)
        return packed, list(read_header(packed.trunk).values()), packed.manifest.fingerprint
    index = build_index(path, skeleton)
    return CheckpointStore(index), [index.entries[key] for key in index.trunk_keys], index.fingerprint


def _device(config: EngineConfig) -> torch.device:
    """Where the trunk lives: with the accelerator's experts where there is one."""
    wanted = not is_none(config.memory.accelerator_memory)
    if wanted and not torch.cuda.is_available():
        log.warning(
            "no CUDA device: the accelerator is simulated in this process; it shows the method and saves nothing"
        )
    return torch.device("cuda" if wanted and torch.cuda.is_available() else "cpu")


def _build_runtime(
    store: ExpertStore,
    skeleton: Skeleton,
    routers: list[nn.Module | None],
    config: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    clock: PassClock,
) -> ExpertRuntime:
    memory, shape, bell = config.memory, store.shape, Bell()
    capacity = _capacity(memory, shape, device)
    policy = make_policy(config.policy, shape, capacity, config.method)
    arena = host_arena(capacity.host, shape.record_bytes)
    reader = StorageReader(store, arena, memory, bell, clock.tape)
    accelerator = link = None
    if capacity.accelerator:
        accelerator = Accelerator(
            device, capacity.accelerator, shape.record_bytes, bell, memory.asynchronous, clock.tape
        )
        link = LinkCopier(accelerator, arena, shape.experts)
    tiers = ExpertMemory(shape, capacity, reader, link, memory, policy.costs, bell)
    prototype, threads = next(iter(skeleton.experts.values())), torch.get_num_threads()
    kernel = HostKernel.build(prototype, store.layout, threads)
    math = ExpertMath(prototype, store.layout)
    grouped = GroupedExperts.build(prototype, store.layout, device, dtype) if accelerator else None
    job_kernels = grouped.job_kernels if grouped else None
    computers = Computers(math, kernel, arena, accelerator, threads if kernel else 1, grouped, job_kernels)
    return ExpertRuntime(store, tiers, policy, computers, routers, clock)


def _capacity(memory: MemoryConfig, shape: ModelShape, device: torch.device) -> Capacity:
    """Slots by tier. The trunk is loaded by now, so that "auto" sees what it left free."""
    host_free = available_host_bytes(memory.auto_share)
    host = slots_for(memory.host_memory, shape, host_free, "--host-memory")
    if is_none(memory.accelerator_memory):
        return Capacity(host)
    device_free = available_device_bytes(device, memory.auto_share) if device.type == "cuda" else host_free
    return Capacity(host, slots_for(memory.accelerator_memory, shape, device_free, "--accelerator-memory"))


def _profile_file(profile: str | Path | None, fingerprint: str) -> Path | None:
    if profile == "auto":
        return platformdirs.user_cache_path("moespac") / "profiles" / f"{fingerprint}.npz"
    return None if profile is None else Path(profile)


def _build_drafter(
    draft: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype,
    runtime: ExpertRuntime,
) -> Drafter:
    if draft == "none":
        return NoDrafter()
    if draft == "lookup":
        speculation = SpeculationConfig()
        return PromptLookupDrafter(speculation.max_ngram, speculation.min_ngram)
    vocabulary = model.config.get_text_config().vocab_size
    network: Any = load_draft_model(draft, vocabulary, tokenizer, dtype)
    return ModelDrafter(network.to(model.device), vocabulary, tick=runtime.pump)
