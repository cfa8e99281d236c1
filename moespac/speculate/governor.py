"""How many tokens to draft (ours; the paper's K is fixed). 0 is an answer.

With offloaded fine-grained experts each drafted token touches experts that nobody needed yet, so a window can cost
more than its accepted tokens gain. K is chosen each pass to maximise

    (1 + sum over j <= K of the probability that drafts 1..j are all accepted) / (seconds of a pass of K + 1 tokens
                                                                                + K seconds of drafting)

from running measurements of all three. No torch, no clock: the engine and the simulator tell it what they saw.
"""

from __future__ import annotations

from moespac.config import GovernorConfig


class Governor:
    """Chooses K between 0 and ``config.most``."""

    def __init__(self, config: GovernorConfig) -> None:
        self._most = most = config.most
        self._config = config
        # One probability for all positions: later drafts are accepted a little less often, but one number is
        # known from a few windows, and eight would each be noise.
        self._acceptance = config.acceptance_prior
        self._drafted_at = 0  # the last pass that had drafts
        self._pass_seconds: dict[int, float] = {}  # running mean by tokens in the window
        self._timed_at: dict[int, int] = {}
        self._times: dict[int, int] = {}  # how often each size was measured
        self._draft_seconds = 0.0  # of one token
        self._passes = 0
        self._probes = 0
        self._last_best = most
        self._interval = config.probe_passes
        self._next_probe = config.probe_passes

    def choose(self) -> int:
        """K for the next window: the best as far as is known, now and then a neighbour to know more."""
        # A line needs points: few, none, many; none once more, for the first passes find cold caches.
        for first, times in ((min(2, self._most), 1), (0, 1), (self._most, 1), (0, 2)):
            if self._times.get(first + 1, 0) < times and self._passes < self._config.first_passes:
                return first
        best = self._best()
        if best != self._last_best:
            self._last_best, self._interval = best, self._config.probe_passes
            self._next_probe = min(self._next_probe, self._passes + self._interval)
        if self._passes < self._next_probe:
            return best
        return self._probe(best)

    def observe(self, drafted: int, accepted: int, draft_seconds: float, pass_seconds: float) -> None:
        """A pass ran ``drafted`` + 1 tokens, of whose drafts ``accepted`` were kept."""
        self._passes += 1
        if drafted:
            step = self._step(self._drafted_at)
            for right in [True] * accepted + [False] * (accepted < drafted):
                self._acceptance = _towards(self._acceptance, right, step)
            self._drafted_at = self._passes
            self._draft_seconds = _towards(self._draft_seconds, draft_seconds / drafted, step)
        tokens = drafted + 1
        known = self._pass_seconds.get(tokens, pass_seconds)
        # One slow pass is a stall of the machine, not a property of K: it counts as at most twice the mean.
        seen = min(pass_seconds, 2 * known)
        times = self._times[tokens] = self._times.get(tokens, 0) + 1
        # A plain mean at first: the very first passes of a text find cold caches, and must not count for long.
        step = max(self._step(self._timed_at.get(tokens, 0)), 1 / times)
        self._pass_seconds[tokens] = _towards(known, seen, step)
        self._timed_at[tokens] = self._passes

    def rate(self, k: int) -> float:
        """Tokens per second to expect of windows with ``k`` drafts."""
        tokens = sum(self._acceptance**position for position in range(k + 1))
        return tokens / (self._seconds(k + 1) + k * self._draft_seconds)

    def _best(self) -> int:
        """Drafting must be seen to pay: wrong drafts also disturb what memory holds, which no one pass shows."""
        best = max(range(1, self._most + 1), key=self.rate)
        return best if self.rate(best) > (1 + self._config.margin) * self.rate(0) else 0

    def _probe(self, best: int) -> int:
        """A neighbour of ``best``, each in turn. Probes that change nothing become rare, unless the two are so
        close that a probe costs nothing; a new best makes them frequent."""
        self._probes += 1
        probed = 1 if best == 0 else best - 1 if self._probes % 2 or best == self._most else best + 1
        if self.rate(probed) < (1 - self._config.close) * self.rate(best):
            self._interval = min(2 * self._interval, self._config.probe_passes_most)
        self._next_probe = self._passes + self._interval
        return probed

    def _step(self, last: int) -> float:
        """The weight of an observation whose like was last seen in pass ``last``: old knowledge counts less."""
        mean = self._config.mean_passes
        return min(max(1.0, (self._passes - last) / 8), mean / 4) / mean

    def _seconds(self, tokens: int) -> float:
        """Of a pass: measured, or on the straight line between the nearest measured sizes."""
        known = self._pass_seconds
        if tokens in known:
            return known[tokens]
        below = max((t for t in known if t < tokens), default=None)
        above = min((t for t in known if t > tokens), default=None)
        if below is not None and above is not None:
            share = (tokens - below) / (above - below)
            return known[below] + share * (known[above] - known[below])
        nearest = below if below is not None else above
        assert nearest is not None, "choose() measures before it compares"
        slope = self._config.token_share * known[nearest] / nearest
        return known[nearest] + slope * (tokens - nearest)


class FixedWindow:
    """Stands in for the governor where the user has chosen K."""

    def __init__(self, k: int) -> None:
        self._k = k

    def choose(self) -> int:
        return self._k

    def observe(self, drafted: int, accepted: int, draft_seconds: float, pass_seconds: float) -> None: ...


def _towards(mean: float, seen: float, step: float) -> float:
    return mean + step * (seen - mean)
