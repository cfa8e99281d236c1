"""How often drafts are accepted: in this text, judged by what it has shown and by how others fared.

A text begins with what is usual, and that weighs the more drafts the more texts are alike. How alike they are is
learned (empirical Bayes; a Beta prior by its mean and spread): when a text is over, its rate is off from what is
usual by chance and by what sets it apart, and what chance explains of the squared distance is known. So where
all texts fare alike a few lucky drafts change little, and where code and prose take turns a few tell which it is.
"""

from __future__ import annotations

from moespac.config import GovernorConfig


class Acceptance:
    """``rate``: the probability that a draft is accepted. One for all positions: later drafts are accepted a little
    less often, but one number is known from a few windows, and eight would each be noise."""

    def __init__(self, config: GovernorConfig) -> None:
        self._config = config
        self.rate = self._usual = config.acceptance_prior
        self.judged = 0  # drafts of this text that were verified or looked back on
        self._kept = 0.0  # of them
        self._texts = 0  # that told something of how they differ
        self.prior_drafts = config.acceptance_drafts  # drafts' worth of what is usual
        self._spread = self._chance(1) / (self.prior_drafts + 1)  # variance of the rate between texts

    def begin(self) -> None:
        """Another text: all that is known of its drafts is how others fared."""
        if self.judged >= self._config.judged_least:
            self._compare()
        self.rate = self._usual
        self.judged, self._kept = 0, 0.0

    def see(self, accepted: float, step: float) -> None:
        """A draft was accepted (1) or not (0), or as often as one token tells. ``step``: the least weight of that,
        as a text may change, which it does the less the more alike texts are."""
        self.judged += 1
        self._kept += accepted
        known = self.prior_drafts + self.judged
        self.rate = towards(self.rate, accepted, max(min(step, 1 / self.prior_drafts), 1 / known))
        self._usual = towards(self._usual, accepted, 1 / self._config.usual_drafts)

    def _compare(self) -> None:
        """How far this text was from what is usual, beyond what chance explains."""
        off = (self._kept / self.judged - self._usual) ** 2 - self._chance(self.judged)
        self._texts += 1
        known = self._texts + self._config.spread_prior
        self._spread = towards(self._spread, off, max(1 / known, 1 / self._config.spread_texts))
        alike = self._chance(1) / max(self._spread, 1e-9) - 1
        self.prior_drafts = min(max(alike, self._config.acceptance_drafts), self._config.alike_drafts)

    def _chance(self, drafts: int) -> float:
        """Variance of the share of so many drafts that are accepted, in a usual text."""
        return self._usual * (1 - self._usual) / drafts


def towards(mean: float, seen: float, step: float) -> float:
    """The running ``mean`` once ``seen`` has joined it with the weight ``step``."""
    return mean + step * (seen - mean)
