"""What the layers of a window write to: made once, since they come hundreds of times a second."""

from __future__ import annotations

import torch

from moespac.config import DispatchConfig
from moespac.experts.groups import Groups


class Desk:
    """For layers of so many tokens. One layer at a time uses it."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self._rows: torch.Tensor | None = None

    def rows(self, count: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
        """(count, hidden) on the host; zeros where no expert fills some of them."""
        if self._rows is None or self._rows.dtype != dtype:
            with torch.inference_mode(False):  # others write to it in other modes
                self._rows = torch.zeros(count, hidden, dtype=dtype)
        elif not self.groups.complete:
            self._rows.zero_()
        return self._rows


class Desks:
    """One for each size of window, and another each time for what is longer."""

    def __init__(self, top_k: int, experts: int) -> None:
        self._sizes = (top_k, experts)
        self._kept: dict[int, Desk] = {}

    def of(self, tokens: int) -> Desk:
        desk = self._kept.get(tokens)
        if desk is None:
            desk = Desk(Groups(tokens, *self._sizes))
            if tokens <= DispatchConfig.kept_tokens:
                self._kept[tokens] = desk
        return desk
