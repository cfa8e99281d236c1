"""Keys and values at addresses that stay, so that recorded work can hold on to them.

An arena is lent to one sequence after another, and what was recorded over it with it. G key and value heads of D.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

import torch

from moespac.config import GraphConfig

Kept = TypeVar("Kept")


@dataclass(frozen=True)
class ArenaShape:
    layers: int
    groups: int
    width: int
    context: int  # tokens that a sequence can have


class Arena:
    """``store`` (layers, 2, G, room, D), the rotary tables of its room, and what was recorded over them."""

    def __init__(
        self,
        shape: ArenaShape,
        like: torch.Tensor,
        rotary: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]],
        config: GraphConfig,
    ) -> None:
        """``rotary``: cosines and sines of positions from .. to, see ``lean.Rotary.at``."""
        self._context = shape.context
        self._rotary = rotary
        self._config = config
        self._recorded: OrderedDict[Hashable, object] = OrderedDict()
        self.store = like.new_zeros(shape.layers, 2, shape.groups, 0, shape.width)
        self.cos, self.sin = rotary(0, 0)

    @property
    def room(self) -> int:
        return self.store.shape[3]

    def reserve(self, filled: int, end: int) -> int:
        """The bucket of the first ``end`` tokens, which have room then; ``filled`` are kept if all moves."""
        bucket = self._bucket(end)
        if bucket > self.room:
            self._recorded.clear()  # it has the old addresses
            larger = self.store.new_zeros(*self.store.shape[:3], bucket, self.store.shape[4])
            larger[..., :filled, :] = self.store[..., :filled, :]
            self.store = larger
            self.cos, self.sin = self._rotary(0, bucket)
        return bucket

    def recorded(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """What ``make`` gave under ``key``; what was not used for longest makes room for it."""
        if key not in self._recorded:
            while len(self._recorded) >= self._config.windows_kept:
                self._recorded.popitem(last=False)
            self._recorded[key] = make()
        self._recorded.move_to_end(key)
        return self._recorded[key]  # type: ignore[return-value]

    def _bucket(self, end: int) -> int:
        """Doubling: attention reads at most twice what there is, and a long answer meets few of them."""
        least = self._config.least_bucket
        bucket = least
        while bucket < end:
            bucket *= 2
        fitting = -(-self._context // least) * least
        return fitting if end <= fitting < bucket else bucket


class StaticCache:
    """One sequence in an arena that it borrows on first use; forgetting tokens is moving its end."""

    rewinds = True
    survives = True  # what a failed pass wrote lies beyond its end

    def __init__(self, arenas: ArenaPool) -> None:
        self.length = 0
        self._arenas = arenas
        self._arena: Arena | None = None

    @property
    def arena(self) -> Arena:
        if self._arena is None:
            self._arena = self._arenas.lend(self)
        return self._arena

    def allow_rewind(self) -> None:
        """It always can."""

    def rewind(self, tokens: int) -> None:
        """Forget the last ``tokens``."""
        self.length -= tokens


class ArenaPool:
    """As many arenas as there are sequences at a time."""

    def __init__(self, make: Callable[[], Arena]) -> None:
        self._make = make
        self._free: list[Arena] = []

    def lend(self, cache: StaticCache) -> Arena:
        """An arena for as long as ``cache`` lives."""
        arena = self._free.pop() if self._free else self._make()
        weakref.finalize(cache, self._free.append, arena).atexit = False
        return arena
