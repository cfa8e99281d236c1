"""COMPILE the native kernels with the system's C compiler. Standard library only: the package's build runs it too.

One library holds the variants for all instruction sets of the architecture; which one runs is chosen when it is
loaded, so no flag depends on the machine that compiles. The file's name carries a digest of the sources: a library
of other sources is never taken for the present one.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"

_FLAGS = [
    *("-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread"),
    "-fno-strict-aliasing",  # records are bytes that hold numbers
    *("-fno-math-errno", "-fno-trapping-math"),  # so that gates vectorise
    "-ffp-contract=off",  # products are rounded where the source says so, or outputs could depend on the tile
]
_AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma -mf16c -mprefer-vector-width=512"
# At -O3 this one takes longer to compile than all the others together.
_PORTABLE = ["-O2", "-ftree-vectorize"]
_VARIANTS: dict[str, dict[str, list[str]]] = {
    "x86_64": {"AVX2": ["-mavx2", "-mfma", "-mf16c"], "AVX512": _AVX512.split()},
    "aarch64": {"NEON": []},
}


_ONCE = (
    *("api", "costs", "decoder", "dispatch", "foresight", "host_memory", "layer", "pass", "place", "pool"),
    "reads",
)
_FOR_EACH = ("expert", "attention")  # sources compiled for each instruction set


class CompileError(Exception):
    """No compiler, or one that refuses. Its text is one line."""


def library_name() -> str:
    """The file name of the library of these sources, for this architecture."""
    digest = hashlib.sha256()
    for file in [Path(__file__), *sorted(SOURCES.iterdir())]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return f"moespac_kernels-{_machine()}-{digest.hexdigest()[:12]}.so"


def compile_library(directory: Path) -> Path:
    """Put the library into ``directory``, in one step, and remove those of older sources there.

    Raises CompileError, or OSError when ``directory`` cannot be written.
    """
    compiler = _compiler()
    with tempfile.TemporaryDirectory(prefix=".moespac-kernels-", dir=directory) as scratch:
        built = Path(scratch) / "built.so"
        _run([*compiler, *_FLAGS, "-shared", "-o", str(built), *_objects(compiler, Path(scratch)), "-lm"])
        library = directory / library_name()
        for old in directory.glob(f"moespac_kernels-{_machine()}-*.so"):
            old.unlink()
        os.replace(built, library)
    return library


def _objects(compiler: list[str], scratch: Path) -> list[str]:
    """Compile all sources, the arithmetic once for each instruction set; their object files."""
    units: list[tuple[Path, str, list[str]]] = [(SOURCES / f"{name}.c", name, []) for name in _ONCE]
    variants = {"portable": _PORTABLE, **_VARIANTS.get(_machine(), {})}
    for name, (variant, flags) in itertools.product(_FOR_EACH, variants.items()):
        units.append((SOURCES / f"{name}.c", f"{name}-{variant}", [f"-DMOESPAC_{variant}", *flags]))

    def compile_unit(source: Path, name: str, flags: list[str]) -> None:
        _run([*compiler, *_FLAGS, *flags, "-c", str(source), "-o", str(scratch / f"{name}.o")])

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_unit, *zip(*units, strict=True)))
    return [str(scratch / f"{name}.o") for _, name, _ in units]


def _machine() -> str:
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def _compiler() -> list[str]:
    """The command of a C compiler: $CC, then the one that built Python, then the usual names."""
    for command in (os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc", "gcc", "clang"):
        words = shlex.split(command or "")
        if words and shutil.which(words[0]):
            return words
    raise CompileError("no C compiler found")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise CompileError(f"{command[0]}: {next((line for line in lines if 'error' in line), lines[0])}")
