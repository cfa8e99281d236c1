"""The accelerator's kernels compile for the cards of three generations, on any machine.

Another process compiles them: in this one, Triton's language may be the interpreter's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed (it is in the dev extra)")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> dict[str, dict[str, Any]]:
    """Kernel and card -> what the compiler made of it; see ``compile_grouped``."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "PYTHONPATH": os.pathsep.join([str(repository), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.experts.compile_grouped"],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_all_kernels_compile_for_three_generations(compiled: dict[str, dict[str, Any]]) -> None:
    kernels = {name.rsplit(" ", 1)[0] for name in compiled}
    assert {name.split(" ")[0] for name in kernels} == {
        "vector_up",
        "vector_down",
        "matrix_up",
        "matrix_down",
        "join",
    }
    assert {name.rsplit(" ", 1)[1] for name in compiled} == {"sm_80", "sm_89", "sm_90"}
    for name, kernel in compiled.items():
        assert kernel["machine_code"] > 1000, name


def test_weights_are_read_16_bytes_at_once(compiled: dict[str, dict[str, Any]]) -> None:
    """One load of 128 bits a row and lane; and weights do not pass through shared memory."""
    for name, kernel in compiled.items():
        if name.startswith("vector"):
            assert kernel["wide_loads"] >= kernel["lane_rows"] > 0, name
            assert kernel["shared_bytes"] <= 1024, name


def test_prompts_take_the_tensor_cores(compiled: dict[str, dict[str, Any]]) -> None:
    for name, kernel in compiled.items():
        if name.startswith("matrix"):
            assert kernel["tensor_core_products"] > 0, name
            assert kernel["shared_bytes"] <= 99 << 10, name  # what a block may have on the smallest of these


def test_registers_suffice(compiled: dict[str, dict[str, Any]]) -> None:
    for name, kernel in compiled.items():
        assert kernel["spilled_bytes"] <= 32, name  # a few, outside the loop, cost nothing
