"""The experts of a model that lie on the accelerator all together: routed, grouped and computed there.

Nobody has to decide anything then, so a pass needs no word from the host between its layers and can be one
recording. N = T * k rows of a layer in a pass; sizes follow from T alone, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from moespac.experts.grouped.constants import VECTOR_TOKENS
from moespac.experts.grouped.jobs import NOBODY


class JobKernels(Protocol):
    """What computes experts from their records by jobs, and joins their rows; work that can be recorded.

    ``grouped.launch.Launcher`` does.
    """

    hidden: int
    width: int  # of what lies between an expert's two matrices

    def run(
        self,
        x: torch.Tensor,
        top_k: int,
        arena: torch.Tensor,
        jobs: torch.Tensor,
        inner: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """x (T, hidden); fills the rows of ``out`` (N, hidden) that ``jobs`` (jobs, 1 + rows) int32 name: a slot of
        ``arena`` (slots, record_bytes), then rows of its expert, NOBODY after the last. ``inner`` (N, width) is
        written on the way; both float32."""
        ...

    def join(self, device_rows: torch.Tensor, weights: torch.Tensor, joined: torch.Tensor) -> None:
        """joined (T, hidden): the sums of each token's rows times ``weights`` (T, k)."""
        ...


class ResidentExperts:
    """Implements ``model.stretches.DeviceExperts`` for as long as no expert leaves its slot."""

    def __init__(
        self,
        kernels: JobKernels,
        arena: Callable[[], torch.Tensor],
        slots: NDArray[np.int64],
        ran: Callable[[NDArray[np.int64], NDArray[np.float32]], None],
    ) -> None:
        """``slots`` (layers, experts) of ``arena``, which is asked for and not held: recordings outlive it.

        ``ran`` is told the routing (layers, T, k) of each pass, and its weights, both its own to keep.
        """
        self._arena = arena
        self._kernels = kernels
        self._slots = torch.from_numpy(slots).to(arena().device)
        self._ran = ran

    def __call__(
        self, layer: int, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        kernels, (tokens, top_k) = self._kernels, index.shape
        jobs = group_on_device(index, self._slots[layer], rows_of_a_job(tokens))
        inner = x.new_empty(tokens * top_k, kernels.width, dtype=torch.float32)
        out = x.new_empty(tokens * top_k, kernels.hidden, dtype=torch.float32)
        joined = torch.empty_like(x)
        kernels.run(x, top_k, self._arena(), jobs, inner, out)
        kernels.join(out, weights, joined)
        return joined

    def ran(self, index: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
        self._ran(torch.stack(index).numpy(), torch.stack(weights).numpy())


def rows_of_a_job(tokens: int) -> int:
    """Of the kernels' variants: one token has one row of each expert, of more nothing is known here."""
    return VECTOR_TOKENS[0] if tokens == 1 else VECTOR_TOKENS[-1]


def group_on_device(index: torch.Tensor, slots: torch.Tensor, rows: int) -> torch.Tensor:
    """The jobs (N, 1 + rows) int32 of a layer; index (T, k) int64, ``slots`` (experts,) int64 of its experts.

    One expert's jobs follow one another, in the order of its tokens. There are as many jobs as there could be:
    those too many have no rows, and name the record of the last that has, which is in the cache by then.
    """
    flat = index.reshape(-1)
    expert, order = flat.sort(stable=True)
    position = torch.arange(flat.numel(), device=flat.device)
    place = position - torch.searchsorted(expert, expert)  # among its expert's rows
    job = (place % rows == 0).cumsum(0) - 1
    slot = slots[expert]
    jobs = torch.full((flat.numel(), 1 + rows), NOBODY, dtype=torch.int64, device=flat.device)
    jobs[:, 0] = slot[-1]
    jobs[job, 0] = slot
    jobs[job, 1 + place % rows] = order
    return jobs.to(torch.int32)
