"""Which of the kernel's gates a family has, found by trying them on numbers rather than by the family's name."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from moespac.experts.kernels.library import ACTIVATIONS, Gate

# Under these names the families keep the bound of their clamped gates and the slope of their sigmoid.
_LIMITS = ("limit", "swiglu_limit")
_SLOPES = ("alpha", "swiglu_alpha")
_WIDTH = 64
_SIZES = (0.3, 3.0, 30.0, 3000.0)  # of the numbers tried: around zero, usual ones, and beyond every bound


def find_gate(prototype: nn.Module, library: ctypes.CDLL, isa: bytes) -> Gate | None:
    """The gate that computes what ``prototype`` computes, to float32's accuracy; None when the kernel has none."""
    return match_gate(prototype, lambda gate, up: _apply(gate, up, library, isa))


def match_gate(prototype: nn.Module, apply: Callable[[Gate, torch.Tensor], torch.Tensor]) -> Gate | None:
    """The same with ``apply``: (gate, up (2 * width,), or (width,) without a gate) -> (width,)."""
    experts: Any = prototype
    generator = torch.Generator().manual_seed(0)
    wide = 2 * _WIDTH if experts.has_gate else _WIDTH
    up = torch.cat([size * torch.randn(4, wide, generator=generator) for size in _SIZES])
    exact = up.double()
    expected = (experts._apply_gate(exact) if experts.has_gate else experts.act_fn(exact)).float()
    for gate in _candidates(experts):
        found = torch.stack([apply(gate, row) for row in up])
        if torch.allclose(found, expected, rtol=1e-5, atol=1e-6):
            return gate
    return None


def _candidates(experts: Any) -> Iterator[Gate]:
    slopes = [1.0, 1.702, *_attributes(experts, _SLOPES)]
    if not experts.has_gate:
        for (number, name), slope in itertools.product(enumerate(ACTIVATIONS), slopes):
            if slope == 1.0 or name == "silu":
                yield Gate(0, 0, number, slope, math.inf, 0.0)
        return
    limits = [math.inf, *_attributes(experts, _LIMITS)]
    for (number, name), slope in itertools.product(enumerate(ACTIVATIONS), slopes):
        for limit, offset in itertools.product(limits, (0.0, 1.0)):
            if slope == 1.0 or name == "silu":
                yield Gate(1, int(not experts.is_concatenated), number, slope, limit, offset)


def _attributes(experts: Any, names: tuple[str, ...]) -> list[float]:
    values = (getattr(experts, name, None) for name in names)
    return [float(value) for value in values if isinstance(value, int | float)]


def _apply(gate: Gate, up: torch.Tensor, library: ctypes.CDLL, isa: bytes) -> torch.Tensor:
    """up (2 * width,) or (width,) without a gate -> (width,), by the kernel."""
    out = torch.empty(_WIDTH)
    library.moespac_gate(isa, ctypes.addressof(gate), up.data_ptr(), out.data_ptr(), _WIDTH)
    return out
