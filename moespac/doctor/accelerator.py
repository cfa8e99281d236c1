"""A GPU, and the way to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moespac.cli.tables import size
from moespac.config import DoctorConfig, MeasureConfig
from moespac.doctor.finding import Finding, Place, bad, ok, warn


def check_accelerator(place: Place) -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        yield from _cuda()
    elif any(Path("/dev").glob("nvidia[0-9]*")):
        build = f"torch {torch.__version__}"
        yield bad(
            "accelerator",
            f"there is a GPU, and {build} cannot use it",
            "install torch's CUDA build for your driver",
        )
    else:
        yield ok("accelerator", "none: experts are computed on the CPU")


def _cuda() -> Iterator[Finding]:
    import torch

    from moespac.bench.cuda_probe import measure_cuda

    free, total = torch.cuda.mem_get_info()
    speed = measure_cuda(MeasureConfig.quick())
    assert speed is not None
    yield ok(
        "accelerator",
        f"{speed.device}, {size(free)} free of {size(total)}, reads {speed.bandwidth / 1e9:.0f} GB/s",
    )
    if torch.cuda.device_count() > 1:
        yield warn(
            "accelerator",
            f"{torch.cuda.device_count()} GPUs, and one is used",
            "choose it with CUDA_VISIBLE_DEVICES",
        )
    locked, other = speed.link_bandwidth / 1e9, speed.pageable_bandwidth / 1e9
    what = f"{locked:.1f} GB/s from page-locked memory, {other:.1f} GB/s from other"
    if speed.link_bandwidth < DoctorConfig.slow_link:
        yield warn("link", what, "check that the GPU sits in a full x16 slot (nvidia-smi -q: link width)")
    else:
        yield ok("link", what)
