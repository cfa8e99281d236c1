"""Others' programs on the same models, as their users would run them."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from moespac.bench.decode.files import make_files
from moespac.bench.decode.task import Decoded
from moespac.bench.decode.transformers_model import generate
from moespac.bench.gpu.job import SHAPE, Gauges, Job, Result
from moespac.bench.gpu.shape import write_config
from moespac.bench.gpu.stage import pair_files, pair_prompts
from moespac.bench.gpu.timing import device_memory
from moespac.config import GpuBenchConfig
from moespac.model.load import choose_dtype
from moespac.model.skeleton import Skeleton

_TEMPLATE = 1 << 24  # random numbers that are repeated: no cache holds them


class NotAtHand(Exception):
    """A program that this machine does not have; its text says what is lacking."""


# ---- transformers with accelerate's offloading --------------------------------------------------------------


def time_offload(job: Job) -> Result:
    """The trunk and the experts of as many whole layers as fit are on the device; accelerate brings the others, a
    layer's experts together, from host memory (on a CPU device: from the disk), when their layer runs.

    Raises NotAtHand without accelerate.
    """
    if find_spec("accelerate") is None:
        raise NotAtHand("accelerate is not installed (pip install 'moespac[bench]')")
    config, device = job.setting.config, torch.device(job.setting.device)
    dtype = choose_dtype(config.dtype, device)
    if job.model == SHAPE:
        skeleton = write_config(config, job.layers, job.folder / f"shape-{job.layers}")
        model: Any = _filled(skeleton, dtype)
        prompts = _random_prompts(config, job.setting.seed)
    else:
        files = pair_files(job)
        model = AutoModelForCausalLM.from_pretrained(files.checkpoint, dtype=dtype)
        prompts = list(pair_prompts(files, config))
    layers = len(model.model.layers)
    held = math.floor(job.budget * layers + 1e-9)
    model = _dispatched(model.eval(), held, device, job.folder / "offload")
    texts = _continue(model, prompts, job.tokens, config)
    note = f"the experts of {held} of {layers} layers are on the device ({held / layers:.0%})"
    return Result(tuple(texts), _held(device), notes=(note,))


def _filled(skeleton: Skeleton, dtype: torch.dtype) -> PreTrainedModel:
    """The shape in host memory. Initialising 30 billion weights takes minutes, repeating some millions seconds."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(skeleton.config, dtype=dtype)
    model = model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(skeleton.config)  # buffers that no checkpoint holds
    template = torch.empty(_TEMPLATE, dtype=dtype).normal_(std=skeleton.config.initializer_range)
    for parameter in model.parameters():
        for part in parameter.data.view(-1).split(_TEMPLATE):
            part.copy_(template[: len(part)])
    return model.requires_grad_(False)


def _dispatched(model: Any, held: int, device: torch.device, folder: Path) -> nn.Module:
    """``model`` with accelerate's hooks; the experts of its last layers but ``held`` are off the device."""
    from accelerate import dispatch_model

    here: Any = 0 if device.type == "cuda" else "cpu"
    away = "cpu" if device.type == "cuda" else "disk"
    places = {"model.embed_tokens": here, "model.norm": here, "model.rotary_emb": here, "lm_head": here}
    for number, layer in enumerate(model.model.layers):
        for name, _ in layer.named_children():
            if name != "mlp":
                places[f"model.layers.{number}.{name}"] = here
        for name, _ in layer.mlp.named_children():
            stays = name != "experts" or number < held
            places[f"model.layers.{number}.mlp.{name}"] = here if stays else away
    shutil.rmtree(folder, ignore_errors=True)
    return dispatch_model(model, places, main_device=here, offload_dir=str(folder), force_hooks=True)


# ---- transformers, everything on the device ------------------------------------------------------------------


def time_compiled(job: Job) -> Result:
    """The shape with a few layers on the device, decoded by transformers' own ``generate`` over a static cache,
    which it compiles where the device is a GPU."""
    config, setting, device = job.setting.config, job.setting, torch.device(job.setting.device)
    skeleton = write_config(config, job.layers, job.folder / f"shape-{job.layers}")
    torch.manual_seed(setting.seed)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(
            skeleton.config, dtype=choose_dtype(config.dtype, device)
        )
    model = model.requires_grad_(False).eval()
    prompt = _random_prompts(config, setting.seed)[0]
    generate(model, prompt, job.tokens, math.inf, cache_implementation="static")  # compiles
    decoded = generate(model, prompt, job.tokens, math.inf, cache_implementation="static")
    note = "static cache, compiled" if device.type == "cuda" else "static cache; not compiled on a CPU"
    return Result((decoded,), _held(device), notes=(note,))


# ---- llama.cpp -----------------------------------------------------------------------------------------------


def time_llama(job: Job) -> Result:
    """The pair as GGUF, as many whole layers on the GPU as the share of the experts. Raises NotAtHand without a
    build that has a GPU."""
    if find_spec("llama_cpp") is None or find_spec("gguf") is None:
        raise NotAtHand("llama-cpp-python and gguf are not installed")
    import llama_cpp

    if not llama_cpp.llama_supports_gpu_offload():
        raise NotAtHand("this build of llama.cpp has no GPU")
    from moespac.bench.decode.llama import LlamaContext

    config = job.setting.config
    files = make_files(job.folder, config.factor, config.pair_format, gguf=True)
    held = math.floor(job.budget * files.shape.layers + 1e-9)
    prompts = pair_prompts(files, config)
    longest = max(map(len, prompts)) + job.tokens + 1
    context = LlamaContext(str(files.gguf), longest, os.cpu_count() or 1, in_memory=True, gpu_layers=held)
    texts = []
    try:
        for prompt in [prompts[-1], *prompts[:-1]]:
            texts.append(_decode_llama(context, prompt, job.tokens, config.decode_seconds))
    finally:
        context.close()
    note = f"{held} of {files.shape.layers} layers are on the GPU, attention too; no drafts"
    return Result(tuple(texts[1:]), notes=(note,))


def _decode_llama(context: Any, prompt: list[int], tokens: int, seconds: float) -> Decoded:
    start = time.perf_counter()
    context.keep(0)
    sequence = [*prompt, int(context.forward(prompt, 1).argmax())]
    first = time.perf_counter()
    passes = 0
    while passes < tokens and (passes < 2 or time.perf_counter() - first < seconds):
        sequence.append(int(context.forward(sequence[-1:], 1).argmax()))
        passes += 1
    end = time.perf_counter()
    return Decoded(sequence[len(prompt) :], first - start, end - first, read_bytes=0, passes=passes)


# ---- what they share -----------------------------------------------------------------------------------------


def _continue(model: Any, prompts: Sequence[list[int]], tokens: int, config: GpuBenchConfig) -> list[Decoded]:
    """All prompts but the last, which warms up, until the time is up."""
    model.generation_config.eos_token_id = None
    generate(model, prompts[-1], 1, math.inf)
    texts, left = [], config.decode_seconds
    for prompt in prompts[:-1]:
        texts.append(generate(model, prompt, tokens, time.perf_counter() + left))
        left -= texts[-1].seconds
        if left <= 0:
            break
    return texts


def _random_prompts(config: GpuBenchConfig, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(config.vocabulary, size=(config.texts + 1, config.prompt_tokens)).tolist()


def _held(device: torch.device) -> Gauges:
    found: dict[str, Any] = device_memory(device)
    return Gauges(**found)
