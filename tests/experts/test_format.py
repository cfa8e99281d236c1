"""Records: exact layout, zero-copy views, and quantisers against float64."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moespac.errors import ConfigError, ModelError
from moespac.experts.format import PACK_FORMATS, RecordLayout, packed_layout, stored_layout
from moespac.experts.quantize import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8
from moespac.model.index import ExpertTensor

PLAIN = (
    ExpertTensor("gate_up_proj", (48, 33), torch.float32, False),
    ExpertTensor("down_proj", (33, 24), torch.float32, False),
)
BIASED = (  # as gpt_oss stores it: (in, out), with biases
    ExpertTensor("gate_up_proj", (33, 48), torch.bfloat16, True),
    ExpertTensor("gate_up_proj_bias", (48,), torch.bfloat16, False),
    ExpertTensor("down_proj", (24, 33), torch.bfloat16, True),
    ExpertTensor("down_proj_bias", (33,), torch.bfloat16, False),
)


def random_weights(tensors: tuple[ExpertTensor, ...]) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    shapes = {t.name: t.shape[::-1] if t.transposed else t.shape for t in tensors}
    return {name: torch.randn(shape).bfloat16().float() for name, shape in shapes.items()}


def empty_record(layout: RecordLayout) -> torch.Tensor:
    return torch.full((layout.nbytes,), 0xEE, dtype=torch.uint8)


def relative_error(weight: torch.Tensor, restored: torch.Tensor) -> float:
    return float((weight.double() - restored.double()).norm() / weight.double().norm())


@pytest.mark.parametrize("tensors", [PLAIN, BIASED])
@pytest.mark.parametrize("format", PACK_FORMATS)
def test_blocks_are_aligned_disjoint_and_canonical(tensors: tuple[ExpertTensor, ...], format: str) -> None:
    layout = packed_layout(tensors, format)
    blocks = [block for tensor in layout.tensors for block in tensor.blocks]
    assert all(block.offset % 64 == 0 for block in blocks)
    assert all(a.offset + a.nbytes <= b.offset for a, b in itertools.pairwise(blocks))
    assert blocks[-1].offset + blocks[-1].nbytes <= layout.nbytes
    assert layout.nbytes % 4096 == 0
    assert not any(tensor.transposed for tensor in layout.tensors)
    assert layout.tensors[0].shape == (48, 33)


@pytest.mark.parametrize("tensors", [PLAIN, BIASED])
@pytest.mark.parametrize(("format", "bound"), [("f32", 0.0), ("bf16", 0.0), ("int8", 0.01), ("int4", 0.09)])
def test_records_give_back_what_was_encoded(
    tensors: tuple[ExpertTensor, ...], format: str, bound: float
) -> None:
    layout, weights = packed_layout(tensors, format), random_weights(tensors)
    record = empty_record(layout)
    layout.encode(weights, record)
    restored = layout.weights(record, torch.float32)
    assert list(restored) == list(weights)
    for name, weight in weights.items():
        assert restored[name].shape == weight.shape and restored[name].dtype == torch.float32
        exact = weight.dim() == 1 or bound == 0.0
        assert relative_error(weight, restored[name]) <= (0.0 if exact else bound)


def test_encoding_leaves_no_byte_to_chance() -> None:
    layout, weights = packed_layout(PLAIN, "int4"), random_weights(PLAIN)
    first, second = empty_record(layout), torch.zeros(layout.nbytes, dtype=torch.uint8)
    layout.encode(weights, first)
    layout.encode(weights, second)
    assert torch.equal(first, second)


def test_stored_dtype_comes_as_views_and_others_as_copies() -> None:
    for layout in (packed_layout(BIASED, "bf16"), stored_layout(BIASED)):
        record = torch.zeros(layout.nbytes, dtype=torch.uint8)
        views, copies = layout.weights(record, torch.bfloat16), layout.weights(record, torch.float32)
        record.fill_(0x3F)
        assert all((view != 0).all() for view in views.values())
        assert all((copy == 0).all() for copy in copies.values())


def test_stored_records_keep_their_orientation_and_show_out_in() -> None:
    layout, weights = stored_layout(BIASED), random_weights(BIASED)
    record = empty_record(layout)
    layout.encode(weights, record)
    gate_up = layout.tensors[0]
    assert gate_up.transposed and gate_up.blocks[0].shape == (33, 48)
    assert torch.equal(gate_up.blocks[0].view(record).float(), weights["gate_up_proj"].t())
    assert torch.equal(layout.weights(record, torch.float32)["gate_up_proj"], weights["gate_up_proj"])


@pytest.mark.parametrize("layout", [packed_layout(BIASED, "int4"), stored_layout(BIASED)])
def test_layout_survives_json(layout: RecordLayout) -> None:
    assert RecordLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_a_layout_larger_than_its_record_is_refused() -> None:
    data = json.loads(json.dumps(packed_layout(PLAIN, "f32").to_json()))
    data["nbytes"] = 4096
    with pytest.raises(ValueError, match="does not fit"):
        RecordLayout.from_json(data)


def test_unknown_formats_and_dtypes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"int5.*f32, bf16, int8, int4"):
        packed_layout(PLAIN, "int5")
    with pytest.raises(ModelError, match="float8"):
        stored_layout([ExpertTensor("down_proj", (4, 4), torch.float8_e4m3fn, False)])


# ---- quantisers --------------------------------------------------------------------------------------

matrices = st.tuples(st.integers(1, 5), st.integers(1, 100), st.integers(0, 2**32 - 1), st.integers(-30, 30))


def random_matrix(rows: int, columns: int, seed: int, exponent: int) -> torch.Tensor:
    """Heavy-tailed rows of very different sizes, one of them all zero."""
    generator = np.random.default_rng(seed)
    weight = generator.standard_t(3.0, (rows, columns)) * 10.0 ** generator.uniform(-2, 2, (rows, 1))
    weight[0] = 0.0
    return torch.from_numpy((weight * 2.0**exponent).astype(np.float32))


@settings(deadline=None, max_examples=60)
@given(matrices)
def test_int8_errs_by_half_a_step_at_most(matrix: tuple[int, int, int, int]) -> None:
    weight = random_matrix(*matrix)
    values, scales = quantize_int8(weight)
    restored = values.double() * scales.double()[:, None]
    assert ((weight.double() - restored).abs() <= scales.double()[:, None] * 0.50001).all()
    assert (restored[0] == 0).all()
    assert torch.equal(dequantize_int8(values, scales, torch.float32), restored.float())


@settings(deadline=None, max_examples=60)
@given(matrices)
def test_int4_stays_within_its_group_range(matrix: tuple[int, int, int, int]) -> None:
    """At worst an extreme weight is cut off by what the fitted line and the one-byte minimum leave out."""
    weight = random_matrix(*matrix)
    columns = weight.shape[1]
    restored = dequantize_int4(*quantize_int4(weight), columns, torch.float32)
    assert restored.shape == weight.shape
    for start in range(0, columns, 32):
        group = weight[:, start : start + 32].double()
        step = (group.amax(1) - group.amin(1)) / 15
        rounding = weight.double().abs().amax(1) / 100
        error = (group - restored[:, start : start + 32].double()).abs().amax(1)
        assert (error <= 2 * step + rounding).all()
    assert (restored[0] == 0).all()


def test_int4_nibbles_and_scales_mean_what_is_documented() -> None:
    """A reader written from the docstring alone, one weight at a time, in float64."""
    weight = random_matrix(3, 75, seed=5, exponent=0)
    nibbles, scales, minima, row_scales = quantize_int4(weight)
    assert nibbles.shape == (3, 48) and scales.shape == minima.shape == (3, 3) and row_scales.shape == (3, 2)
    expected = torch.empty(3, 75, dtype=torch.float64)
    for row in range(3):
        for column in range(75):
            group, j = divmod(column, 32)
            byte = int(nibbles[row, group * 16 + j % 16])
            q = byte & 15 if j < 16 else byte >> 4
            scale = int(scales[row, group]) * float(row_scales[row, 0])
            expected[row, column] = scale * q + int(minima[row, group]) * float(row_scales[row, 1])
    restored = dequantize_int4(nibbles, scales, minima, row_scales, 75, torch.float32)
    torch.testing.assert_close(restored.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("freedom", "bound"), [(1e9, 0.0765), (5.0, 0.089)])
def test_int4_error_on_normal_and_heavy_tailed_weights(freedom: float, bound: float) -> None:
    """Both bounds are under what a searched 16-bit symmetric scale of the same size reaches: 0.081, 0.103."""
    weight = torch.from_numpy(np.random.default_rng(0).standard_t(freedom, (128, 1024)).astype(np.float32))
    assert relative_error(weight, dequantize_int4(*quantize_int4(weight), 1024, torch.float32)) < bound


def test_int4_group_of_equal_weights() -> None:
    weight = torch.tensor([[0.3] * 32 + [1.0] * 32, [-2.0] * 64])
    restored = dequantize_int4(*quantize_int4(weight), 64, torch.float32)
    torch.testing.assert_close(restored, weight, rtol=0, atol=1.0 / 127)
