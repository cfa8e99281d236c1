"""KERNELS: one expert's feed-forward network by every kernel at hand, and the memory's own speed, in turn.

Each contender has copies of one expert, more than any cache holds, and takes the next at each call, so weights come
from memory. With N threads a call runs N experts, each contender sharing them out as it does.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moespac.bench.ggml import Ggml, GgmlExperts
from moespac.config import KernelBenchConfig
from moespac.errors import ConfigError
from moespac.experts.format import FLOATS, packed_layout
from moespac.experts.kernels.host import HostKernel
from moespac.experts.kernels.library import load_library
from moespac.experts.movers import host_arena
from moespac.model.index import ExpertTensor

Progress = Callable[[int, int], None]
Call = Callable[[torch.Tensor, list[int]], object]  # x (M, hidden), the slots of the experts to run

OURS, READ = "moespac", "read"
_INT4_GROUP = 128  # of torch's int4 product
# How far a contender's output may be from float32's on the unrounded weights, to be sure that it computes the same.
_ROUNDING = {"f32": 1e-4, "bf16": 0.03, "int8": 0.05, "int4": 0.25}


@dataclass(frozen=True)
class Timing:
    """Seconds of one expert; ``tokens`` 0 is reading the record's bytes and nothing else."""

    format: str
    contender: str
    tokens: int
    nbytes: int  # of the expert's weights in the contender's own format
    median: float
    best: float

    @property
    def bandwidth(self) -> float:
        """Bytes of weights a second."""
        return self.nbytes / self.median


@dataclass(frozen=True)
class KernelReport:
    """All timings of a run."""

    isa: str
    threads: int
    hidden: int
    width: int
    timings: tuple[Timing, ...]
    left_out: tuple[str, ...]  # contenders that are not here, with the reason

    def find(self, format: str, contender: str, tokens: int) -> Timing | None:
        wanted = (format, contender, tokens)
        return next((t for t in self.timings if (t.format, t.contender, t.tokens) == wanted), None)

    def ratio(self, format: str, peer: str, tokens: int) -> float | None:
        """How many times as fast as a peer we are, by medians; of all whose names begin so, the best counts."""
        ours = self.find(format, OURS, tokens)
        peers = [
            t.median
            for t in self.timings
            if t.format == format and t.tokens == tokens and t.contender.startswith(peer)
        ]
        return min(peers) / ours.median if ours and peers else None

    def share(self, timing: Timing) -> float | None:
        """Of the read bandwidth measured beside it."""
        read = self.find(timing.format, READ, 0)
        return timing.bandwidth / read.bandwidth if read else None

    def to_dict(self) -> dict[str, Any]:
        rows = [vars(t) | {"bandwidth": t.bandwidth, "share_of_read": self.share(t)} for t in self.timings]
        return {key: value for key, value in vars(self).items() if key != "timings"} | {"timings": rows}


@dataclass(frozen=True)
class _Contender:
    name: str
    nbytes: int
    call: Call
    result: Callable[[torch.Tensor], torch.Tensor]  # x -> what the call computes, (M, hidden)
    close: Callable[[], None] = lambda: None


def bench_kernels(
    formats: Sequence[str],
    hidden: int,
    width: int,
    threads: int,
    config: KernelBenchConfig,
    progress: Progress,
) -> KernelReport:
    """Time all contenders. Raises ConfigError for a format or a machine without a native kernel."""
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(2 * width, hidden, generator=generator) / hidden**0.5
    down = torch.randn(hidden, width, generator=generator) / width**0.5
    torch.set_num_threads(threads)
    left_out: list[str] = []
    ggml = _load_ggml(left_out)
    timings: list[Timing] = []
    isa = ""
    for number, format in enumerate(formats):
        reader, isa, ours = _ours(format, gate_up, down, threads, config)
        contenders = [ours, *_torch(format, gate_up, down, threads, config)]
        if ggml is not None and ggml.serves(format, hidden, width):
            contenders.append(_ggml(ggml, format, gate_up, down, threads, config))

        def advance(done: int, number: int = number) -> None:
            progress(number * config.rounds + done, len(formats) * config.rounds)

        _check(format, contenders, gate_up, down)
        timings += _race(format, reader, contenders, hidden, threads, config, advance)
        for contender in contenders:
            contender.close()
    return KernelReport(isa, threads, hidden, width, tuple(timings), tuple(left_out))


def _race(
    format: str,
    reader: _Contender,
    contenders: list[_Contender],
    hidden: int,
    threads: int,
    config: KernelBenchConfig,
    advance: Callable[[int], None],
) -> Iterator[Timing]:
    """All take one turn in each round, so that a busy moment of the machine falls on each alike."""
    inputs = {m: torch.randn(m, hidden) for m in config.tokens}
    entries = [(reader, 0), *((contender, m) for m in config.tokens for contender in contenders)]
    spent: dict[tuple[str, int], list[float]] = defaultdict(list)
    turns: dict[str, int] = defaultdict(int)
    for round in range(config.rounds):
        for contender, m in entries:
            slots = config.rotate_bytes // contender.nbytes + threads
            x = inputs[m] if m else inputs[config.tokens[0]]
            # Only the second counts: the first finds Python and the code out of the caches too.
            for _ in range(2):
                turn = turns[contender.name]
                turns[contender.name] = turn + threads
                chosen = [(turn + i) % slots for i in range(threads)]
                start = time.perf_counter()
                contender.call(x, chosen)
                seconds = time.perf_counter() - start
            spent[contender.name, m].append(seconds / threads)
        advance(round + 1)
    for contender, m in entries:
        samples = spent[contender.name, m][1:]  # the first touches what was never used
        yield Timing(format, contender.name, m, contender.nbytes, median(samples), min(samples))


def _check(format: str, contenders: list[_Contender], gate_up: torch.Tensor, down: torch.Tensor) -> None:
    """A contender that computes something else is no contender."""
    x = torch.randn(4, gate_up.shape[1], generator=torch.Generator().manual_seed(1))
    gate, up = F.linear(x, gate_up).chunk(2, dim=1)
    expected = F.linear(F.silu(gate) * up, down)
    for contender in contenders:
        error = (contender.result(x).float() - expected).norm() / expected.norm()
        assert error < _ROUNDING[format], f"{contender.name}, {format}: off by {error:.3f}"


def _slots(nbytes: int, threads: int, config: KernelBenchConfig) -> int:
    return config.rotate_bytes // nbytes + threads


def _ours(
    format: str, gate_up: torch.Tensor, down: torch.Tensor, threads: int, config: KernelBenchConfig
) -> tuple[_Contender, str, _Contender]:
    """-> plain reading of the records, the instruction set, the kernel."""
    hidden, width = down.shape
    with torch.device("meta"):
        prototype = Qwen3MoeExperts(
            Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=width, num_experts=1)
        )
    weights = {"gate_up_proj": gate_up, "down_proj": down}
    dtype = FLOATS.get(format, torch.bfloat16)
    layout = packed_layout(
        [ExpertTensor(n, tuple(w.shape), dtype, False) for n, w in weights.items()], format
    )
    kernel, library = HostKernel.build(prototype, layout, threads), load_library()
    if kernel is None or library is None:
        raise ConfigError("no native kernel on this machine; `moespac --verbose` says why")
    slots = _slots(layout.nbytes, threads, config)
    arena = host_arena(slots, layout.nbytes)
    layout.encode(weights, arena[0])
    arena[1:] = arena[0]

    slots_now = torch.zeros(threads, dtype=torch.int64)
    seconds = torch.zeros(threads, dtype=torch.float64)

    @functools.cache
    def job(tokens: int) -> tuple[tuple[NDArray[np.int64], ...], tuple[int, ...], torch.Tensor]:
        """rows, begins and counts of the experts' tokens, their addresses, and the output: made once, as ggml's
        graph is."""
        rows = np.arange(tokens * threads).reshape(tokens, threads).T.reshape(-1).copy()
        numbers = (rows, np.arange(threads) * tokens, np.full(threads, tokens))
        out = torch.empty(tokens * threads, hidden)
        return numbers, (*(part.ctypes.data for part in numbers), out.data_ptr()), out

    def run(x: torch.Tensor, chosen: list[int]) -> torch.Tensor:
        """By the library's own call, as ggml's graph is computed by its own: in a pass of the engine no Python is
        between, and where other programs have just used the caches it would be a third of an int4 expert."""
        _, addresses, out = job(len(x))
        slots_now.copy_(torch.tensor(chosen))
        records = (arena.data_ptr(), layout.nbytes, threads, slots_now.data_ptr())
        failed = library.moespac_kernel_run(
            kernel.address, x.data_ptr(), len(x), threads, *records, *addresses, seconds.data_ptr()
        )
        assert not failed
        return out

    isa, base = kernel.isa.encode(), arena.data_ptr()
    readers = ThreadPoolExecutor(threads)

    def read(slot: int) -> int:
        return library.moespac_read(isa, ctypes.c_void_p(base + slot * layout.nbytes), layout.nbytes)

    def read_all(x: torch.Tensor, chosen: list[int]) -> None:
        if threads == 1:
            read(chosen[0])
        else:
            list(readers.map(read, chosen))

    def first(x: torch.Tensor) -> torch.Tensor:
        return run(x, list(range(threads)))[::threads]

    reader = _Contender(READ, layout.nbytes, read_all, first, readers.shutdown)
    return reader, kernel.isa, _Contender(OURS, layout.nbytes, run, first)


def _torch(
    format: str, gate_up: torch.Tensor, down: torch.Tensor, threads: int, config: KernelBenchConfig
) -> list[_Contender]:
    """What torch has for the format; several where it has several."""
    makers = {
        "f32": [_float_linear(torch.float32)],
        "bf16": [_float_linear(torch.bfloat16), _float_linear(torch.float32)],
        "int8": [_int8_product],
        "int4": [_int4_product],
    }
    found = []
    for make in makers[format]:
        name, dtype, packed, product = make(gate_up, down)
        nbytes = sum(part.nbytes for matrix in packed for part in matrix)
        slots = [
            [[part.clone() for part in matrix] for matrix in packed]
            for _ in range(_slots(nbytes, threads, config))
        ]
        found.append(_torch_contender(name, nbytes, dtype, slots, product))
    return found


def _torch_contender(
    name: str, nbytes: int, dtype: torch.dtype, slots: list[Any], product: Any
) -> _Contender:
    @torch.no_grad()
    def expert(x: torch.Tensor, slot: int) -> torch.Tensor:
        up, down = slots[slot]
        gate, up = product(x.to(dtype), *up).chunk(2, dim=1)
        return product(F.silu(gate) * up, *down)

    return _Contender(
        name, nbytes, lambda x, chosen: [expert(x, slot) for slot in chosen], lambda x: expert(x, 0)
    )


def _float_linear(dtype: torch.dtype) -> Callable[..., Any]:
    name = {torch.float32: "torch fp32", torch.bfloat16: "torch bf16"}[dtype]
    return lambda *weights: (name, dtype, [[w.to(dtype)] for w in weights], F.linear)


def _int8_product(*weights: torch.Tensor) -> Any:
    packed = []
    for weight in weights:
        scales = weight.abs().amax(dim=1) / 127
        values = (weight / scales[:, None]).round().to(torch.int8)
        packed.append([values, scales.bfloat16()])
    return "torch int8pack", torch.bfloat16, packed, torch._weight_int8pack_mm


def _int4_product(*weights: torch.Tensor) -> Any:
    packed = []
    for weight in weights:
        rows, columns = weight.shape
        grouped = weight.view(rows, columns // _INT4_GROUP, _INT4_GROUP)
        low, high = grouped.aminmax(dim=2)
        scales = (high - low) / 15
        q = ((grouped - low[..., None]) / scales[..., None]).round().clamp(0, 15).to(torch.int32)
        zeros = low + 8 * scales  # what q = 8 stands for
        scales_zeros = torch.stack((scales, zeros), dim=2).transpose(0, 1).contiguous().bfloat16()
        values = torch._convert_weight_to_int4pack_for_cpu(q.view(rows, columns), 1)
        packed.append([values, scales_zeros])

    def product(x: torch.Tensor, values: torch.Tensor, scales_zeros: torch.Tensor) -> torch.Tensor:
        return torch._weight_int4pack_mm_for_cpu(x, values, _INT4_GROUP, scales_zeros)

    return "torch int4pack", torch.bfloat16, packed, product


def _load_ggml(left_out: list[str]) -> Ggml | None:
    try:
        return Ggml()
    except (ImportError, OSError, AttributeError) as error:  # another version may lack a function
        left_out.append(f"ggml: {error}; pip install 'moespac[bench]' brings it")
        return None


def _ggml(
    ggml: Ggml,
    format: str,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    threads: int,
    config: KernelBenchConfig,
) -> _Contender:
    bits = {"bf16": 16, "int8": 8.5, "int4": 4.5}[format]
    nbytes = int((gate_up.numel() + down.numel()) * bits / 8)
    slots = _slots(nbytes, threads, config)
    experts = GgmlExperts(ggml, format, gate_up, down, slots, config.tokens, threads)

    def result(x: torch.Tensor) -> torch.Tensor:
        experts.run(x, list(range(threads)))
        return experts.result(len(x))[:, 0]

    return _Contender(experts.name, nbytes, experts.run, result, experts.close)
