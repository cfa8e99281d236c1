"""From a path and a few wishes to an engine: the one place where all parts meet."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import platformdirs
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moespac.config import DeviceConfig, EngineConfig, MemoryConfig, SpeculationConfig
from moespac.engine.costs import known_costs
from moespac.engine.engine import Engine
from moespac.errors import ConfigError
from moespac.experts.budget import DeviceNeeds, available_host_bytes, device_slots, is_none, slots_for
from moespac.experts.calibrate import Workbench
from moespac.experts.compute import ExpertMath
from moespac.experts.devices import Computers
from moespac.experts.grouped import GroupedExperts
from moespac.experts.kernels.host import HostKernel
from moespac.experts.kernels.library import load_library
from moespac.experts.manifest import is_pack
from moespac.experts.movers import LinkCopier, StorageReader, host_arena
from moespac.experts.native_reader import NativeReader
from moespac.experts.open_accelerator import open_accelerator
from moespac.experts.runtime import ExpertRuntime, OffloadedExperts
from moespac.experts.store import CheckpointStore, ExpertStore, PackedStore
from moespac.experts.workers import Bell
from moespac.model.graphed import GraphedTrunk
from moespac.model.index import build_index
from moespac.model.kv_size import kv_cache
from moespac.model.lean import LeanTrunk
from moespac.model.load import choose_dtype, load_tokenizer, load_trunk
from moespac.model.routers import find_routers
from moespac.model.safetensors import TensorEntry, read_header
from moespac.model.skeleton import Skeleton, build_skeleton
from moespac.model.trunk import open_trunk
from moespac.policy.registry import make_policy
from moespac.schedule.memory import ExpertMemory
from moespac.schedule.native import NativeMemory
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
    accelerator_context: int = DeviceConfig.context,
    asynchronous: bool = True,
) -> Engine:
    """Load a model whose experts do not fit fast memory.

    model: directory of a Hugging Face checkpoint or of a pack; None is the small embedded pair.
    draft: "auto" (the embedded drafter for the embedded model, else prompt lookup), "lookup", "none", or the
        directory of a draft model with the target's vocabulary.
    host_memory, accelerator_memory: what experts may take there: bytes ("2GiB"), percent of all experts ("25%"),
        "auto" (what is free, with room left for everything else); "none" for no accelerator. On a GPU an amount
        that does not fit beside trunk, drafter and KV caches is refused; "auto" takes what fits.
    policy: who decides what is where, see ``moespac.policy.registry``.
    window: drafted tokens a pass (K); 0 does not speculate, "auto" drafts as many as measurably pay.
    dtype: what is computed in; "auto" is float32 on a CPU and bfloat16 on a GPU.
    profile: where what is learned about the model's routing is kept between runs; "auto" is the user's cache
        directory, None keeps nothing.
    accelerator_context: tokens of prompt and answer whose KV caches are to fit a GPU beside the experts; when a
        text grows longer, experts make way.
    asynchronous: False runs every transfer where it is issued, on one thread.

    Raises ModelError, CheckpointError, DraftError or ConfigError, each with one line on what to do.
    """
    if window != "auto" and window < 0:
        raise ConfigError(f"window {window}: must be 0 or more drafted tokens, or auto")
    if accelerator_context < 1:
        raise ConfigError(f"accelerator_context {accelerator_context}: must be at least 1 token")
    memory = replace(
        MemoryConfig(),
        host_memory=host_memory,
        accelerator_memory=accelerator_memory,
        asynchronous=asynchronous,
    )
    config = EngineConfig(
        memory=memory,
        device=replace(DeviceConfig(), context=accelerator_context),
        policy=policy,
        window=window,
    )
    path = DEMO / "target" if model is None else Path(model)
    if draft == "auto":
        draft = DEMO / "draft" if model is None else "lookup"

    skeleton = build_skeleton(path)
    store, entries, fingerprint = _open_store(path, skeleton)
    device = _device(config)
    compute_dtype = choose_dtype(dtype, device)
    with _fitting(device, "the trunk"):
        network, modules = load_trunk(path, skeleton, entries, compute_dtype, device)
    parts = ModelParts(skeleton, store, fingerprint, network, modules, load_tokenizer(path))
    return assemble(parts, draft, config, _profile_file(profile, fingerprint))


@dataclass(frozen=True)
class ModelParts:
    """A model that is loaded, its experts left where they are."""

    skeleton: Skeleton
    store: ExpertStore
    fingerprint: str  # names what is measured and learned of the model
    network: PreTrainedModel  # on the device that it computes on
    modules: list[OffloadedExperts]  # of ``network``, by MoE layer
    tokenizer: PreTrainedTokenizerBase | None


def assemble(
    parts: ModelParts, draft: str | Path, config: EngineConfig, profile_file: Path | None = None
) -> Engine:
    """``draft``, ``profile_file``: as ``load`` and ``Engine`` take them, "auto" apart. Raises as ``load``."""
    network, modules = parts.network, parts.modules
    for module in modules:
        module.stand_in()
    clock = PassClock(time.perf_counter)
    trunk = open_trunk(network, torch.get_num_threads(), clock, config.graphs)
    with _fitting(network.device, "the draft model"):
        source = _draft_source(draft, network, parts.tokenizer, network.dtype)
    models = [model for model in (network, source) if isinstance(model, nn.Module)]
    caches = [kv_cache(model.config, network.dtype.itemsize) for model in models]
    needs = DeviceNeeds.beside(caches, config.device)
    runtime = _build_runtime(parts, find_routers(network, modules), config, needs, clock)
    for layer, module in enumerate(modules):
        module.attach(layer, runtime)
    if isinstance(trunk, LeanTrunk | GraphedTrunk):
        trunk.attach(runtime)
    drafter = _build_drafter(source, network, runtime)
    if profile_file is not None:
        runtime.policy.load_profile(profile_file)
    return Engine(network, trunk, parts.tokenizer, runtime, drafter, config, profile_file)


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
    parts: ModelParts,
    routers: list[nn.Module | None],
    config: EngineConfig,
    needs: DeviceNeeds,
    clock: PassClock,
) -> ExpertRuntime:
    store, skeleton, device, dtype = parts.store, parts.skeleton, parts.network.device, parts.network.dtype
    memory, shape, bell = config.memory, store.shape, Bell()
    capacity = _capacity(memory, shape, device, needs)
    arena = host_arena(capacity.host, shape.record_bytes)
    accelerator = link = None
    if capacity.accelerator:
        slots = capacity.accelerator
        accelerator = open_accelerator(device, slots, arena, config, bell, clock.tape)
        link = LinkCopier(accelerator, arena, shape.experts)
    prototype, threads = next(iter(skeleton.experts.values())), torch.get_num_threads()
    kernel = HostKernel.build(prototype, store.layout, threads)
    math = ExpertMath(prototype, store.layout)
    grouped = GroupedExperts.build(prototype, store.layout, device, dtype) if accelerator else None
    job_kernels = grouped.job_kernels if grouped else None
    computers = Computers(math, kernel, arena, accelerator, threads if kernel else 1, grouped, job_kernels)
    policy = make_policy(config.policy, shape, capacity, config.method)
    costs = None
    library = load_library() if kernel else None
    if library is not None and accelerator is None and memory.asynchronous:
        reads = NativeReader(library, store, arena, memory)
        tiers: ExpertMemory = NativeMemory(shape, capacity, reads, memory, policy.costs, clock.tape)
        return ExpertRuntime(store, tiers, policy, computers, routers, clock)
    reader = StorageReader(store, arena, memory, bell, clock.tape)
    if accelerator is not None and link is not None and not accelerator.stands_in:
        bench = Workbench(store, reader, link, computers, bell, skeleton.hidden_size, dtype)
        costs = known_costs(bench, parts.fingerprint, config.calibration)
        if costs is not None:
            policy.costs.start_from(costs)
    tiers = ExpertMemory(shape, capacity, reader, link, memory, policy.costs, bell)
    return ExpertRuntime(store, tiers, policy, computers, routers, clock, costs)


def _capacity(memory: MemoryConfig, shape: ModelShape, device: torch.device, needs: DeviceNeeds) -> Capacity:
    """Slots by tier. Trunk and drafter are loaded by now, so that what they left free is seen."""
    host_free = available_host_bytes(memory.auto_share)
    host = slots_for(memory.host_memory, shape, host_free, "--host-memory")
    if is_none(memory.accelerator_memory):
        return Capacity(host)
    if device.type != "cuda":
        return Capacity(host, slots_for(memory.accelerator_memory, shape, host_free, "--accelerator-memory"))
    torch.cuda.empty_cache()  # what loading left unused is free for experts
    free, _ = torch.cuda.mem_get_info(device)
    return Capacity(host, device_slots(memory.accelerator_memory, shape, free, needs))


@contextmanager
def _fitting(device: torch.device, what: str) -> Iterator[None]:
    """Raises ConfigError where the device's memory does not take it."""
    try:
        yield
    except torch.OutOfMemoryError:
        total = torch.cuda.mem_get_info(device)[1] / 1e9
        raise ConfigError(
            f"{what} does not fit the accelerator ({total:.1f} GB); choose a smaller one, or leave "
            "--accelerator-memory away to decode on the CPU"
        ) from None


def _profile_file(profile: str | Path | None, fingerprint: str) -> Path | None:
    if profile == "auto":
        return platformdirs.user_cache_path("moespac") / "profiles" / f"{fingerprint}.npz"
    return None if profile is None else Path(profile)


def _draft_source(
    draft: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, dtype: torch.dtype
) -> Any:
    """The draft model, where the target is; or the name of a drafter that needs none."""
    if draft in ("none", "lookup"):
        return draft
    network: Any = load_draft_model(draft, model.config.get_text_config().vocab_size, tokenizer, dtype)
    return network.to(model.device)


def _build_drafter(source: Any, model: PreTrainedModel, runtime: ExpertRuntime) -> Drafter:
    if source == "none":
        return NoDrafter()
    if source == "lookup":
        speculation = SpeculationConfig()
        return PromptLookupDrafter(speculation.max_ngram, speculation.min_ngram)
    return ModelDrafter(source, model.config.get_text_config().vocab_size, tick=runtime.pump)
