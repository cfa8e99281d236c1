"""A memory limit without control groups: lock memory until only so much is left for everyone else.

What is locked cannot be reclaimed, so memory and page cache of all other programs live in the rest. This works
without privileges over others, where control groups may not be had; it needs the right to lock memory
(``ulimit -l``, or root).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import subprocess
import sys
from types import TracebackType

import psutil

from moespac.config import DecodeBenchConfig
from moespac.errors import ConfigError

_EXPENDABLE = 900  # oom_score_adj: should memory run out, this process goes before anyone else's


class Ballast:
    """Locked memory in a process of its own: it is freed however this one ends."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moespac.bench.ballast"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def leave(self, nbytes: int) -> int:
        """Lock or free memory until ``nbytes`` are available; returns how many are.

        Raises ConfigError when memory may not be locked, or when less than that is available already.
        """
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(f"{nbytes}\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except OSError:
            answer = ""
        if not answer:
            raise ConfigError("the process that holds the locked memory was ended; close other programs")
        said = json.loads(answer)
        if "error" in said:
            raise ConfigError(said["error"])
        return said["available"]

    @property
    def holds(self) -> bool:
        """Whether the limit is still in force."""
        return self._process.poll() is None

    def close(self) -> None:
        """Free it all."""
        with contextlib.suppress(OSError):
            if self._process.stdin:
                self._process.stdin.close()  # its end of input is its end
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def __enter__(self) -> Ballast:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class LockedMemory:
    """Chunks of locked memory in this process."""

    def __init__(self, config: DecodeBenchConfig) -> None:
        self._config = config
        self._chunks: list[mmap.mmap] = []
        self._libc = ctypes.CDLL(None, use_errno=True)

    @property
    def nbytes(self) -> int:
        return len(self._chunks) * self._config.ballast_chunk

    def leave(self, nbytes: int) -> int:
        """Lock or free chunks until ``nbytes`` are available, within a chunk; returns how many are.

        Raises ConfigError when memory may not be locked, or when less than that is available already.
        """
        chunk = self._config.ballast_chunk
        for _ in range(self._config.ballast_tries):
            surplus = (psutil.virtual_memory().available - nbytes) // chunk
            if surplus == 0:
                break
            self.grow(surplus) if surplus > 0 else self.shrink(-surplus)
        available = psutil.virtual_memory().available
        if not self._chunks and available < nbytes:
            raise ConfigError(
                f"only {available >> 20} MiB of memory are available where {nbytes >> 20} MiB are to be left:"
                " close other programs or take a smaller model"
            )
        return available

    def grow(self, chunks: int) -> None:
        for _ in range(chunks):
            memory = mmap.mmap(-1, self._config.ballast_chunk, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            if self._libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(len(memory))):
                reason = os.strerror(ctypes.get_errno())
                raise ConfigError(
                    f"{self.nbytes >> 20} MiB of memory could be locked and no more ({reason}):"
                    " raise `ulimit -l` or run as root; at 100% nothing has to be locked"
                )
            self._chunks.append(memory)

    def shrink(self, chunks: int) -> None:
        for _ in range(min(chunks, len(self._chunks))):
            self._chunks.pop().close()


def _serve() -> None:
    """A number of bytes to leave on each line of input; what is available then is the answer."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(_EXPENDABLE))
    memory = LockedMemory(DecodeBenchConfig())
    for line in sys.stdin:
        answer: dict[str, int | str]
        try:
            answer = {"available": memory.leave(int(line))}
        except ConfigError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    with contextlib.suppress(
        KeyboardInterrupt
    ):  # the parent's Ctrl-C reaches the whole group; the parent decides
        _serve()
