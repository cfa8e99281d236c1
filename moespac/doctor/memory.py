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
    elif torch.cuda.is_available() and not unlimited and soft < host_memory.total_bytes() // 2:
        yield warn(
            "page lock", what, "raise it (ulimit -l unlimited, or memlock in /etc/security/limits.conf)"
        )
    else:
        yield ok("page lock", what + ("" if torch.cuda.is_available() else "; matters with a GPU only"))


def _is_wsl(version: Path) -> bool:
    try:
        return "microsoft" in version.read_text().lower()
    except OSError:
        return False
