"""What the experts of a tiny model must be, taken from transformers' own module."""

from __future__ import annotations

import mmap

import numpy as np
import torch
from numpy.typing import NDArray

from moespac.experts.store import ExpertStore
from tests.families import build_model


def expected_weights(family: str, layer: int, expert: int) -> dict[str, torch.Tensor]:
    """Parameters of one expert by name, matrices (out, in)."""
    modules = [module for module in build_model(family).modules() if hasattr(module, "is_transposed")]
    module = modules[layer]
    weights = {name: stacked[expert].detach() for name, stacked in module.named_parameters(recurse=False)}
    return {name: w.t() if module.is_transposed and w.dim() == 2 else w for name, w in weights.items()}


def page_aligned(nbytes: int) -> NDArray[np.uint8]:
    return np.frombuffer(mmap.mmap(-1, nbytes), dtype=np.uint8)


def read_weights(
    store: ExpertStore, flat_id: int, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    buffer = page_aligned(store.layout.nbytes)
    store.read_into(flat_id, buffer)
    return store.layout.weights(torch.from_numpy(buffer), dtype)
