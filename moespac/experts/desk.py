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

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """(T * k, hidden) on the host for x (T, hidden) there; zeros where no expert fills some of them."""
        if self._rows is None or self._rows.dtype is not x.dtype:
            groups = self.groups
            with torch.inference_mode(False):  # others write to it in other modes
                self._rows = torch.zeros(groups.tokens * groups.top_k, x.shape[1], dtype=x.dtype)
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
