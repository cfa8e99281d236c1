"""Cores, instruction sets, the kernel that computes experts on them, and how fast they read memory."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

from moespac.config import DoctorConfig, MeasureConfig
from moespac.doctor.finding import Finding, Place, ok, warn

_FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_int8",
    "asimd",
    "sve",
)


def check_processor(place: Place) -> Iterator[Finding]:
    cores, all_cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    features = _features(Path("/proc/cpuinfo"))
    vectors = ", ".join(features) or "no known vector extension"
    what = f"{platform.machine()}, {cores} of {all_cores} cores; {vectors}"
    if platform.machine() in ("x86_64", "AMD64") and features and "avx2" not in features:
        yield warn(
            "processor", what, "without AVX2 experts compute several times slower: use another machine"
        )
    else:
        yield ok("processor", what)
    quota = _quota(Path("/sys/fs/cgroup/cpu.max"))
    if quota is not None and quota < cores:
        yield warn(
            "processor",
            f"the container may use {quota:.1f} of {cores} cores; more threads than that wait for each other",
            f"set OMP_NUM_THREADS={max(1, int(quota))}, or raise the container's limit",
        )


def check_threads(place: Place) -> Iterator[Finding]:
    import torch

    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    what = f"{threads} of {cores} cores compute"
    if threads > cores:
        yield warn(
            "threads", what, f"set OMP_NUM_THREADS={cores}: threads that share a core stall each other"
        )
    else:
        yield ok("threads", what)


def check_kernel(place: Place) -> Iterator[Finding]:
    from moespac.experts.kernels.library import chosen_isa, load_library

    library = load_library()
    if library is None:
        yield warn(
            "kernel",
            "the native kernel is not there and cannot be compiled: torch computes, several times slower",
            "install a C compiler (gcc or clang), then try again",
        )
        return
    isa = chosen_isa(library)
    name = isa.decode() if isa else "torch, as MOESPAC_KERNEL asks"
    if isa == b"portable":
        yield warn(
            "kernel", f"{name}: no vector instructions of this processor are used", "see processor above"
        )
    else:
        yield ok("kernel", name)


def check_bandwidth(place: Place) -> Iterator[Finding]:
    from moespac.bench.compute_probe import memory_bandwidth

    cores = len(os.sched_getaffinity(0))
    rate = memory_bandwidth(cores, MeasureConfig.quick())
    what = f"{cores} threads read {rate / 1e9:.1f} GB/s"
    if rate < DoctorConfig.slow_memory:
        yield warn(
            "memory speed", what, "close what else is running; fill all memory channels; prefer int4 experts"
        )
    else:
        yield ok("memory speed", what)


def _features(cpuinfo: Path) -> list[str]:
    """Of the first processor that the system lists; none where it does not say."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return []
    flags = next(
        (line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), []
    )
    return [feature for feature in _FEATURES if feature in flags]


def _quota(file: Path) -> float | None:
    """Cores that a container may use; None where there is no limit to be read."""
    try:
        quota, period = file.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):
        return None
