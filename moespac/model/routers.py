"""The router beside each experts module, for policies that ask the next layer's gate ahead of its turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

_NAMES = ("gate", "router")  # what the families of the experts interface call it


def find_routers(model: nn.Module, experts: Sequence[nn.Module]) -> list[nn.Module | None]:
    """The router of each experts module, None where a family keeps it elsewhere."""
    blocks = {id(child): module for module in model.modules() for child in module.children()}
    return [_router_in(blocks[id(module)]) for module in experts]


def ask_router(router: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """The experts (T, k) that ``router`` would send x (T, hidden) to, None if it does not say.

    Routers of the experts interface return (logits, weights, indices).
    """
    answer = router(x)
    indices = answer[-1] if isinstance(answer, tuple) else None
    return indices if indices is not None and indices.dtype == torch.int64 else None


def _router_in(block: nn.Module) -> nn.Module | None:
    found = (getattr(block, name, None) for name in _NAMES)
    return next((module for module in found if isinstance(module, nn.Module)), None)
