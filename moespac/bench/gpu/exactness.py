"""Whether what comes out is what transformers says, on the same device: tokens in float32, logits in bfloat16.

Two programs that sum in different orders differ in bfloat16 as either differs from float32. So that is the
tolerance: our logits may be as far from transformers' in bfloat16 as ``GpuBenchConfig.logits_tolerance`` times
those are from its float32 ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from moespac.bench.gpu.contenders import contender
from moespac.bench.gpu.job import Job, Result
from moespac.bench.gpu.stage import pair_files, pair_prompts, pair_stage
from moespac.bench.paper import OURS
from moespac.engine.engine import Engine
from moespac.types import Window


@dataclass(frozen=True)
class Agreement:
    """Of two runs' greedy tokens."""

    same: int  # tokens before the first that differs
    of: int


def compare(job: Job) -> Result:
    """The pair, decoded by moe-spac with drafts, and the same weights in transformers."""
    config = job.setting.config
    files = pair_files(job)
    prompt = pair_prompts(files, config)[0]
    figures: dict[str, Any] = {}
    stage = pair_stage(job, "float32")
    try:
        engine = stage.engine_for(contender(OURS, config.window))
        ours = engine.generate(prompt, max_new_tokens=config.check_tokens).token_ids
    finally:
        stage.close()
    model = _transformers(files.checkpoint, torch.float32, job.setting.device)
    theirs = _their_tokens(model, prompt, config.check_tokens)
    sequence = [*prompt, *theirs]
    exact = _their_logits(model, sequence)[len(prompt) - 1 :]
    del model
    found = agreement(ours, theirs)
    figures |= {"tokens_same": found.same, "tokens_of": found.of}
    stage = pair_stage(job, "bfloat16")
    try:
        logits = _our_logits(stage.engine_for(contender(OURS, config.window)), sequence, len(prompt))
    finally:
        stage.close()
    model = _transformers(files.checkpoint, torch.bfloat16, job.setting.device)
    rounded = _their_logits(model, sequence)[len(prompt) - 1 :]
    figures |= {
        "logits_off": furthest(logits, rounded),
        "logits_rounding": furthest(rounded, exact),
        "logits_same_choice": float((logits.argmax(-1) == rounded.argmax(-1)).float().mean()),
    }
    return Result(figures=figures)


def agreement(ours: Sequence[int], theirs: Sequence[int]) -> Agreement:
    differing = [at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b]
    longest = max(len(ours), len(theirs))
    return Agreement(differing[0] if differing else min(len(ours), len(theirs)), longest)


def furthest(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference between logits (tokens, vocabulary), in units of the expected ones' spread."""
    return float((logits - expected).abs().max() / expected.std())


@torch.inference_mode()
def _our_logits(engine: Engine, sequence: list[int], prompt: int) -> torch.Tensor:
    """Behind the prompt's last token and each one after it, in windows as decoding runs them."""
    cache, rows = engine.trunk.new_cache(), []
    cuts = [0, prompt, *range(prompt + 1, len(sequence), 5), len(sequence)]
    for start, end in pairwise(cuts):
        tokens = np.array(sequence[start:end], np.int64)
        engine.runtime.begin_pass(Window(tokens, prefill=not start))
        keep = len(tokens) if start else 1
        rows.append(engine.trunk(torch.from_numpy(tokens), cache, keep=keep))
        engine.runtime.end_pass(0)
    return torch.cat(rows)


def _transformers(checkpoint: Path, dtype: torch.dtype, device: str) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    model.generation_config.eos_token_id = None
    return model.to(device).eval()


def _their_tokens(model: Any, prompt: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
    )
    return found[0, len(prompt) :].tolist()


@torch.inference_mode()
def _their_logits(model: Any, sequence: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([sequence], device=model.device)).logits[0].float().cpu()
