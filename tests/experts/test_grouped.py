"""The accelerator's kernels against float64: on a card where there is one, else in Triton's interpreter.

That they compile for cards is shown in ``test_grouped_compiled``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import moespac
from moespac.experts.compute import ExpertMath
from moespac.experts.format import stored_layout
from moespac.experts.grouped import GroupedExperts
from moespac.experts.grouped import experts as grouped_module
from moespac.experts.grouped.jobs import NOBODY, make_jobs, make_jobs_in_python
from moespac.experts.grouped.staging import Staging
from moespac.model.index import ExpertTensor
from moespac.speculate.drafters import PromptLookupDrafter
from tests.experts.grouped_experts import (
    DEVICE,
    KERNELS,
    Routed,
    few_programs,
    forget_kernels,
    grouped,
    interpret,
    run,
    staircase,
    worst_error,
)
from tests.experts.test_kernels import FORMATS, GATES, clamped, error, family_experts, make_experts, prototype
from tests.families import reference_tokens, save_checkpoint

pytest.importorskip("triton", reason="Triton is not installed (it is in the dev extra)")

TOLERANCE = 1e-6  # of the norm: float32's rounding of sums, whatever the format


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    yield from interpret()


@pytest.fixture(autouse=True)
def large_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    few_programs(monkeypatch)


def tokens(count: int, hidden: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed))


# ---- numbers ---------------------------------------------------------------------------------------------------


ALL_COUNTS, SOME_COUNTS = tuple(range(1, 18)), (1, 2, 3, 4, 5, 8, 15)  # the interpreter takes its time


@pytest.mark.parametrize(
    ("format", "counts"),
    [
        ("int8", ALL_COUNTS),
        ("int4", (1, 2, 3, 4, 5, 17)),
        ("bf16", SOME_COUNTS),
        ("f16", (1, 17)),
        ("f32", (3, 16)),
    ],
)
def test_windows_agree_with_float64(format: str, counts: tuple[int, ...]) -> None:
    """Experts with so many tokens each in one launch, biases, and sizes that fill neither groups nor programs."""
    experts = make_experts(40, 24, format, slots=len(counts), module=prototype(has_bias=True))
    x, routing = tokens(max(counts), 40), staircase(counts)
    found = run(grouped(experts), experts, x, routing)
    assert worst_error(found, experts, x, routing) < TOLERANCE


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("x_type", [torch.bfloat16, torch.float16])
def test_trunks_of_16_bits_lose_nothing_in_windows(format: str, x_type: torch.dtype) -> None:
    experts = make_experts(64, 32, format)
    x = tokens(3, 64).to(x_type)
    assert worst_error(run(grouped(experts, x_type), experts, x), experts, x, [[0]] * 3) < TOLERANCE


@pytest.mark.parametrize("format", FORMATS)
def test_programs_of_the_sizes_that_a_card_gets(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between them, rows that fill all lanes of a warp, or 16, or 8, or not even those."""
    monkeypatch.undo()
    experts = make_experts(256, 32, format)
    x = tokens(1, 256)
    assert worst_error(run(grouped(experts), experts, x), experts, x, [[0]]) < TOLERANCE


@pytest.mark.parametrize("format", FORMATS)
def test_prompts_agree_with_float64(format: str) -> None:
    """More tokens than a window has. One expert has more than a program takes, one has one."""
    experts = make_experts(72, 40, format, slots=3, module=prototype(has_bias=True))
    x = tokens(70, 72)
    routing = [[0, 1 if token < 33 else -1, 2 if token == 50 else -1] for token in range(70)]
    found = run(grouped(experts), experts, x, routing)
    assert worst_error(found, experts, x, routing) < TOLERANCE


@pytest.mark.parametrize("format", FORMATS)
def test_prompts_of_a_16_bit_trunk_round_to_its_type(format: str) -> None:
    experts = make_experts(64, 32, format)
    x = tokens(33, 64).half()
    found = worst_error(run(grouped(experts, torch.float16), experts, x), experts, x, [[0]] * 33)
    assert TOLERANCE < found < 1e-3  # float16 has 11 bits, and the inner rows are rounded to them


@settings(max_examples=10)
@given(st.integers(1, 150), st.integers(1, 80), st.sampled_from(FORMATS), st.sampled_from([1, 3, 34]))
def test_any_shape(hidden: int, width: int, format: str, count: int) -> None:
    experts = make_experts(hidden, width, format)
    x = tokens(count, hidden)
    assert worst_error(run(grouped(experts), experts, x), experts, x, [[0]] * count) < TOLERANCE


@pytest.mark.parametrize("name", [*GATES, "clamped"])
@pytest.mark.parametrize("has_gate", [True, False])
def test_gates(name: str, has_gate: bool) -> None:
    module = prototype(has_gate=has_gate, limit=10.0, _apply_gate=clamped)
    if name != "clamped":
        act_fn = GATES[name]
        module.act_fn = act_fn
        module._apply_gate = lambda up: act_fn(up.chunk(2, dim=-1)[0]) * up.chunk(2, dim=-1)[1]
    experts = make_experts(64, 48, "f32", module=module)
    x = 8 * tokens(3, 64)
    assert worst_error(run(grouped(experts), experts, x), experts, x, [[0]] * 3) < 2e-6


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_families(family: str) -> None:
    experts = family_experts(family, "int4")
    hidden = next(t.shape[0] for t in experts.layout.tensors if t.name == "down_proj")
    for count in (3, 33):
        x = 3 * tokens(count, hidden)
        assert worst_error(run(grouped(experts), experts, x), experts, x, [[0]] * count) < TOLERANCE


@pytest.mark.parametrize("count", [3, 33])
def test_a_broken_token_stays_broken_and_alone(count: int) -> None:
    experts = make_experts(64, 32, "int4", module=prototype(_apply_gate=clamped, swiglu_limit=10.0))
    x = tokens(count, 64)
    healthy = run(grouped(experts), experts, x)
    x[1, 5] = np.nan
    found = run(grouped(experts), experts, x)
    others = [0, *range(2, count)]
    assert not torch.isfinite(found[1]).any() and torch.equal(found[others], healthy[others])


def test_heavy_experts_run_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """From so many tokens on, an expert is worth launches of its own; the others go on in one."""
    experts = make_experts(64, 32, "int8", slots=2)
    kernels = grouped(experts)
    kernels._heavy = 30
    in_torch = []
    math = kernels._math
    monkeypatch.setattr(kernels, "_math", lambda x, *rest: in_torch.append(len(x)) or math(x, *rest))
    routing = [[0, 1 if token < 5 else -1] for token in range(40)]
    x = tokens(40, 64)
    found = run(kernels, experts, x, routing)
    assert in_torch == [40]
    assert worst_error(found, experts, x, routing) < TOLERANCE


# ---- the same bits, whatever is computed beside ----------------------------------------------------------------


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_a_token_does_not_depend_on_what_is_beside_it(format: str) -> None:
    experts = make_experts(40, 24, format, slots=2)
    kernels, x = grouped(experts), tokens(6, 40)
    together = run(kernels, experts, x, [[0, 1]] * 6)
    for token in (1, 2, 3, 5):  # the second to fourth of a program's four, and the second of two
        assert torch.equal(run(kernels, experts, x[token : token + 1], [[0, 1]]), together[2 * token :][:2])
    backwards = run(kernels, experts, x.flip(0), [[1, 0]] * 6)
    assert torch.equal(backwards.flip(0), together)
    found = run(kernels, experts, x, [[0, 1]] * 6, slots=np.array([1]))  # the other is computed elsewhere
    assert torch.equal(found[1::2], together[1::2]) and found[::2].isnan().all()


def test_in_prompts_too() -> None:
    """On a card also at other places in the tile; the interpreter's matmul is one whose rows' last bits differ."""
    experts = make_experts(40, 24, "int4", slots=2)
    kernels, x = grouped(experts), tokens(66, 40)
    together = run(kernels, experts, x, [[0, 1]] * 66)
    begin = 20 if DEVICE.type == "cuda" else 0
    found = run(kernels, experts, x[begin : begin + 40], [[0, 1]] * 40)
    assert torch.equal(found, together[2 * begin :][:80])


@pytest.mark.parametrize(
    ("count", "weights_type"), [(1, torch.float32), (5, torch.bfloat16), (33, torch.float32)]
)
def test_the_join_does_not_depend_on_placement(count: int, weights_type: torch.dtype) -> None:
    """Every row from the device or the host, drawn at random; two rows of nobody."""
    experts, top_k = make_experts(72, 40, "f32"), 4
    kernels, generator = grouped(experts), np.random.default_rng(count)
    rows, weights = tokens(count * top_k, 72), tokens(count, top_k, seed=1).to(weights_type)
    nowhere = np.sort(generator.choice(count * top_k, 2, replace=False))
    results = []
    for share in (0.0, 0.3, 0.7, 1.0):
        layer = kernels.layer(count, top_k)
        layer.host.fill_(np.nan)
        layer.device.fill_(np.nan)
        host = np.setdiff1d(np.nonzero(generator.random(count * top_k) < share)[0], nowhere)
        device = np.setdiff1d(np.arange(count * top_k), np.concatenate([host, nowhere]))
        layer.host[host], layer.device[device] = rows[host], rows[device].to(DEVICE)
        like = torch.empty(count, 72, device=DEVICE)
        results.append(kernels.join(layer, weights.to(DEVICE), like, host, nowhere).cpu())
    rows[nowhere] = 0.0
    expected = (rows.double().view(count, top_k, 72) * weights.double()[:, :, None]).sum(dim=1)
    assert error(results[0], expected) < TOLERANCE
    assert all(torch.equal(result, results[0]) for result in results)


# ---- a card's own ----------------------------------------------------------------------------------------------

needs_card = pytest.mark.skipif(
    DEVICE.type != "cuda", reason="needs a CUDA device: what only a card can show"
)


@needs_card
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("x_type", [torch.float32, torch.bfloat16])
def test_on_a_card_experts_of_a_real_size(format: str, x_type: torch.dtype) -> None:
    experts = make_experts(2048, 768, format, slots=4)
    kernels = grouped(experts, x_type)
    for count in (1, 5, 17, 33, 200):
        x = tokens(count, 2048).to(x_type)
        routing = [[token % 4, (token + 1) % 4] for token in range(count)]
        exact = x_type == torch.float32 or count <= 32
        found = run(kernels, experts, x, routing)
        assert worst_error(found, experts, x, routing) < (2e-6 if exact else 1e-2), count


@needs_card
def test_on_a_card_the_kernels_for_one_token_and_for_four_agree_bit_by_bit() -> None:
    for format in FORMATS:
        experts = make_experts(2048, 768, format)
        kernels, x = grouped(experts, torch.bfloat16), tokens(4, 2048).bfloat16()
        alone = torch.cat([run(kernels, experts, token[None]) for token in x])
        assert torch.equal(run(kernels, experts, x), alone), format


@needs_card
def test_on_a_card_layers_follow_each_other_without_waiting() -> None:
    """Two streams, as the engine has them, many layers queued: no buffer is written before it was read."""
    experts, top_k = make_experts(512, 256, "int4", slots=8), 4
    kernels, side, arena = grouped(experts), torch.cuda.Stream(), experts.arena.to(DEVICE)
    generator, expected, found = np.random.default_rng(0), [], []
    none = np.zeros(0, np.int64)
    for layer in range(50):
        routing = generator.permuted(np.tile(np.arange(8), (9, 1)), axis=1)[:, :top_k].tolist()
        x, routed = tokens(9, 512, seed=layer), Routed(routing)
        on_card = x.to(DEVICE)
        for results, waits in ((expected, True), (found, False)):
            rows = kernels.layer(9, top_k)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                kernels.run(on_card, top_k, arena, *routed.only(routed.slots[::2]), rows.device)
            host = np.sort(np.concatenate([routed.of(slot) for slot in routed.slots[1::2]]))
            rows.host[host] = float(layer)
            torch.cuda.current_stream().wait_stream(side)
            results.append(kernels.join(rows, torch.ones(9, top_k, device=DEVICE), on_card, host, none))
            if waits:
                torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# ---- what a launch is told -------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 70), min_size=1, max_size=9), st.sampled_from([1, 4, 64]), st.integers(0, 99))
def test_jobs_have_every_row_once(counts: list[int], most: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    count, unused = np.array(counts), 3  # rows before the first expert's: nobody's
    rows = generator.permutation(count.sum() + unused)
    begins = unused + count.cumsum() - count
    slots = generator.permutation(100)[: len(counts)]
    jobs = make_jobs(slots, rows, begins, count, most)
    assert jobs.dtype == np.int32 and len(jobs) == sum(-(-n // most) for n in counts)
    np.testing.assert_array_equal(jobs, make_jobs_in_python(slots, rows, begins, count, most))
    for slot, begin, n in zip(slots, begins, counts, strict=True):
        mine = jobs[jobs[:, 0] == slot, 1:].reshape(-1)
        assert mine[:n].tolist() == rows[begin : begin + n].tolist() and (mine[n:] == NOBODY).all()


def test_staging_takes_turns_and_grows() -> None:
    staging = Staging(DEVICE, 8)
    sent = []
    for number in range(2):
        buffer = staging.claim(8)
        buffer.host.fill_(number)
        sent.append(buffer.send(8))
    assert [int(s[0]) for s in sent] == [0, 1], "what one turn sent is still there while the next is written"
    assert staging.claim(100).send(100).shape == (100,)


# ---- what is served --------------------------------------------------------------------------------------------


def build(module: nn.Module, layout: object) -> GroupedExperts | None:
    return GroupedExperts.build(module, layout, DEVICE, torch.float32)  # type: ignore[arg-type]


def build_reason(caplog: pytest.LogCaptureFixture, module: nn.Module, layout: object) -> str:
    with caplog.at_level(logging.INFO, logger="moespac"):
        assert build(module, layout) is None
    return caplog.text


def test_kernels_are_tried_before_use() -> None:
    assert build(prototype(), make_experts(32, 16, "int4").layout) is not None


def test_kernels_that_compute_something_else_are_not_used(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Halved(ExpertMath):
        def __call__(self, *arguments: object) -> torch.Tensor:
            return 0.5 * super().__call__(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(grouped_module, "ExpertMath", Halved)
    assert "compute something else" in build_reason(caplog, prototype(), make_experts(32, 16, "f32").layout)


def test_others_are_left_to_torch(caplog: pytest.LogCaptureFixture) -> None:
    layout = make_experts(32, 16, "f32").layout
    sine = prototype(_apply_gate=lambda up: torch.sin(clamped(up)))
    assert "do not know their gate" in build_reason(caplog, sine, layout)
    assert "normalise" in build_reason(caplog, prototype(has_post_expert_norm=True), layout)
    tensors = [ExpertTensor("gate_up_proj", (32, 32), torch.float32, True)]
    tensors.append(ExpertTensor("down_proj", (16, 32), torch.float32, True))
    assert "transposed" in build_reason(caplog, prototype(), stored_layout(tensors))


def test_a_simulated_accelerator_is_left_to_torch(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    layout = make_experts(32, 16, "f32").layout
    with caplog.at_level(logging.INFO, logger="moespac"):
        assert GroupedExperts.build(prototype(), layout, torch.device("cpu"), torch.float32) is None
    assert "simulated" in caplog.text


def test_without_triton_torch_does_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_kernels()
    for name in [KERNELS, "triton", "triton.language"]:
        monkeypatch.setitem(sys.modules, name, None)
    text = build_reason(caplog, prototype(), make_experts(32, 16, "f32").layout)
    assert "run in torch" in text and len(caplog.records) == 1 and "\n" not in caplog.messages[0]


# ---- the engine ------------------------------------------------------------------------------------------------


def test_an_engine_over_them_keeps_the_models_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and a prompt, experts that move and are computed: the tokens are the model's own."""
    launched = set()
    run_kernels = GroupedExperts.run

    def counted(self: GroupedExperts, x: torch.Tensor, *arguments: object) -> None:
        launched.add(x.shape[0])
        run_kernels(self, x, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(GroupedExperts, "run", counted)
    family, prompt = "qwen3_moe", tuple(3 + n % 7 for n in range(34))
    expected = reference_tokens(family, prompt, 6)
    settings = {"host_memory": "60%", "accelerator_memory": "40%", "window": 3, "policy": "lru"}
    with moespac.load(save_checkpoint(family, tmp_path), draft="none", profile=None, **settings) as engine:
        engine.drafter = PromptLookupDrafter(max_ngram=2, min_ngram=1)
        launched.clear()
        assert engine.generate(prompt, max_new_tokens=6).token_ids == expected
        engine.runtime.memory.check_integrity()
    assert {34, 1} < launched, "prompt and windows both went through the kernels"
