"""From an expert as the checkpoint stores it to its packed record."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import xxhash

from moespac.atomic import pwrite_all
from moespac.errors import CheckpointError
from moespac.experts.format import RecordLayout
from moespac.experts.journal import Done
from moespac.experts.store import CheckpointStore


class Converter:
    """Turns stored experts into packed records, one at a time in the same two buffers."""

    def __init__(self, store: CheckpointStore, layout: RecordLayout) -> None:
        self._store = store
        self._layout = layout
        self._stored = torch.empty(store.layout.nbytes, dtype=torch.uint8)
        self._record = torch.empty(layout.nbytes, dtype=torch.uint8)

    def write(self, flat_id: int, fd: int, advance: Callable[[int], None]) -> Done:
        """Convert one expert and write it in its place in ``fd``."""
        self._store.read_into(flat_id, self._stored.numpy())
        weights = self._store.layout.weights(self._stored, torch.float32)
        self._layout.encode(weights, self._record)
        error, norm = _squares(weights, self._layout.weights(self._record, torch.float32))
        if not math.isfinite(error + norm):
            layer, expert = divmod(flat_id, self._store.shape.experts)
            raise CheckpointError(
                f"expert {expert} of MoE layer {layer} has NaN or infinite weights; download the model again"
            )
        data = self._record.numpy().data
        pwrite_all(fd, data, flat_id * self._layout.nbytes)
        advance(data.nbytes)
        return Done(flat_id, xxhash.xxh3_64_intdigest(data), error, norm)


def _squares(weights: dict[str, torch.Tensor], packed: dict[str, torch.Tensor]) -> tuple[float, float]:
    """(||W - Q(W)||^2, ||W||^2) over all tensors of an expert, summed in float64."""
    error = sum(_square(weights[name] - packed[name]) for name in weights)
    return error, sum(map(_square, weights.values()))


def _square(x: torch.Tensor) -> float:
    return torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2
