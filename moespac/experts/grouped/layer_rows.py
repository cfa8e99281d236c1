"""The (T * k, hidden) rows of a layer in one pass: what the device computes, and what comes over from the host."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from moespac.experts.grouped.staging import Staging, StagingBuffer

ON_DEVICE, ON_HOST, NOWHERE = 0, 1, 2  # as kernels/join.py reads them
_ALIGN = 256  # of the rows behind the table of their sources: a kernel's loads, and the host kernel's


class LayerRows:
    """``device`` and ``host`` are both (T * k, hidden) float32; a row is to be written in one of them, or nowhere.

    A window's rows lie in buffers that are made once. Those of a prompt, hundreds of times as many, are made for
    the layer and given back to torch's allocator.
    """

    def __init__(self, device: torch.Tensor, host: torch.Tensor, staged: StagingBuffer | None) -> None:
        self.device = device
        self.host = host
        self._staged = staged

    def bring_over(
        self, rows: NDArray[np.int64], nowhere: NDArray[np.int64]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """``rows`` are the host's, ``nowhere`` those that no expert computes; one copy, if any.

        -> the host's rows and the table of sources on the device; both None when all rows are in ``device``.
        """
        if not rows.size and not nowhere.size:
            return None, None
        if self._staged is None:
            where = torch.from_numpy(rows)
            self.device[where.to(self.device.device)] = self.host[where].to(self.device.device)
            self.device[torch.from_numpy(nowhere).to(self.device.device)] = 0.0
            return None, None
        count, hidden = self.host.shape
        begin = _table_bytes(count)
        table = self._staged.host[: 4 * count].view(torch.int32).numpy()
        table[:] = ON_DEVICE
        table[rows], table[nowhere] = ON_HOST, NOWHERE
        # All rows up to the host's last: gathering its own first would take longer than what that saves the link.
        brought = int(rows.max()) + 1 if rows.size else 0
        sent = self._staged.send(begin + 4 * brought * hidden)
        return sent[begin:].view(torch.float32).view(brought, hidden), sent[: 4 * count].view(torch.int32)


class RowBuffers:
    """Makes ``LayerRows``, and the inner rows (T * k, width) between the two matrices."""

    def __init__(self, device: torch.device, hidden: int, width: int, window_tokens: int) -> None:
        self._device, self._hidden, self._width = device, hidden, width
        self._window_tokens = window_tokens
        self._rows = torch.empty(0, hidden, device=device)
        self._inner = torch.empty(0, width, device=device)
        self._staging: Staging | None = None

    def layer(self, tokens: int, top_k: int) -> LayerRows:
        count = tokens * top_k
        if tokens > self._window_tokens:
            host = torch.empty(count, self._hidden)
            return LayerRows(torch.empty(count, self._hidden, device=self._device), host, None)
        self._reserve(top_k)
        assert self._staging is not None
        begin = _table_bytes(count)
        size = begin + 4 * count * self._hidden
        staged = self._staging.claim(size)
        host = staged.host[begin:size].view(torch.float32).view(count, self._hidden)
        return LayerRows(self._rows[:count], host, staged)

    def inner(self, tokens: int, top_k: int) -> torch.Tensor:
        if tokens > self._window_tokens:
            return torch.empty(tokens * top_k, self._width, device=self._device)
        self._reserve(top_k)
        return self._inner[: tokens * top_k]

    def _reserve(self, top_k: int) -> None:
        """Buffers for the longest window; the first pass, before anything is decoded, makes them."""
        most = self._window_tokens * top_k
        if self._rows.shape[0] < most:
            self._rows = torch.empty(most, self._hidden, device=self._device)
            self._inner = torch.empty(most, self._width, device=self._device)
            self._staging = Staging(self._device, _table_bytes(most) + 4 * most * self._hidden)


def _table_bytes(rows: int) -> int:
    return -(-4 * rows // _ALIGN) * _ALIGN
