"""Adaptive replacement (Megiddo and Modha, FAST 2003)."""

from __future__ import annotations

import math
from collections import OrderedDict

import numpy as np

from moespac.policy.baselines.order import Active, Order, Values
from moespac.policy.baselines.textbook import TextbookPolicy

List = OrderedDict[int, None]  # expert ids, the least recently used first


class AdaptiveReplacement:
    """The paper's directory: T1 and T2 are in the cache, seen once and seen again lately; B1 and B2 remember what
    left them, and a hit there moves the target size of T1.

    A layer's experts are requested one by one. The directory says what should be held; the cache gives up first
    what the directory has dropped, then what REPLACE would choose.
    """

    def __init__(self, total: int, slots: int) -> None:
        self._total = total
        self._slots = slots
        self._target = 0.0  # the paper's p, the size that T1 should have
        self._once, self._again = List(), List()  # T1, T2
        self._left_once, self._left_again = List(), List()  # B1, B2

    def use(self, active: Active) -> None:
        for expert in active.ids.tolist():
            self._request(expert)

    def values(self) -> Values:
        once = np.fromiter(self._once, np.int64, len(self._once))
        again = np.fromiter(self._again, np.int64, len(self._again))
        surplus = max(math.ceil(len(once) - self._target), 0)
        victims = np.concatenate([once[:surplus], again, once[surplus:]])
        values = np.zeros(self._total)
        values[victims] = 1 + np.arange(len(victims))
        return values

    def _request(self, expert: int) -> None:
        once, again, left_once, left_again = self._once, self._again, self._left_once, self._left_again
        if expert in once or expert in again:
            once.pop(expert, None)
            again.pop(expert, None)
            again[expert] = None
        elif expert in left_once:
            self._target = min(self._slots, self._target + max(1, len(left_again) / len(left_once)))
            self._replace()
            del left_once[expert]
            again[expert] = None
        elif expert in left_again:
            self._target = max(0, self._target - max(1, len(left_once) / len(left_again)))
            self._replace(at_target=True)
            del left_again[expert]
            again[expert] = None
        else:
            self._make_room()
            once[expert] = None

    def _make_room(self) -> None:
        """For an expert that the directory does not know (the paper's case IV)."""
        seen_once = len(self._once) + len(self._left_once)
        directory = seen_once + len(self._again) + len(self._left_again)
        if seen_once == self._slots:
            if not self._left_once:
                self._once.popitem(last=False)
                return
            self._left_once.popitem(last=False)
            self._replace()
        elif directory >= self._slots:
            if directory == 2 * self._slots:
                self._left_again.popitem(last=False)
            self._replace()

    def _replace(self, at_target: bool = False) -> None:
        """Move the least recent of T1 or T2 to its B; ``at_target``: T1 gives one even when it has its size."""
        surplus = len(self._once) - self._target
        if self._once and (surplus > 0 or (at_target and surplus == 0)):
            expert, _ = self._once.popitem(last=False)
            self._left_once[expert] = None
        else:
            expert, _ = self._again.popitem(last=False)
            self._left_again[expert] = None


class ArcPolicy(TextbookPolicy):
    """The textbook cache, which resists scans by telling what was seen once from what was seen again."""

    name = "arc"

    def _order(self, slots: int) -> Order:
        return AdaptiveReplacement(self.shape.total, slots)
