"""What the way to the accelerator reaches when nothing else happens: the figure that copies are held against."""

from __future__ import annotations

from typing import Any

import torch

from moespac.bench.compute_probe import typical_seconds
from moespac.bench.cuda_probe import measure_cuda
from moespac.bench.gpu.job import Job, Result
from moespac.config import MeasureConfig


def measure_link(job: Job) -> Result:
    """Bytes/s of large copies from page-locked memory; for the in-process accelerator, of copies within memory."""
    config = MeasureConfig.quick()
    speed = measure_cuda(config) if job.setting.device == "cuda" else None
    if speed is not None:
        found: dict[str, Any] = {
            "device": speed.device,
            "device_bytes": speed.memory,
            "link_bandwidth": speed.link_bandwidth,
            "link_latency": speed.link_latency,
            "memory_bandwidth": speed.bandwidth,
            "launch_seconds": speed.launch,
        }
        return Result(figures=found)
    source = torch.ones(config.records_bytes, dtype=torch.uint8)
    target = torch.zeros_like(source)
    seconds = typical_seconds(lambda: target.copy_(source), config.repeats)
    figures = {"device": "in-process", "link_bandwidth": config.records_bytes / seconds}
    return Result(figures=figures, notes=("the in-process accelerator: its link is a copy in memory",))
