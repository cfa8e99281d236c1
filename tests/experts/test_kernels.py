"""The native kernel against float64, on every instruction set that this machine has."""

from __future__ import annotations

import ctypes
import logging
import math
import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moespac.errors import ConfigError
from moespac.experts.compute import ExpertMath
from moespac.experts.format import FLOATS, Block, RecordLayout, align, packed_layout, stored_layout
from moespac.experts.groups import Groups
from moespac.experts.kernels import host
from moespac.experts.kernels.host import HostKernel
from moespac.experts.kernels.library import VARIABLE, load_library
from moespac.model.index import ExpertTensor

FORMATS = ("f32", "bf16", "f16", "int8", "int4")
# Of the output's norm. Floats: float32's rounding of sums. int8: that of activations to 16 bits. int4:
# what a sum in float32 makes of an activation between two of 8 bits; ``expected_here`` rounds as the kernel does.
TOLERANCES = {"f32": 2e-6, "bf16": 2e-6, "f16": 2e-6, "int8": 2e-4, "int4": 2e-3}
SWIGLU = dict(has_gate=True, is_concatenated=True, has_bias=False)


def isas() -> list[str]:
    library = load_library()
    assert library is not None, "this machine has no C compiler: nothing here can be tested"
    names = ("portable", "avx2", "avx512", "neon")
    return [name for name in names if library.moespac_isa(name.encode())]


@pytest.fixture(params=isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(VARIABLE, request.param)
    return request.param


def silu_gate(up: torch.Tensor) -> torch.Tensor:
    gate, up = up.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def prototype(**flags: object) -> nn.Module:
    """What transformers' experts modules show: SwiGLU unless said otherwise."""
    return SimpleNamespace(**(SWIGLU | dict(act_fn=nn.functional.silu, _apply_gate=silu_gate) | flags))  # type: ignore[return-value]


@dataclass
class Experts:
    """Some random experts in an arena, and what they are."""

    layout: RecordLayout
    arena: torch.Tensor  # (slots, nbytes)
    module: nn.Module

    def expected(self, slot: int, x: torch.Tensor) -> torch.Tensor:
        """In float64, from the weights as decoded."""
        return self._compute(self.module, slot, x.double())

    def expected_here(self, slot: int, x: torch.Tensor) -> torch.Tensor:
        """The same of activations rounded to 8 bits, where weights are int4."""
        if any(tensor.format == "int4" for tensor in self.layout.tensors):
            return self._compute(rounding(self.module), slot, round_to_8_bits(x.double()))
        return self.expected(slot, x)

    def _compute(self, module: nn.Module, slot: int, x: torch.Tensor) -> torch.Tensor:
        layout, record = self.layout, self.arena[slot]
        weights = {name: w.double() for name, w in layout.weights(record, torch.float32).items()}
        double = SimpleNamespace(weights=lambda record, dtype: weights)
        return ExpertMath(module, double)(x, record, None)  # type: ignore[arg-type]


def round_to_8_bits(x: torch.Tensor) -> torch.Tensor:
    """Each 32 under a scale of their own."""
    groups = nn.functional.pad(x, (0, -x.shape[1] % 32)).view(x.shape[0], -1, 32)
    scales = (groups.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-300)
    return ((groups / scales).round() * scales).flatten(1)[:, : x.shape[1]]


def rounding(module: nn.Module) -> nn.Module:
    """The same, its inner activations rounded."""
    inner = module._apply_gate if module.has_gate else module.act_fn
    name = "_apply_gate" if module.has_gate else "act_fn"
    return SimpleNamespace(has_gate=module.has_gate, **{name: lambda up: round_to_8_bits(inner(up))})  # type: ignore[return-value]


def make_experts(
    hidden: int,
    width: int,
    format: str,
    slots: int = 1,
    module: nn.Module | None = None,
    seed: int = 0,
) -> Experts:
    module = module or prototype()
    rows = {"gate_up_proj": 2 * width} if module.has_gate else {"up_proj": width}
    up = next(iter(rows))
    shapes = {
        up: (rows[up], hidden),
        f"{up}_bias": (rows[up],),
        "down_proj": (hidden, width),
        "down_proj_bias": (hidden,),
    }
    if not module.has_bias:
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith("bias")}
    tensors = [
        ExpertTensor(name, shape, FLOATS.get(format, torch.bfloat16), False) for name, shape in shapes.items()
    ]
    layout = stored_layout(tensors) if format == "f16" else packed_layout(tensors, format)
    arena = torch.frombuffer(mmap.mmap(-1, slots * layout.nbytes), dtype=torch.uint8).view(slots, -1)
    generator = torch.Generator().manual_seed(seed)
    for record in arena:
        weights = {n: torch.randn(s, generator=generator) * 2 / s[-1] ** 0.5 for n, s in shapes.items()}
        layout.encode(weights, record)
    return Experts(layout, arena, module)


def run(
    experts: Experts, x: torch.Tensor, routing: list[list[int]] | None = None, threads: int = 1
) -> torch.Tensor:
    """x (T, hidden), routing (T, k) slots (none: all to slot 0) -> (T * k, hidden)."""
    kernel = HostKernel.build(experts.module, experts.layout, threads)
    assert kernel is not None
    return run_with(kernel, experts, x, routing)


def run_with(
    kernel: HostKernel, experts: Experts, x: torch.Tensor, routing: list[list[int]] | None = None
) -> torch.Tensor:
    flat = np.array(routing if routing else [[0]] * len(x)).reshape(-1)
    slots, counts = np.unique(flat, return_counts=True)
    out = torch.full((len(flat), x.shape[1]), math.nan)
    begins = np.cumsum(counts) - counts
    seconds = kernel.run(
        x, len(flat) // len(x), experts.arena, slots, np.argsort(flat, kind="stable"), begins, counts, out
    )
    assert seconds.shape == slots.shape and (seconds > 0).all() and (seconds < 10).all()
    return out


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


# ---- numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("hidden", "width"), [(192, 64), (512, 288), (33, 17), (300, 75), (1, 1), (7, 259)])
def test_agrees_with_float64(isa: str, format: str, hidden: int, width: int) -> None:
    experts = make_experts(hidden, width, format)
    kernel = HostKernel.build(experts.module, experts.layout, 1)
    assert kernel is not None and kernel.isa == isa
    for tokens in range(1, 18):
        x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(tokens))
        assert error(run_with(kernel, experts, x), experts.expected_here(0, x)) < TOLERANCES[format]


@settings(max_examples=25)
@given(
    st.integers(1, 700), st.integers(1, 300), st.sampled_from(FORMATS), st.integers(1, 40), st.integers(0, 99)
)
def test_agrees_with_float64_for_any_shape(
    hidden: int, width: int, format: str, tokens: int, seed: int
) -> None:
    experts = make_experts(hidden, width, format, seed=seed)
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed))
    cancelled = 10 if min(hidden, width) < 32 else 1  # a few terms may, to a tenth: their errors do not
    assert error(run(experts, x), experts.expected_here(0, x)) < cancelled * TOLERANCES[format]


@pytest.mark.parametrize("format", FORMATS)
def test_bears_outliers(isa: str, format: str) -> None:
    """One input a thousand times the others, as some models have: its 256 inputs lose bits, the others none."""
    experts = make_experts(1024, 256, format)
    x = torch.randn(3, 1024, generator=torch.Generator().manual_seed(0))
    small = x.clone()
    x[1, 700] = 1000.0
    assert error(run(experts, x), experts.expected_here(0, x)) < 2 * TOLERANCES[format]
    assert torch.equal(run(experts, x)[0], run(experts, small)[0])
    # What the outlier leaves of the others: take it back with a weight of zero.
    weights = experts.layout.weights(experts.arena[0], torch.float32)
    weights = {name: weight.clone() for name, weight in weights.items()}
    weights["gate_up_proj"][:, 700] = 0.0
    experts.layout.encode(weights, experts.arena[0])
    if format not in ("int4",):  # whose group of weights changes with the zero
        assert error(run(experts, x)[1:2], experts.expected_here(0, x[1:2])) < 0.01


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("scale", [0.0, 1e-35, 1e-20, 1e10])
def test_any_size_of_input(isa: str, format: str, scale: float) -> None:
    module = prototype(has_gate=False, act_fn=nn.functional.relu)  # what SwiGLU squares leaves float32
    experts = make_experts(96, 64, format, module=module)
    x = scale * torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    found, expected = run(experts, x), experts.expected_here(0, x)
    assert (found.double() - expected).norm() <= TOLERANCES[format] * expected.norm() + 1e-30


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_token_stays_broken_and_alone(isa: str, format: str, bad: float) -> None:
    experts = make_experts(96, 64, format)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    healthy = run(experts, x)
    x[1, 5] = bad
    found = run(experts, x)
    assert not torch.isfinite(found[1]).any()
    assert torch.equal(found[[0, 2]], healthy[[0, 2]])


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_the_largest_weights_and_activations_do_not_overflow(isa: str, format: str) -> None:
    """Every weight and activation at its end of the integers, and all of one sign."""
    module = prototype(has_gate=False, act_fn=nn.functional.relu)
    experts = make_experts(1024, 512, format, module=module)
    fill = {"values": 127, "nibbles": 0xFF, "scales": 255, "minima": 127}
    for tensor in experts.layout.tensors:
        for block in tensor.blocks:
            value = 1e-3 if block.dtype == "f32" else fill[block.name]
            block.view(experts.arena[0]).fill_(value)
    x = torch.ones(3, 1024)
    assert error(run(experts, x), experts.expected_here(0, x)) < TOLERANCES[format]


# ---- the same bits, whatever is computed beside ----------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("hidden", "width"), [(300, 75), (1100, 5)]
)  # more columns than many tokens take at once
def test_a_token_does_not_depend_on_those_beside_it(isa: str, format: str, hidden: int, width: int) -> None:
    experts = make_experts(hidden, width, format)
    kernel = HostKernel.build(experts.module, experts.layout, 1)
    assert kernel is not None
    x = torch.randn(70, hidden, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([run_with(kernel, experts, token[None]) for token in x])
    for tokens in (*range(2, 18), 32, 33, 70):
        assert torch.equal(run_with(kernel, experts, x[:tokens].contiguous()), alone[:tokens])


@pytest.mark.parametrize("format", ["f32", "int8", "int4"])
def test_outputs_do_not_depend_on_threads_or_other_experts(isa: str, format: str) -> None:
    experts = make_experts(96, 40, format, slots=7)
    x = torch.randn(90, 96, generator=torch.Generator().manual_seed(0))
    routing = np.random.default_rng(0).permuted(np.tile(np.arange(7), (90, 1)), axis=1)[:, :3]
    routing[:50, 0] = 6  # more of one expert than are computed at once ...
    routing[:50, 1:] = routing[:50, 1:] % 6
    expected = run(experts, x, routing.tolist())
    for threads in (2, 3, 16):
        kernel = HostKernel.build(experts.module, experts.layout, threads)
        assert kernel is not None
        for _ in range(20):
            assert torch.equal(run_with(kernel, experts, x, routing.tolist()), expected)
    for token in (0, 60):
        for choice in range(3):
            slot = int(routing[token, choice])
            alone = run(experts, x[token : token + 1], [[slot]])
            assert torch.equal(alone[0], expected[3 * token + choice])
            assert error(alone, experts.expected_here(slot, x[token : token + 1])) < TOLERANCES[format]


def test_rows_without_a_job_are_left_alone(isa: str) -> None:
    experts = make_experts(32, 16, "int8", slots=2)
    kernel = HostKernel.build(experts.module, experts.layout, 2)
    assert kernel is not None
    x, out = torch.randn(3, 32), torch.full((6, 32), 5.0)
    rows = np.array([9, 1, 4, 2])  # the first is nobody's
    seconds = kernel.run(x, 2, experts.arena, np.array([1, 0]), rows, np.array([1, 3]), np.array([2, 1]), out)
    assert seconds.shape == (2,)
    assert (out[[0, 3, 5]] == 5.0).all() and (out[[1, 2, 4]] != 5.0).all()
    assert error(out[[1, 4]], experts.expected_here(1, x[[0, 2]])) < TOLERANCES["int8"]
    empty = np.zeros(0, np.int64)
    assert kernel.run(x, 2, experts.arena, empty, rows, empty, empty, out).shape == (0,)


def test_a_layers_share_is_what_its_jobs_are(isa: str) -> None:
    """By flat ids and the layer's tokens by expert; and the join writes where it is told to."""
    experts = make_experts(96, 64, "int8", slots=4)
    kernel = HostKernel.build(experts.module, experts.layout, threads=2)
    assert kernel is not None
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    routing = np.array([[4, 1], [1, 2], [4, 0]])
    groups = Groups.of(routing, 5)
    slots, first_id = np.array([3, 0]), 10
    expected, found = torch.zeros(6, 96), torch.zeros(6, 96)
    mine = np.array([4, 1])
    begins, counts = groups.begins[mine], groups.counts[mine]
    kernel.run(x, 2, experts.arena, slots, groups.order, begins, counts, expected)
    seconds = kernel.run_share(x, groups, experts.arena, slots, first_id + mine, first_id, found)
    assert torch.equal(found, expected) and found.any(dim=1).tolist() == [
        True,
        True,
        True,
        False,
        True,
        False,
    ]
    assert seconds.shape == (2,) and (seconds > 0).all() and (seconds < 10).all()
    weights, place = torch.rand(3, 2, generator=torch.Generator().manual_seed(1)), torch.zeros(3, 96)
    assert kernel.join(found, weights, 2, place) is place
    assert torch.equal(place, kernel.join(found, weights, 2))
    other = torch.zeros(3, 96, dtype=torch.bfloat16)
    assert kernel.join(found, weights, 2, other) is not other and not other.any()


def test_calls_from_several_threads_take_turns(isa: str) -> None:
    experts = make_experts(64, 32, "int4", slots=4)
    kernel = HostKernel.build(experts.module, experts.layout, 2)
    assert kernel is not None
    inputs = [torch.randn(n, 64, generator=torch.Generator().manual_seed(n)) for n in (1, 3, 40)]
    routing = [[[t % 4] for t in range(len(x))] for x in inputs]
    expected = [run_with(kernel, experts, x, r) for x, r in zip(inputs, routing, strict=True)]

    def work(i: int) -> bool:
        return torch.equal(run_with(kernel, experts, inputs[i % 3], routing[i % 3]), expected[i % 3])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(300)))


def test_a_forked_child_computes_too() -> None:
    experts = make_experts(64, 32, "int8", slots=4)
    kernel = HostKernel.build(experts.module, experts.layout, 3)
    assert kernel is not None
    x, routing = torch.ones(4, 64), [[0], [1], [2], [3]]
    expected = run_with(kernel, experts, x, routing)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(run_with(kernel, experts, x, routing), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(run_with(kernel, experts, x, routing), expected)


def test_idle_threads_sleep_and_end_with_their_kernel() -> None:
    experts = make_experts(64, 32, "int8", slots=8)
    before = len(os.listdir("/proc/self/task"))
    kernel = HostKernel.build(experts.module, experts.layout, 5)
    assert kernel is not None
    run_with(kernel, experts, torch.ones(8, 64), [[i] for i in range(8)])
    assert len(os.listdir("/proc/self/task")) == before + 4
    start = os.times()
    ctypes.CDLL(None).usleep(300_000)
    assert os.times().user + os.times().system - start.user - start.system < 0.1
    del kernel
    assert len(os.listdir("/proc/self/task")) == before


# ---- memory ----------------------------------------------------------------------------------------------------


def with_last(layout: RecordLayout, last: Block) -> tuple[RecordLayout, int]:
    """``layout`` with one block moved behind all others; -> the bytes in use, too."""
    end = max(block.offset + block.nbytes for tensor in layout.tensors for block in tensor.blocks)
    moved = replace(last, offset=align(end, 64))
    tensors = tuple(
        replace(tensor, blocks=tuple(moved if block is last else block for block in tensor.blocks))
        for tensor in layout.tensors
    )
    used = moved.offset + moved.nbytes
    return RecordLayout(tensors, align(used, 4096)), used


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("hidden", "width"), [(33, 17), (192, 64), (35, 24)])
def test_reads_nothing_outside_the_record(isa: str, format: str, hidden: int, width: int) -> None:
    """Each block in turn ends before a page that may not be read: one byte more is a crash."""
    module = prototype(has_bias=True)
    layout = make_experts(hidden, width, format, module=module).layout
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    x = torch.randn(3, hidden, generator=torch.Generator().manual_seed(0))
    for last in [block for tensor in layout.tensors for block in tensor.blocks]:
        moved, used = with_last(layout, last)
        experts = Experts(moved, torch.zeros(1, moved.nbytes, dtype=torch.uint8), module)
        moved.encode(random_weights(moved), experts.arena[0])
        kernel = HostKernel.build(module, moved, 1)
        assert kernel is not None
        memory = torch.frombuffer(mmap.mmap(-1, moved.nbytes + mmap.PAGESIZE), dtype=torch.uint8)
        record = memory[moved.nbytes - used : moved.nbytes]
        record.copy_(experts.arena[0, :used])
        guard = ctypes.c_void_p(memory.data_ptr() + moved.nbytes)
        assert protect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        out = torch.empty(3, hidden)
        zero, rows, counts = torch.zeros(1, dtype=torch.int64), torch.arange(3), torch.full((1,), 3)
        seconds = torch.empty(1, dtype=torch.float64)
        # Not through run(), which asks for an aligned record: a kernel's loads need none.
        failed = kernel._run(
            *(kernel._kernel, x.data_ptr(), 3, 1, record.data_ptr(), 0, 1, zero.data_ptr(), rows.data_ptr()),
            *(zero.data_ptr(), counts.data_ptr(), out.data_ptr(), seconds.data_ptr()),
        )
        protect(guard, ctypes.c_size_t(mmap.PAGESIZE), 3)
        assert failed == 0 and error(out, experts.expected_here(0, x)) < TOLERANCES[format], last.name


def random_weights(layout: RecordLayout) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        t.name: torch.randn(t.shape, generator=generator) * 2 / t.shape[-1] ** 0.5 for t in layout.tensors
    }


# ---- families --------------------------------------------------------------------------------------------------


def family_experts(family: str, format: str) -> Experts:
    from tests.families import build_model

    module = next(m for m in build_model(family).modules() if hasattr(m, "is_transposed"))
    hidden, width = (module.down_proj.shape[1:])[:: 1 if not module.is_transposed else -1]
    return make_experts(hidden, width, format, module=module)


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "nemotron_h", "granitemoe"]
)
@pytest.mark.parametrize("format", ["f32", "int4"])
def test_families(family: str, format: str) -> None:
    experts = family_experts(family, format)
    x = 3 * torch.randn(5, experts.layout.tensors[0].shape[1], generator=torch.Generator().manual_seed(0))
    assert error(run(experts, x), experts.expected_here(0, x)) < TOLERANCES[format]


def clamped(up: torch.Tensor) -> torch.Tensor:
    gate, up = up.chunk(2, dim=-1)
    return nn.functional.silu(gate.clamp(max=10.0)) * up.clamp(-10.0, 10.0)


GATES = {
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": nn.functional.relu,
    "relu2": lambda x: nn.functional.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@pytest.mark.parametrize("name", [*GATES, "clamped"])
@pytest.mark.parametrize("has_gate", [True, False])
def test_gates(isa: str, name: str, has_gate: bool) -> None:
    module = prototype(has_gate=has_gate, limit=10.0, _apply_gate=clamped)
    if name != "clamped":
        act_fn = GATES[name]
        module.act_fn = act_fn
        module._apply_gate = lambda up: act_fn(up.chunk(2, dim=-1)[0]) * up.chunk(2, dim=-1)[1]
    experts = make_experts(64, 48, "f32", module=module)
    x = 8 * torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert error(run(experts, x), experts.expected_here(0, x)) < TOLERANCES["f32"]


# ---- what is not served ----------------------------------------------------------------------------------------


def build_reason(caplog: pytest.LogCaptureFixture, module: nn.Module, layout: RecordLayout) -> str:
    with caplog.at_level(logging.INFO, logger="moespac"):
        assert HostKernel.build(module, layout, 1) is None
    return caplog.text


def test_an_unknown_gate_is_left_to_torch(caplog: pytest.LogCaptureFixture) -> None:
    module = prototype(_apply_gate=lambda up: torch.sin(silu_gate(up)))
    layout = make_experts(32, 16, "f32").layout
    assert "does not know their gate" in build_reason(caplog, module, layout)


def test_transposed_and_normalised_experts_are_left_to_torch(caplog: pytest.LogCaptureFixture) -> None:
    tensors = [ExpertTensor("gate_up_proj", (32, 32), torch.float32, True)]
    tensors.append(ExpertTensor("down_proj", (16, 32), torch.float32, True))
    assert "transposed" in build_reason(caplog, prototype(), stored_layout(tensors))
    layout = make_experts(32, 16, "f32").layout
    assert "normalise" in build_reason(caplog, prototype(has_post_expert_norm=True), layout)


def test_a_kernel_that_computes_something_else_is_not_used(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Halved(ExpertMath):
        def __call__(self, *arguments: object) -> torch.Tensor:
            return 0.5 * super().__call__(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(host, "ExpertMath", Halved)
    assert "computes something else" in build_reason(caplog, prototype(), make_experts(32, 16, "f32").layout)


def test_the_variable_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = make_experts(32, 16, "f32").layout
    monkeypatch.setenv(VARIABLE, "torch")
    assert HostKernel.build(prototype(), layout, 1) is None
    monkeypatch.setenv(VARIABLE, "mmx")
    with pytest.raises(
        ConfigError, match=r"MOESPAC_KERNEL=mmx: not on this machine; give \w+, portable or torch"
    ):
        HostKernel.build(prototype(), layout, 1)
    monkeypatch.delenv(VARIABLE)
    kernel = HostKernel.build(prototype(), layout, 1)
    assert kernel is not None and (
        kernel.isa != "portable" or sys.platform != "linux" or isas() == ["portable"]
    )
