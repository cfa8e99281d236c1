"""The kernels' gates in torch: the family's own is recognised by comparing numbers with these."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from moespac.experts.kernels.library import ACTIVATIONS, Gate

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def apply_gate(gate: Gate, up: torch.Tensor) -> torch.Tensor:
    """up (2 * width,), or (width,) without a gate -> (width,); in float64, as gelu cancels much of its input."""
    up = up.double()
    if not gate.has_gate:
        return _activate(gate, up).float()
    halves = up.view(-1, 2).t() if gate.interleaved else up.view(2, -1)
    gated, linear = halves[0].clamp(max=gate.limit), halves[1].clamp(-gate.limit, gate.limit)
    return (_activate(gate, gated) * (linear + gate.offset)).float()


def _activate(gate: Gate, x: torch.Tensor) -> torch.Tensor:
    name = ACTIVATIONS[gate.activation]
    return x * torch.sigmoid(gate.alpha * x) if name == "silu" else _ACTIVATIONS[name](x)
