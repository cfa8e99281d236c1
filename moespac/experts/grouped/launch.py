"""LAUNCH the kernels for one model's experts."""

from __future__ import annotations

import os
from typing import Any

import torch

from moespac.experts.format import RecordLayout
from moespac.experts.grouped.constants import (
    MATRIX_TOKENS,
    VECTOR_OPTIONS,
    VECTOR_TOKENS,
    Constants,
    gate_constants,
    matrix_constants,
    matrix_options,
    matrix_sizes,
    vector_sizes,
)
from moespac.experts.kernels.library import Gate

_OPERANDS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
JOIN_OPTIONS = {"num_warps": 4}
_JOIN_BLOCK = 512  # columns of a token that a program reduces: 4 to 16 programs a token


def interpreted() -> bool:
    """Whether Triton runs kernels in Python, on tensors of the CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def join_constants(hidden: int, top_k: int, has_host: bool) -> Constants:
    return {"TOP_K": top_k, "HIDDEN": hidden, "BLOCK": _JOIN_BLOCK, "HAS_HOST": has_host}


class Launcher:
    """Kernels with the constants of one model's records, gate and trunk."""

    def __init__(self, layout: RecordLayout, gate: Gate, dtype: torch.dtype) -> None:
        """``dtype`` is x's. Raises ImportError where Triton is missing."""
        from moespac.experts.grouped.kernels import join, matrix, vector

        self._vector, self._matrix, self._join = vector, matrix, join
        tensors = {tensor.name: tensor for tensor in layout.tensors}
        up_name = "gate_up_proj" if gate.has_gate else "up_proj"
        up, down = tensors[up_name], tensors["down_proj"]
        self.hidden, self.width = down.shape
        self._gated = bool(gate.has_gate)
        up_constants = {"WIDTH": self.width, **gate_constants(gate), **matrix_constants(layout, up_name)}
        down_constants = {"HIDDEN": self.hidden, **matrix_constants(layout, "down_proj")}
        # Triton's interpreter multiplies bfloat16's bits as if they were integers.
        sizes = matrix_sizes("f32" if interpreted() and dtype == torch.bfloat16 else _OPERANDS[dtype])
        self._constants: dict[int, tuple[Any, Any]] = {
            tokens: (up_constants | vector_sizes(up, tokens), down_constants | vector_sizes(down, tokens))
            for tokens in VECTOR_TOKENS
        }
        self._constants[MATRIX_TOKENS] = (up_constants | sizes, down_constants | sizes)
        self._matrix_options = matrix_options(sizes["OPERAND"])

    def run(
        self,
        x: torch.Tensor,
        top_k: int,
        arena: torch.Tensor,
        jobs: torch.Tensor,
        inner: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Fill the rows of ``out`` (T * k, hidden) that ``jobs`` (jobs, 1 + tokens) int32 name; see ``make_jobs``.

        x (T, hidden); ``inner`` (T * k, width) is written on the way; both rows' buffers are float32. ``jobs`` are
        for as many tokens as one of the kernels takes: VECTOR_TOKENS or MATRIX_TOKENS. Two launches.
        """
        count, tokens = jobs.shape[0], jobs.shape[1] - 1
        up, down = self._constants[tokens]
        units = up["ROWS"] // 2 if self._gated else up["ROWS"]
        up_grid = (count, -(-self.width // units))
        down_grid = (count, -(-self.hidden // down["ROWS"]))
        if tokens == MATRIX_TOKENS:
            matrix = self._matrix
            matrix.matrix_up[up_grid](x, arena, jobs, inner, TOP_K=top_k, **up, **self._matrix_options)
            matrix.matrix_down[down_grid](inner, arena, jobs, out, **down, **self._matrix_options)
        else:
            vector = self._vector
            vector.vector_up[up_grid](x, arena, jobs, inner, TOP_K=top_k, **up, **VECTOR_OPTIONS)
            vector.vector_down[down_grid](inner, arena, jobs, out, **down, **VECTOR_OPTIONS)

    def join(
        self,
        device_rows: torch.Tensor,
        weights: torch.Tensor,
        joined: torch.Tensor,
        host_rows: torch.Tensor | None = None,
        source: torch.Tensor | None = None,
    ) -> None:
        """joined (T, hidden): weighted sums of each token's rows; see kernels/join.py. One launch."""
        tokens, top_k = weights.shape
        grid = (tokens, -(-self.hidden // _JOIN_BLOCK))
        self._join.join[grid](
            device_rows,
            device_rows if host_rows is None else host_rows,
            weights if source is None else source,
            weights,
            joined,
            **join_constants(self.hidden, top_k, has_host=source is not None),
            **JOIN_OPTIONS,
        )
