"""In which order a cache gives its experts up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from moespac.types import Grid, Ids

Values = NDArray[np.float64]  # (layers * experts,) of keeping each expert, 0 or more


@dataclass(frozen=True)
class Active:
    """The active experts of one layer; all arrays (n,)."""

    ids: Ids
    tokens: NDArray[np.int64]  # window tokens that each of them got
    held: NDArray[np.bool_]  # in the cache that is asked, or on the way there

    def missed(self, below: Grid) -> Active:
        """Those that are not held, as the cache ``below`` sees them, which holds the experts of that grid."""
        ids = self.ids[~self.held]
        return Active(ids, self.tokens[~self.held], below.ravel()[ids])


class Order(Protocol):
    """What one cache knows of its experts."""

    def use(self, active: Active) -> None:
        """These are used now."""
        ...

    def values(self) -> Values:
        """Of keeping each; a fresh array."""
        ...


@runtime_checkable
class UseOrder(Order, Protocol):
    """One that is changed by nothing but that an expert is used."""

    def once_used(self) -> Values:
        """What ``values`` will say of each after it is used, if those with lower ids are used before; as far as
        the order of all goes."""
        ...

    def use_all(self, ids: Ids) -> None:
        """One after the other."""
        ...


class Recency:
    """Least recently used first."""

    def __init__(self, total: int) -> None:
        self._last_use = np.zeros(total)
        self._uses = 0

    def use(self, active: Active) -> None:
        self.use_all(active.ids)

    def use_all(self, ids: Ids) -> None:
        self._last_use[ids] = self._uses + 1 + np.arange(len(ids))
        self._uses += len(ids)

    def values(self) -> Values:
        return self._last_use.copy()

    def once_used(self) -> Values:
        return np.arange(self._uses + 1.0, self._uses + 1.0 + len(self._last_use))
