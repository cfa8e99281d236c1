"""How much memory a program may still take here: the system's figure, and a container's limit below it."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)  # v2, v1
_NO_LIMIT = 1 << 60  # version 1 writes a number near 2**63 for none


def container_limit(root: Path = _CGROUP) -> tuple[int, int] | None:
    """Bytes that the container may use, and uses; None where there is no limit, or none that can be read."""
    for limit, used in _FILES:
        try:
            bytes_limit, bytes_used = int((root / limit).read_text()), int((root / used).read_text())
        except (OSError, ValueError):  # "max" is no number
            continue
        if bytes_limit < _NO_LIMIT:
            return bytes_limit, bytes_used
    return None


def total_bytes() -> int:
    limit = container_limit()
    total = psutil.virtual_memory().total
    return total if limit is None else min(total, limit[0])


def free_bytes() -> int:
    """What can be taken without swapping or being killed."""
    limit = container_limit()
    free = psutil.virtual_memory().available
    return free if limit is None else max(0, min(free, limit[0] - limit[1]))
