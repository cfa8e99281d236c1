"""TIME one run: texts decoded one after the other, with an eye on the accelerator and the way to it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any, Protocol

import numpy as np
import torch

from moespac.bench.decode.task import Decoded
from moespac.bench.gpu.job import Gauges, Result
from moespac.config import GpuBenchConfig
from moespac.engine.engine import Engine
from moespac.timeline import ACCELERATOR, LINK, TRUNK_ON_DEVICE, Event, Timeline

log = logging.getLogger(__name__)

KERNELS = "kernels under the profiler a pass, over the timed run's seconds a pass; copies left out"
LANE = "expert jobs and recorded stretches of the trunk on the timeline; drafter and copies left out"


class Prompts(Protocol):
    """Texts to continue, by number; the last is for warming up."""

    def begin(self, number: int) -> list[int]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class GivenPrompts:
    """Token ids that are there already."""

    tokens: Sequence[list[int]]

    def begin(self, number: int) -> list[int]:
        return self.tokens[number]

    def __len__(self) -> int:
        return len(self.tokens)


def time_engine(
    engine: Engine, prompts: Prompts, tokens: int, config: GpuBenchConfig, profiled: bool = False
) -> Result:
    """Warm up, decode all texts until the time is up, then a few tokens more with the timeline on, and
    (``profiled``) under the profiler: what looks closely takes time of its own."""
    device, last = engine.model.device, len(prompts) - 1
    _decode(engine, prompts.begin(last), config.warmup_tokens, config.warmup_seconds)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    texts: list[Decoded] = []
    paths: list[float] = []
    left = config.decode_seconds
    for number in range(last):
        decoded, path = _decode(engine, prompts.begin(number), tokens, left)
        texts.append(decoded)
        paths += [] if path is None else [path]
        left -= decoded.seconds
        if left <= 0:
            break
    gauges = _watched(engine, prompts.begin(last), config)
    gauges = replace(gauges, layer_seconds=mean(paths) if paths else None)
    if profiled and device.type == "cuda":
        gauges = _with_kernels(gauges, engine, prompts.begin(last), texts, config)
    return Result(tuple(texts), gauges)


def _decode(engine: Engine, prompt: list[int], tokens: int, seconds: float) -> tuple[Decoded, float | None]:
    """``tokens`` after the first, or as many as ``seconds`` allow but two passes at least; and the host's own
    seconds on the critical path of a layer, where the trunk is one that counts them."""
    stream = engine.stream(prompt, max_new_tokens=tokens + 1)
    start = time.perf_counter()
    stream.advance()
    first = time.perf_counter()
    passes = drafted = accepted = 0
    while not stream.done and (passes < 2 or time.perf_counter() - first < seconds):
        piece = stream.advance()
        passes, drafted, accepted = passes + 1, drafted + piece.drafted, accepted + piece.accepted
    end = time.perf_counter()
    stream.close()
    summary = stream.result.summary
    decoded = Decoded(
        token_ids=summary.token_ids,
        first_seconds=first - start,
        seconds=end - first,
        read_bytes=0,  # storage is not what is measured here: host memory holds all experts
        passes=passes,
        drafted=drafted,
        accepted=accepted,
        hit_rate=summary.hit_rate,
        causes={c: s for c, s in summary.seconds.items() if c not in ("prefill", "total")},
    )
    path = summary.to_dict().get("host_us_per_layer")  # a figure of recorded trunks alone
    return decoded, None if path is None else path * 1e-6


def _watched(engine: Engine, prompt: list[int], config: GpuBenchConfig) -> Gauges:
    """Of a few passes with the timeline on."""
    runtime, timeline = engine.runtime, Timeline()
    stream = engine.stream(prompt, max_new_tokens=config.watched_tokens + 1)
    stream.advance()
    copied, start, passes = runtime.memory.bytes_read["link"], time.perf_counter(), 0
    runtime.clock.tape.record = timeline.record
    while not stream.done and (passes < 2 or time.perf_counter() - start < config.warmup_seconds):
        stream.advance()
        passes += 1
    runtime.memory.quiesce()  # what was copied is counted when it has landed
    runtime.clock.tape.record = None
    wall = time.perf_counter() - start
    copied = runtime.memory.bytes_read["link"] - copied
    stream.close()
    tier = runtime.memory.accelerator
    found: dict[str, Any] = device_memory(engine.model.device)
    spans = _lanes(timeline.events)
    return Gauges(
        link_bytes=copied,
        link_seconds=covered(spans.get(LINK, [])),
        busy_share=covered(spans.get(ACCELERATOR, []) + spans.get(TRUNK_ON_DEVICE, [])) / wall,
        busy_source=LANE,
        expert_slots=tier.slots if tier else 0,
        record_bytes=engine.shape.record_bytes,
        **found,
    )


def _lanes(events: Sequence[Event]) -> dict[str, list[tuple[float, float]]]:
    """(start, duration) of what each lane did."""
    spans: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        spans.setdefault(event.lane, []).append((event.start, event.duration))
    return spans


def device_memory(device: torch.device) -> dict[str, int]:
    """Bytes on the device: at the peak, in use by anybody now, and there at all. Empty without one.

    The peak is the driver's count where that is more than torch's: mapped expert slots are none of torch's tensors.
    """
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    peak = max(torch.cuda.max_memory_allocated(device), total - free)
    return {"peak_bytes": peak, "used_bytes": total - free, "device_bytes": total}


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of the spans (start, duration) lasted."""
    total, end = 0.0, -np.inf
    for start, duration in sorted(spans):
        total += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    return total


def _with_kernels(
    gauges: Gauges, engine: Engine, prompt: list[int], texts: Sequence[Decoded], config: GpuBenchConfig
) -> Gauges:
    """The busy share by the kernels of a few more passes; as it was where the profiler cannot say."""
    stream = engine.stream(prompt, max_new_tokens=config.watched_tokens + 1)
    stream.advance()
    passes = 0
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            while not stream.done:
                stream.advance()
                passes += 1
            torch.cuda.synchronize()
        kernels = _kernel_seconds(profile)
    except Exception as error:  # the profiler needs rights and libraries that not every machine gives
        log.warning("no kernel times (%s): %s", type(error).__name__, " ".join(str(error).split())[:200])
        return gauges
    finally:
        stream.close()
    per_pass = sum(text.seconds for text in texts) / sum(text.passes for text in texts)
    return replace(gauges, busy_share=kernels / passes / per_pass, busy_source=KERNELS)


def _kernel_seconds(profile: Any) -> float:
    """In which a kernel ran on the device."""
    spans = [
        (event.time_range.start * 1e-6, event.time_range.elapsed_us() * 1e-6)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith("Mem")
    ]
    if not spans:
        raise RuntimeError("the profiler saw no kernels")
    return covered(spans)
