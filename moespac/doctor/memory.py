"""Host memory: how much there is, how much is free, how much may be page-locked."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

from moespac import host_memory
from moespac.cli.tables import size
from moespac.config import DoctorConfig
from moespac.doctor.finding import Finding, Place, ok, warn


def check_memory(place: Place) -> Iterator[Finding]:
    total, free = host_memory.total_bytes(), host_memory.free_bytes()
    limit = host_memory.container_limit()
    what = f"{size(free)} free of {size(total)}" + ("" if limit is None else ", a container's limit")
    if free < DoctorConfig.little_free * total:
        yield warn("memory", what, "close other programs: --host-memory auto takes a share of what is free")
    else:
        yield ok("memory", what)
    swapped = psutil.swap_memory().used
    if swapped > DoctorConfig.much_swap:
        yield warn(
            "memory",
            f"{size(swapped)} are swapped out",
            "give less with --host-memory: swapping stalls decoding",
        )


def check_page_lock(place: Place) -> Iterator[Finding]:
    """Copies to a GPU run at full speed from page-locked memory only."""
    import torch

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = soft == resource.RLIM_INFINITY
    what = "unlimited" if unlimited else f"at most {size(soft)}"
    if _is_wsl(Path("/proc/version")):
        yield warn("page lock", f"{what}; WSL limits it to half of the memory", "set memory= in .wslconfig")
    elif not torch.cuda.is_available():
        yield ok("page lock", what + "; matters with a GPU only")
    else:
        yield _try_page_lock(what)


def _try_page_lock(limit: str) -> Finding:
    """What counts is what the driver gets, whatever the limit says."""
    from moespac.experts.cuda import page_lock
    from moespac.experts.movers import host_arena

    slot = DoctorConfig.page_lock_slot
    slots = max(1, min(DoctorConfig.page_lock_bytes, host_memory.free_bytes() // 4) // slot)
    lock = page_lock.PageLock(host_arena(slots, slot), page_lock.CudaRegistrar())
    share, tried = lock.share, slots * slot
    lock.close()
    what = f"{size(int(share * tried))} of {size(tried)} that were tried; the limit: {limit}"
    if share < 1:
        remedy = "raise it (ulimit -l unlimited, or memlock in /etc/security/limits.conf, or the container's)"
        return warn("page lock", what, remedy)
    return ok("page lock", what)


def _is_wsl(version: Path) -> bool:
    try:
        return "microsoft" in version.read_text().lower()
    except OSError:
        return False
