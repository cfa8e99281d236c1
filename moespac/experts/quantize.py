"""Quantisers: pure functions from a weight matrix to integers with scales, and back.

Shapes: O output rows, I input columns, G = ceil(I / 32) groups of a row. All quantise along the input, so
that one dot product meets few scales, and row by row, so that a kernel can stop at any row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

GROUP = 32  # inputs that share an int4 scale; half a cache line of int8 activations, one AVX2 register
_INT8_MAX = 127
_INT4_MAX = 15
_TINY = torch.finfo(torch.float32).tiny


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(O, I) -> values (O, I) int8, scales (O,) float32. Symmetric: |error| <= scale / 2 everywhere."""
    weight = weight.float()
    scales = weight.abs().amax(dim=1) / _INT8_MAX  # (O,)
    values = (weight / _nonzero(scales)[:, None]).round_().clamp_(-_INT8_MAX, _INT8_MAX)
    return values.to(torch.int8), scales


def dequantize_int8(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """values (O, I) int8, scales (O,) -> (O, I). Multiplied in float32 and rounded once."""
    return values.float().mul_(scales[:, None]).to(dtype)


def quantize_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(O, I) -> nibbles (O, 16 G) uint8, scales (O, G) uint8, minima (O, G) int8, row scales (O, 2) float32.

    Asymmetric, w = row_scale[0] * scale * q + row_scale[1] * minimum with q in 0..15. One-byte scales and
    minima under two floats a row cost the 4.5 bits a weight of one 16-bit symmetric scale a group; on normal
    and heavy-tailed weights the error is 8 and 16% below that format with its scale searched.

    Byte j of a group's 16 holds input j in its low nibble and input j + 16 in its high one: masking and
    shifting 16 bytes yields the 32 inputs in order. A last group shorter than 32 is filled up with copies of
    the row's last weight; a reader ignores them.
    """
    rows, columns = weight.shape
    groups = -(-columns // GROUP)
    filled = F.pad(weight.float()[None], (0, groups * GROUP - columns), mode="replicate")[0]
    grouped = filled.view(rows, groups, GROUP)

    minimum, maximum = grouped.aminmax(dim=2)  # (O, G)
    first = _Grid((maximum - minimum) / _INT4_MAX, minimum)
    grid = _Grid(*_fit_line(first.nearest(grouped), grouped))  # once: a second time gains under 1%
    q = grid.nearest(grouped).to(torch.uint8)

    half = GROUP // 2
    nibbles = q[..., :half] | (q[..., half:] << 4)  # (O, G, 16)
    row_scales = torch.stack((grid.row_scale, grid.row_minimum), dim=1)
    return nibbles.view(rows, groups * half), grid.scales, grid.minima, row_scales


def dequantize_int4(
    nibbles: torch.Tensor,
    scales: torch.Tensor,
    minima: torch.Tensor,
    row_scales: torch.Tensor,
    columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The inverse of ``quantize_int4``: -> (O, columns), computed in float32 and rounded once."""
    rows, groups = scales.shape
    packed = nibbles.view(rows, groups, GROUP // 2)
    q = torch.cat((packed & 15, packed >> 4), dim=2).float()  # (O, G, 32)
    scale = scales.float() * row_scales[:, :1]  # (O, G)
    minimum = minima.float() * row_scales[:, 1:]
    weight = q.mul_(scale[..., None]).add_(minimum[..., None])
    return weight.view(rows, groups * GROUP)[:, :columns].to(dtype)


class _Grid:
    """The 16 values that each group can take, once its scale and minimum are one byte each. All (O, G)."""

    def __init__(self, scale: torch.Tensor, minimum: torch.Tensor) -> None:
        self.row_scale = scale.amax(dim=1) / 255  # (O,)
        self.row_minimum = minimum.abs().amax(dim=1) / 127  # (O,)
        # At least 1: a group of equal weights still wants a step, to make up for its minimum's rounding.
        self.scales = (scale / _nonzero(self.row_scale)[:, None]).round_().clamp_(1, 255).to(torch.uint8)
        self.minima = (
            (minimum / _nonzero(self.row_minimum)[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        )

    def nearest(self, grouped: torch.Tensor) -> torch.Tensor:
        """(O, G, 32) weights -> (O, G, 32) float, the index 0..15 of the nearest value."""
        scale = self.scales.float() * self.row_scale[:, None]
        minimum = self.minima.float() * self.row_minimum[:, None]
        return ((grouped - minimum[..., None]) / _nonzero(scale)[..., None]).round_().clamp_(0, _INT4_MAX)


def _fit_line(q: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least-squares scale and minimum (O, G) for w = scale * q + minimum in each group."""
    q_mean, w_mean = q.mean(dim=2), weight.mean(dim=2)
    q_centred = q - q_mean[..., None]
    covariance = (q_centred * (weight - w_mean[..., None])).sum(dim=2)
    variance = q_centred.square().sum(dim=2)
    scale = covariance / _nonzero(variance)  # never negative: q rises with w
    return scale, w_mean - scale * q_mean


def _nonzero(divisor: torch.Tensor) -> torch.Tensor:
    """Where a row or group is all zero, dividing by this instead of 0 gives 0."""
    return divisor.clamp(min=_TINY)
