"""What this process has read and what it holds, by the kernel's own books (Linux)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ (\d+)\s*(.*)$")


def read_from_disk() -> int:
    """Bytes that this process has had fetched from storage, page faults and read-ahead included."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise AssertionError("the kernel counts no reads")


@dataclass(frozen=True)
class Memory:
    """Resident bytes of this process."""

    own: int  # neither file's: heap, stacks, buffers
    model: int  # pages of the model's files
    libraries: int  # pages of all other files


def memory_of(smaps: str, folder: Path) -> Memory:
    """From the text of ``/proc/PID/smaps``; the model's files lie in ``folder``."""
    own = model = libraries = 0
    inode, path = 0, ""
    for line in smaps.splitlines():
        mapping = _MAPPING.match(line)
        if mapping:
            inode, path = int(mapping[1]), mapping[2]
        elif line.startswith("Rss:"):
            resident = int(line.split()[1]) << 10
            if not inode or path.startswith(("/dev/zero", "/memfd:", "/SYSV")):
                own += resident
            elif path.startswith(f"{folder.resolve()}/"):
                model += resident
            else:
                libraries += resident
    return Memory(own, model, libraries)


def memory(folder: Path) -> Memory:
    """Of this process, now."""
    return memory_of(Path("/proc/self/smaps").read_text(), folder)
