"""What the kernels are compiled for: a model's record layout and gate, as constants of a launch.

Sizes are reasoned, not measured, on experts of 2048 x 768 (docs/accelerator-kernels.md).
"""

from __future__ import annotations

from typing import Any

from moespac.experts.format import RecordLayout, TensorLayout
from moespac.experts.kernels.library import ACTIVATIONS, Gate

Constants = dict[str, Any]

# vector kernels: one warp; a lane reads 16 bytes at once, and the rows of one program share the inputs it loads.
VECTOR_TOKENS = (1, 4)  # of a job: plain decoding, and windows. More would want more registers than there are
VECTOR_OPTIONS = {"num_warps": 1}
_LANE_BYTES = 16
_WARP_LANES = 32
_LANE_WEIGHTS = 128  # of a lane, unpacked at once: registers hold no more beside four tokens' inputs and sums
_MOST_ROWS = 8  # of a program, which share the inputs it loads; 192 programs an expert for up, 256 for down

# matrix kernels: 64 x 64 sums; 128 bytes of a row at once keep three stages under 64 KB of shared memory.
MATRIX_TOKENS = 64  # of a job: with fewer, reading the weights takes longer than multiplying anyway
_MATRIX_ROWS = 64
_MATRIX_BYTES = 128

_OPERAND_BYTES = {"f32": 4, "bf16": 2, "f16": 2}


def gate_constants(gate: Gate) -> Constants:
    kind = "interleaved" if gate.interleaved else "halves"
    return {
        "GATE": kind if gate.has_gate else "none",
        "ACTIVATION": ACTIVATIONS[gate.activation],
        "ALPHA": gate.alpha,
        "LIMIT": 0.0 if gate.limit == float("inf") else gate.limit,
        "OFFSET": gate.offset,
    }


def matrix_constants(layout: RecordLayout, name: str) -> Constants:
    """Where the matrix ``name`` and its bias lie in a record."""
    tensors = {tensor.name: tensor for tensor in layout.tensors}
    matrix, bias = tensors[name], tensors.get(f"{name}_bias")
    offsets = {block.name: block.offset for block in matrix.blocks}
    return {
        "COLUMNS": matrix.shape[1],
        "FORMAT": matrix.format,
        "VALUES": matrix.blocks[0].offset,
        "SCALES": offsets.get("scales", -1),
        "MINIMA": offsets.get("minima", -1),
        "ROW_SCALES": offsets.get("row_scales", -1),
        "BIAS": bias.blocks[0].offset if bias else -1,
        "BIAS_FORMAT": bias.format if bias else "f32",
        "RECORD": layout.nbytes,
    }


def vector_sizes(matrix: TensorLayout, tokens: int) -> Constants:
    """How a vector kernel cuts ``matrix`` up."""
    values = matrix.blocks[0]
    each = _LANE_BYTES // (values.nbytes // (values.shape[0] * values.shape[1]))  # numbers of 16 bytes
    lanes = _lanes(values.nbytes // values.shape[0])
    weights = 2 * each if matrix.format == "int4" else each
    return {
        "TOKENS": tokens,
        "ROWS": min(_MOST_ROWS, _LANE_WEIGHTS // weights * _WARP_LANES // lanes),
        "CHUNK": lanes * each,
        "LANES": lanes,
    }


def matrix_sizes(operand: str) -> Constants:
    """How a matrix kernel cuts a matrix up whose products are taken in ``operand``."""
    chunk = _MATRIX_BYTES // _OPERAND_BYTES[operand]
    return {"OPERAND": operand, "TOKENS": MATRIX_TOKENS, "ROWS": _MATRIX_ROWS, "CHUNK": chunk}


def matrix_options(operand: str) -> dict[str, int]:
    """Float32 products are the ordinary cores' work, and twice the warps are to hold their operands."""
    return {"num_warps": 8 if operand == "f32" else 4, "num_stages": 3}


def _lanes(row_bytes: int) -> int:
    """Lanes that share a row: all 32 if that leaves none idle, else fewer; the others have further rows.

    At least 8, whose 128 bytes are a cache line.
    """
    for lanes in (_WARP_LANES, 16, 8):
        if row_bytes % (lanes * _LANE_BYTES) == 0:
            return lanes
    return _WARP_LANES
