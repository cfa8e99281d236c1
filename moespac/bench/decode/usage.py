"""What this process has read and what it holds, by the kernel's own books (Linux)."""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass
from pathlib import Path

from moespac.errors import ConfigError

_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+)\s*(.*)$")
_LOCK_ON_FAULT = 1  # MLOCK_ONFAULT: what is in memory stays, what is not stays out until it is used
_NOT_MAPPED = ("[vvar", "[vdso]", "[vsyscall]")  # the kernel's own, which cannot be locked


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
            inode, path = int(mapping[3]), mapping[4]
        elif line.startswith("Rss:"):
            resident = int(line.split()[1]) << 10
            if not inode or path.startswith(("/dev/zero", "/memfd:", "/SYSV")):
                own += resident
            elif _lies_in(folder, path):
                model += resident
            else:
                libraries += resident
    return Memory(own, model, libraries)


def memory(folder: Path) -> Memory:
    """Of this process, now."""
    return memory_of(Path("/proc/self/smaps").read_text(), folder)


def forget_peak() -> None:
    """From now on ``above_present`` looks at what comes."""
    Path("/proc/self/clear_refs").write_text("5")


def above_present() -> int:
    """Bytes by which this process was larger at its peak than it is now: buffers that come and go."""
    found = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak, present = (int(found[name].split()[0]) << 10 for name in ("VmHWM", "VmRSS"))
    return peak - present


def keep_in_memory(folder: Path) -> None:
    """Lock all that this process has mapped, but for the model's files in ``folder``.

    Where memory is short, the kernel would otherwise evict the code that runs instead of experts, and what is
    measured would be that. Raises ConfigError where memory may not be locked.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for line in Path("/proc/self/maps").read_text().splitlines():
        mapping = _MAPPING.match(line)
        assert mapping
        start, end, path = int(mapping[1], 16), int(mapping[2], 16), mapping[4]
        if path.startswith(_NOT_MAPPED) or _lies_in(folder, path):
            continue
        if libc.mlock2(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _LOCK_ON_FAULT):
            reason = os.strerror(ctypes.get_errno())
            raise ConfigError(
                f"a contender's own memory cannot be locked ({reason}): raise `ulimit -l` or run as root"
            )


def _lies_in(folder: Path, path: str) -> bool:
    return path.startswith(f"{folder.resolve()}/")
