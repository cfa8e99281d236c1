"""Compile the accelerator's kernels for cards that are not here, for experts of Qwen3-30B-A3B's shape; print JSON.

Run by ``test_grouped_compiled``: `python -m tests.experts.compile_grouped`.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moespac.experts.format import FLOATS, packed_layout
from moespac.experts.grouped import constants
from moespac.experts.grouped.kernels import join, matrix, vector
from moespac.experts.grouped.launch import JOIN_OPTIONS, join_constants
from moespac.experts.kernels.library import Gate
from moespac.model.index import ExpertTensor

HIDDEN, WIDTH, TOP_K = 2048, 768, 8
SWIGLU = Gate(1, 0, 0, 1.0, math.inf, 0.0)
CLAMPED = Gate(1, 1, 0, 1.702, 7.0, 1.0)  # gpt_oss
# (kernels, tokens of a job, format, gate, compute capability): every kernel for each card, packed formats for one.
VARIANTS = [
    ("vector", 4, "int4", SWIGLU, 90),
    ("matrix", constants.MATRIX_TOKENS, "int4", SWIGLU, 90),
    ("vector", 1, "bf16", SWIGLU, 89),
    ("matrix", constants.MATRIX_TOKENS, "int8", CLAMPED, 89),
    ("vector", 1, "int8", CLAMPED, 80),
    ("matrix", constants.MATRIX_TOKENS, "bf16", SWIGLU, 80),
]
POINTERS = {"x": "*bf16", "arena": "*u8", "jobs": "*i32", "inner": "*fp32", "out": "*fp32"}
JOIN_POINTERS = {
    "device_rows": "*fp32",
    "host_rows": "*fp32",
    "source": "*i32",
    "weights": "*bf16",
    "joined": "*bf16",
}


def main() -> None:
    results = {}
    for kind, tokens, format, gate, card in VARIANTS:
        module = vector if kind == "vector" else matrix
        for side, (values, options) in both_sides(kind, tokens, format, gate).items():
            kernel = getattr(module, f"{kind}_{side}")
            name = f"{kind}_{side} {format} {tokens} sm_{card}"
            results[name] = build(kernel, POINTERS, values, options, card) | {
                "lane_rows": values["ROWS"] * values.get("LANES", 0) // 32
            }
    for card, has_host in ((80, True), (90, False)):
        values = join_constants(HIDDEN, TOP_K, has_host)
        results[f"join sm_{card}"] = build(join.join, JOIN_POINTERS, values, JOIN_OPTIONS, card)
    print(json.dumps(results, indent=1))


def both_sides(
    kind: str, tokens: int, format: str, gate: Gate
) -> dict[str, tuple[dict[str, Any], dict[str, int]]]:
    """The constants and options of a launch, as the launcher makes them."""
    shapes = {"gate_up_proj": (2 * WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
    stored = FLOATS.get(format, torch.bfloat16)
    layout = packed_layout(
        [ExpertTensor(name, shape, stored, False) for name, shape in shapes.items()], format
    )
    up = {"TOP_K": TOP_K, "WIDTH": WIDTH} | constants.gate_constants(gate)
    up |= constants.matrix_constants(layout, "gate_up_proj")
    down = {"HIDDEN": HIDDEN} | constants.matrix_constants(layout, "down_proj")
    if kind == "matrix":
        sizes = constants.matrix_sizes("bf16")
        options = constants.matrix_options("bf16")
        return {"up": (up | sizes, options), "down": (down | sizes, options)}
    tensors = {tensor.name: tensor for tensor in layout.tensors}
    options = constants.VECTOR_OPTIONS
    return {
        "up": (up | constants.vector_sizes(tensors["gate_up_proj"], tokens), options),
        "down": (down | constants.vector_sizes(tensors["down_proj"], tokens), options),
    }


def build(
    kernel: Any, pointers: dict[str, str], values: dict[str, Any], options: dict[str, int], card: int
) -> dict[str, int]:
    """Compile for compute capability ``card`` / 10, and look at the result."""
    signature = {name: pointers.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in pointers}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    done = triton.compile(source, target=GPUTarget("cuda", card, 32), options=dict(options))
    ptx = done.asm["ptx"]
    return {
        "machine_code": len(done.asm["cubin"]),
        "shared_bytes": done.metadata.shared,
        "wide_loads": len(re.findall(r"ld\.global\.[\w.:]*v4\.b32", ptx)),
        "tensor_core_products": len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)", ptx)),
        "spilled_bytes": spilled(ptx, card),
    }


def spilled(ptx: str, card: int) -> int:
    """Bytes of registers that ptxas had to put into memory."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "kernel.ptx"
        file.write_text(ptx)
        architecture = f"sm_{card}a" if card == 90 else f"sm_{card}"
        command = [get_ptxas(card).path, "-v", f"--gpu-name={architecture}", str(file), "-o", f"{file}.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", said))


if __name__ == "__main__":
    main()
