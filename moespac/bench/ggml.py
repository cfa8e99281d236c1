"""llama.cpp's arithmetic as a contender: MUL_MAT_ID of the ggml libraries that llama-cpp-python brings along."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import torch

from moespac.experts.movers import host_arena

TYPES = {
    "bf16": ("BF16", 30),
    "int8": ("Q8_0", 8),
    "int4": ("Q4_K", 12),
}  # by our format; numbers from ggml.h
_F32, _I32 = 0, 26
_MULTIPLE = {"bf16": 1, "int8": 32, "int4": 256}  # of which rows must be
_SLACK = 1 << 20  # bytes for the graph and the headers of tensors


class _InitParams(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class _Plan(ctypes.Structure):
    """``ggml_cplan``: the fields that we set, and room for those that come after them."""

    _fields_ = [("work_size", ctypes.c_size_t), ("work_data", ctypes.c_void_p), ("rest", ctypes.c_char * 240)]


class Ggml:
    """The loaded libraries. Raises ImportError when there are none, OSError when they cannot be loaded."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise ImportError("llama-cpp-python is not installed")
        directory = Path(spec.origin).parent / "lib"
        self._base = ctypes.CDLL(str(directory / "libggml-base.so"), ctypes.RTLD_GLOBAL)
        self._cpu = ctypes.CDLL(str(directory / "libggml-cpu.so"), ctypes.RTLD_GLOBAL)
        self._cpu.ggml_cpu_init()
        base, pointer, number = self._base, ctypes.c_void_p, ctypes.c_int64
        signatures = {
            "ggml_init": [_InitParams],
            "ggml_new_tensor_3d": [pointer, ctypes.c_int, number, number, number],
            "ggml_get_data": [pointer],
            "ggml_mul_mat_id": [pointer] * 4,
            "ggml_swiglu": [pointer] * 2,
            "ggml_new_graph": [pointer],
            "ggml_build_forward_expand": [pointer] * 2,
            "ggml_free": [pointer],
        }
        for name, arguments in signatures.items():
            function = getattr(base, name)
            function.argtypes, function.restype = arguments, pointer
        base.ggml_row_size.argtypes, base.ggml_row_size.restype = [ctypes.c_int, number], ctypes.c_size_t
        base.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
        base.ggml_quantize_chunk.restype = ctypes.c_size_t
        base.ggml_threadpool_params_init.argtypes = [pointer, ctypes.c_int]
        self._cpu.ggml_threadpool_new.argtypes, self._cpu.ggml_threadpool_new.restype = [pointer], pointer
        self._cpu.ggml_threadpool_free.argtypes = [pointer]
        self._cpu.ggml_graph_plan.argtypes = [pointer, ctypes.c_int, pointer]
        self._cpu.ggml_graph_plan.restype = _Plan
        self._cpu.ggml_graph_compute.argtypes = [pointer, pointer]

    def serves(self, format: str, hidden: int, width: int) -> bool:
        return format in TYPES and hidden % _MULTIPLE[format] == width % _MULTIPLE[format] == 0


class GgmlExperts:
    """``slots`` copies of one SwiGLU expert, of which ``together`` run in each call."""

    def __init__(
        self,
        ggml: Ggml,
        format: str,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        slots: int,
        tokens: tuple[int, ...],
        together: int,
    ) -> None:
        """gate_up (2 * width, hidden), down (hidden, width) float32."""
        self._ggml, self._together = ggml, together
        self.name, kind = f"ggml {TYPES[format][0]}", TYPES[format][1]
        self._width = down.shape[1]
        self._hidden = down.shape[0]
        base = ggml._base
        sizes = [w.shape[0] * base.ggml_row_size(kind, w.shape[1]) for w in (gate_up, down)]
        outputs = sum(m * together * 4 * (4 * self._width + 3 * self._hidden) for m in tokens)
        total = slots * sum(sizes) + outputs + _SLACK * (1 + len(tokens))
        self._memory = host_arena(1, total)  # in huge pages, as ours are
        self._context = base.ggml_init(_InitParams(total, self._memory.data_ptr(), False))
        weights = [self._weights(kind, weight, slots) for weight in (gate_up, down)]
        params = ctypes.create_string_buffer(2048)
        base.ggml_threadpool_params_init(params, together)
        self._pool = ggml._cpu.ggml_threadpool_new(params)
        self._graphs = {m: self._graph(weights[0], weights[1], m) for m in tokens}

    def run(self, x: torch.Tensor, slots: list[int]) -> None:
        """x (M, hidden) float32 through each of the experts ``slots``."""
        graph, plan, input, ids, _ = self._graphs[x.shape[0]]
        ctypes.memmove(input, x.data_ptr(), x.nbytes)
        numbers = (ctypes.c_int32 * (len(slots) * x.shape[0]))(*slots * x.shape[0])
        ctypes.memmove(ids, numbers, ctypes.sizeof(numbers))
        self._ggml._cpu.ggml_graph_compute(graph, ctypes.byref(plan))

    def result(self, tokens: int) -> torch.Tensor:
        """(M, together, hidden) of the latest call."""
        output = self._graphs[tokens][4]
        shape = (tokens, self._together, self._hidden)
        numbers = (ctypes.c_float * (shape[0] * shape[1] * shape[2])).from_address(output)
        return torch.frombuffer(numbers, dtype=torch.float32).view(shape).clone()

    def close(self) -> None:
        self._ggml._cpu.ggml_threadpool_free(self._pool)
        self._ggml._base.ggml_free(self._context)

    def _weights(self, kind: int, weight: torch.Tensor, slots: int) -> int:
        """A tensor of ``slots`` experts, each a copy of ``weight``."""
        base = self._ggml._base
        rows, columns = weight.shape
        size = rows * base.ggml_row_size(kind, columns)
        tensor = base.ggml_new_tensor_3d(self._context, kind, columns, rows, slots)
        data = base.ggml_get_data(tensor)
        if kind == TYPES["bf16"][1]:
            half = weight.bfloat16().contiguous()
            ctypes.memmove(data, half.data_ptr(), size)
        else:
            base.ggml_quantize_chunk(kind, weight.contiguous().data_ptr(), data, 0, rows, columns, None)
        for slot in range(1, slots):
            ctypes.memmove(data + slot * size, data, size)
        return tensor

    def _graph(self, gate_up: int, down: int, tokens: int) -> tuple[int, _Plan, int, int, int]:
        """-> graph, plan, and the addresses of its input, its experts' numbers and its output."""
        base, context = self._ggml._base, self._context
        x = base.ggml_new_tensor_3d(context, _F32, self._hidden, 1, tokens)
        ids = base.ggml_new_tensor_3d(context, _I32, self._together, tokens, 1)
        inner = base.ggml_swiglu(context, base.ggml_mul_mat_id(context, gate_up, x, ids))
        out = base.ggml_mul_mat_id(context, down, inner, ids)
        graph = base.ggml_new_graph(context)
        base.ggml_build_forward_expand(graph, out)
        plan = self._ggml._cpu.ggml_graph_plan(graph, self._together, self._pool)
        plan.work = ctypes.create_string_buffer(plan.work_size + 64)  # lives as long as the plan
        plan.work_data = ctypes.addressof(plan.work)
        return graph, plan, base.ggml_get_data(x), base.ggml_get_data(ids), base.ggml_get_data(out)
