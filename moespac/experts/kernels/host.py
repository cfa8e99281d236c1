"""EXECUTE the experts of a layer on the host's cores, straight from their records."""

from __future__ import annotations

import ctypes
import logging
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moespac.experts.compute import ExpertMath, reason_for_torch
from moespac.experts.format import FLOATS, RecordLayout, TensorLayout, packed_layout, stored_layout
from moespac.experts.kernels.gates import find_gate
from moespac.experts.kernels.library import (
    FORMATS,
    Expert,
    Gate,
    Matrix,
    address,
    chosen_isa,
    load_library,
)
from moespac.model.index import ExpertTensor

if TYPE_CHECKING:
    from moespac.experts.groups import Groups

log = logging.getLogger(__name__)

_SMALL = (
    72,
    40,
)  # hidden size and width of the expert that is checked against torch: neither fills its groups
_TOLERANCE = 1e-3  # of its norm; 16-bit activations err by 1e-4, a wrong gate or layout by 1e-1
_COARSE = 0.03  # int4: 8-bit activations err by 1e-2


class HostKernel:
    """Computes experts of one model from packed or float records, without Python in between.

    x is float32. Float records are multiplied with it in float32; int8 ones with x rounded to 16 bits under one
    scale for 256 inputs, int4 ones with x rounded to 8 bits under one for 32, their products summed exactly over
    those: |error| of an input is at most 1/65534 of the largest in its 256, for int4 1/254 of the largest in its
    32. What differs from float64 on the decoded weights is that and float32's rounding of sums. A row's output
    depends on its token and its expert alone, bit by bit: not on threads, the other experts of the call, or the
    other tokens of the expert. Variants for different instruction sets may differ in the last bits.
    """

    def __init__(
        self, expert: Expert, record_bytes: int, threads: int, library: ctypes.CDLL, isa: bytes
    ) -> None:
        self.isa = isa.decode()
        self.threads = max(1, threads)
        self._hidden = expert.down.rows
        self._record_bytes = record_bytes
        self._run, self._run_share = library.moespac_kernel_run, library.moespac_run_share
        self._join = library.moespac_join
        self._kernel = library.moespac_kernel_new(ctypes.addressof(expert), self.threads, isa)
        if not self._kernel:
            raise MemoryError("no memory for the native kernel")
        weakref.finalize(
            self, library.moespac_kernel_free, self._kernel
        ).atexit = False  # threads end with us

    @staticmethod
    def build(prototype: nn.Module, layout: RecordLayout, threads: int) -> HostKernel | None:
        """The kernel for experts like ``prototype`` (transformers' module, no weights needed) in ``layout``.

        ``threads`` is how many cores compute, the caller's among them. None when this machine, family or format is
        not served, with the reason in the log: ``ExpertMath`` does it then. Raises ConfigError when the
        environment asks for an instruction set that is not here.
        """
        library = load_library()
        isa = chosen_isa(library) if library else None
        if library is None or isa is None:
            return None
        reason = reason_for_torch(prototype, layout)
        gate = None if reason else find_gate(prototype, library, isa)
        if gate is None:
            log.info("experts run in torch: %s", reason or "the native kernel does not know their gate")
            return None
        small, weights = _small_expert(layout)
        check = HostKernel(_describe(small, gate), small.nbytes, 1, library, isa)
        if not _agrees(check, ExpertMath(prototype, small), small, weights):
            log.warning("experts run in torch: the native kernel (%s) computes something else", isa.decode())
            return None
        return HostKernel(_describe(layout, gate), layout.nbytes, threads, library, isa)

    @property
    def address(self) -> int:
        """Of the library's own kernel; it lives as long as this object."""
        return self._kernel

    def run(
        self,
        x: torch.Tensor,
        top_k: int,
        arena: torch.Tensor,
        slots: NDArray[np.int64],
        rows: NDArray[np.int64],
        begins: NDArray[np.int64],
        counts: NDArray[np.int64],
        out: torch.Tensor,
    ) -> NDArray[np.float64]:
        """Job j: the expert whose record is ``arena[slots[j]]``, for ``rows[begins[j]:][:counts[j]]`` of ``out``.

        x (T, hidden) float32; arena (slots, record_bytes) uint8, aligned to 64 bytes; out (T * top_k, hidden)
        float32, whose row r is of token r // top_k. All contiguous, on the host. Rows of ``out`` that are in no job
        stay as they are; none may be in two. -> (jobs,) seconds that each took on the thread that did it.

        The GIL is free meanwhile. Calls from several threads take turns.
        """
        tokens, jobs = x.shape[0], slots.shape[0]
        assert x.dtype == out.dtype == torch.float32 and x.is_contiguous() and out.is_contiguous()
        assert x.shape[1] == self._hidden and out.shape == (tokens * top_k, self._hidden)
        assert arena.shape[1] == self._record_bytes and arena.is_contiguous() and arena.data_ptr() % 64 == 0
        assert begins.shape == counts.shape == (jobs,)
        seconds = torch.empty(jobs, dtype=torch.float64)
        failed = self._run(
            self._kernel,
            x.data_ptr(),
            tokens,
            top_k,
            arena.data_ptr(),
            self._record_bytes,
            jobs,
            _address(slots),
            _address(rows),
            _address(begins),
            _address(counts),
            out.data_ptr(),
            seconds.data_ptr(),
        )
        if failed:
            raise MemoryError("no memory for the activations of a pass")
        return seconds.numpy()

    def run_share(
        self,
        x: torch.Tensor,
        groups: Groups,
        arena: torch.Tensor,
        slots: NDArray[np.int64],
        ids: NDArray[np.int64],
        first_id: int,
        out: torch.Tensor,
    ) -> NDArray[np.float64]:
        """``run`` for experts ``ids`` (jobs,) of a layer whose expert 0 has ``first_id``, and whose tokens
        ``groups`` has. -> (jobs,) what each added to the time that all took together.

        What ``run`` checks is the caller's to see to: every layer asks this.
        """
        jobs = slots.size
        seconds = np.empty(jobs)
        failed = self._run_share(
            self._kernel,
            x.data_ptr(),
            groups.tokens,
            groups.top_k,
            arena.data_ptr(),
            self._record_bytes,
            jobs,
            address(slots),
            address(ids),
            first_id,
            groups.experts,
            groups.address,
            out.data_ptr(),
            address(seconds),
        )
        if failed:
            raise MemoryError("no memory for the activations of a pass")
        return seconds

    def join(
        self, x: torch.Tensor, weights: torch.Tensor, top_k: int, into: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x (T * k, hidden), weights (T, k), both float32 and contiguous -> (T, hidden), weighted sums; ``into`` is
        that if it is float32 and contiguous too."""
        hidden = self._hidden
        tokens = weights.numel() // top_k
        if into is None or into.dtype is not torch.float32 or not into.is_contiguous():
            into = torch.empty(tokens, hidden)
        assert into.numel() == tokens * hidden and x.numel() == tokens * top_k * hidden
        assert weights.dtype is torch.float32 and weights.is_contiguous()
        self._join(x.data_ptr(), weights.data_ptr(), tokens, top_k, hidden, into.data_ptr())
        return into


def _address(array: NDArray[np.int64]) -> int:
    assert array.dtype == np.int64 and array.flags.c_contiguous
    return torch.from_numpy(array).data_ptr()  # several times as fast as numpy's own ways


def _describe(layout: RecordLayout, gate: Gate) -> Expert:
    tensors = {tensor.name: tensor for tensor in layout.tensors}
    up = "gate_up_proj" if gate.has_gate else "up_proj"
    return Expert(_matrix(tensors, up), _matrix(tensors, "down_proj"), gate)


def _matrix(tensors: dict[str, TensorLayout], name: str) -> Matrix:
    values = tensors[name]
    offsets = {block.name: block.offset for block in values.blocks}
    matrix = Matrix(*values.shape, scales=-1, minima=-1, row_scales=-1, bias=-1)
    matrix.format = FORMATS.index(values.format)
    matrix.values = values.blocks[0].offset
    matrix.scales, matrix.minima = offsets.get("scales", -1), offsets.get("minima", -1)
    matrix.row_scales = offsets.get("row_scales", -1)
    bias = tensors.get(f"{name}_bias")
    if bias is not None:
        matrix.bias, matrix.bias_format = bias.blocks[0].offset, FORMATS.index(bias.format)
    return matrix


def _small_expert(layout: RecordLayout) -> tuple[RecordLayout, dict[str, torch.Tensor]]:
    """An expert of the same kind, and random weights for it that drive its gate into its bounds."""
    hidden, width = _SMALL
    down = next(tensor for tensor in layout.tensors if tensor.name == "down_proj")
    generator = torch.Generator().manual_seed(0)
    tensors, weights = [], {}
    for tensor in layout.tensors:
        rows = hidden if tensor.name.startswith("down") else width * (tensor.shape[0] // down.shape[1])
        columns = [hidden if rows != hidden else width] if len(tensor.shape) == 2 else []
        dtype = FLOATS.get(tensor.format, torch.float32)
        tensors.append(ExpertTensor(tensor.name, (rows, *columns), dtype, False))
        spread = 4.0 / columns[0] ** 0.5 if columns else 1.0
        weights[tensor.name] = (spread * torch.randn(rows, *columns, generator=generator)).to(dtype)
    small = stored_layout(tensors) if down.format in FLOATS else packed_layout(tensors, down.format)
    return small, weights


def _agrees(
    kernel: HostKernel, math: ExpertMath, layout: RecordLayout, weights: dict[str, torch.Tensor]
) -> bool:
    record = torch.zeros(layout.nbytes + 64, dtype=torch.uint8)
    record = record[-record.data_ptr() % 64 :][: layout.nbytes]
    layout.encode(weights, record)
    tokens = 5  # more than are computed at once, and one left over
    x = torch.randn(tokens, _SMALL[0], generator=torch.Generator().manual_seed(1))
    out = torch.empty_like(x)
    one: Any = np.zeros(1, np.int64)
    kernel.run(x, 1, record[None], one, np.arange(tokens), one, np.full(1, tokens), out)
    expected = math(x, record, None)
    coarse = any(tensor.format == "int4" for tensor in layout.tensors)
    return bool((out - expected).norm() <= (_COARSE if coarse else _TOLERANCE) * expected.norm())
