"""A layer's tokens by expert: which rows of its (tokens * k, hidden) buffer are whose."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from moespac.experts.kernels.library import address, load_library


class Groups:
    """The tokens of each of a layer's experts: counts (experts,), and of expert e the buffer's rows
    ``order[begins[e]:][:counts[e]]``. Filled anew for each layer, in place.

    ``numbers`` is all three, as dispatch.c knows them, and ``address`` where they lie.
    """

    def __init__(self, tokens: int, top_k: int, experts: int) -> None:
        self.tokens = tokens
        self.top_k = top_k
        self.experts = experts
        self.complete = True  # whether all rows are somebody's
        self.numbers = np.empty(2 * experts + tokens * top_k, np.int64)
        self.address = address(self.numbers)
        self.counts = self.numbers[:experts]
        self.begins = self.numbers[experts : 2 * experts]
        self.order = self.numbers[2 * experts :]
        library = load_library()
        self._group = library.moespac_group if library else None

    @staticmethod
    def of(routing: NDArray[np.int64], experts: int) -> Groups:
        tokens, top_k = routing.shape
        groups = Groups(tokens, top_k, experts)
        known = np.empty(routing.shape, np.int64)
        groups.fill(torch.from_numpy(routing), known, address(known))
        return groups

    def fill(self, index: torch.Tensor, routing: NDArray[np.int64], where: int) -> None:
        """``index`` (T, k) expert numbers, on any device; they are copied to ``routing`` (T, k), whose address is
        ``where``.

        Some families route a token to "no expert" with a number outside the range; nobody computes such rows, and
        in ``routing`` it is -1.
        """
        if not (index.is_cpu and index.dtype is torch.int64 and index.is_contiguous()):
            index = index.to("cpu", torch.int64).contiguous()
        rows = self.tokens * self.top_k
        if self._group is None:
            within = self.fill_in_python(index.numpy(), routing)
        else:
            within = self._group(index.data_ptr(), rows, self.experts, self.address, where)
        self.complete = within == rows

    def fill_in_python(self, index: NDArray[np.int64], routing: NDArray[np.int64]) -> int:
        """How many rows are somebody's; nobody's come before and behind the others."""
        routing[:] = np.where(index < self.experts, np.maximum(index, -1), -1)
        known = index.reshape(-1).clip(-1, self.experts)
        self.order[:] = known.argsort(kind="stable")
        within = known[(known >= 0) & (known < self.experts)]
        self.counts[:] = np.bincount(within, minlength=self.experts)
        self.begins[:] = self.counts.cumsum() - self.counts + np.count_nonzero(known < 0)
        return len(within)

    @property
    def nowhere(self) -> NDArray[np.int64]:
        """Rows of the (T * k) buffer that belong to no expert."""
        if self.complete:
            return self.order[:0]
        first = self.begins[0]
        return np.concatenate([self.order[:first], self.order[first + self.counts.sum() :]])

    def rows_of(self, chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Rows of the (T * k) buffer that belong to the ``chosen`` (experts,), a flag each."""
        first = self.begins[0]
        return self.order[first : first + self.counts.sum()][chosen.repeat(self.counts)]

    def rows(self, expert: int) -> torch.Tensor:
        """Rows of the (T * k) buffer that belong to ``expert``."""
        begin = self.begins[expert]
        return torch.from_numpy(self.order[begin : begin + self.counts[expert]])
