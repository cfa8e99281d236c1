"""How many tokens to draft (ours; the paper's K is fixed). 0 is an answer.

With offloaded fine-grained experts each drafted token touches experts that nobody needed yet, so a window can cost
more than its accepted tokens gain. K is chosen each pass to maximise

    (1 + sum over j <= K of the probability that drafts 1..j are all accepted) / (seconds of a pass of K + 1 tokens
                                                                                + K seconds of drafting)

from running measurements of all three. No torch, no clock: the engine and the simulator tell it what they saw.

Measuring by trying is dear and noisy: a pass of plain decoding varies by a quarter with the text alone, and one
drafted pass among many without drafts costs more than when drafting goes on. So little is tried. What the experts
of a pass's first token cost is taken off each measurement and put back as a mean, and what further tokens cost is
known before one is drafted: both from looking back on passes (policy/windows.py). How often drafts are accepted is
known without them too: now and then the drafter looks back on the tokens that came, and tells which of them it
would have drafted.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from moespac.config import GovernorConfig
from moespac.policy.windows import NOTHING, LookedBack
from moespac.speculate.acceptance import Acceptance, towards


class Governor:
    """Chooses K between 0 and ``config.most``."""

    def __init__(self, config: GovernorConfig) -> None:
        self._most = most = config.most
        self._config = config
        self._acceptance = Acceptance(config)
        self._judged_at = 0  # the last pass in which there were any
        self._drafted_at = 0  # the last pass that had drafts
        self._first = 0.0  # seconds that the experts of a pass's first token cost, running mean
        self._extra: list[float] = []  # [n]: of n further tokens, where no such pass was measured
        self._pass_seconds: dict[
            int, float
        ] = {}  # running mean beyond the first token's, by tokens in the window
        self._noise = config.noise_prior**2  # of one measurement, as a share of a pass; squared
        self._timed_at: dict[int, int] = {}
        self._times: dict[int, int] = {}  # how often each size was measured
        self._draft_seconds = 0.0  # of one token
        self._passes = 0
        self._chosen = 0
        self._settled = True  # drafts were asked for in the pass before this one too, or in neither
        self._probed = 0
        self._probe_end = 0  # the pass with which the last probe ended
        self._probes = 0
        self._last_best = most
        self._interval = config.probe_passes
        self._next_probe = config.probe_passes

    def begin(self) -> None:
        """Another text, whose drafts may fare otherwise."""
        self._acceptance.begin()

    def looks_back(self, k: int, undrafted: int) -> bool:
        """Whether the drafter is to look back on the tokens of ``undrafted`` passes before it drafts ``k``.

        Always before it drafts, so that catching up is not taken for what a draft costs. Else if drafts that are
        all accepted would pay: soon in a new text, of whose drafts nobody knows anything, later every few passes.
        """
        if k:
            return undrafted > 0
        if not self._pass_seconds or undrafted < self._passes_unseen():
            return False
        return self._rate(self._candidate(1.0), 1.0) > self.rate(0)

    def _passes_unseen(self) -> float:
        """From one look back to the next: as many as there were tokens to judge by, up to where it takes a small
        share of the time (what a drafted token does). The more alike texts are, the less there is to see."""
        alike = self._acceptance.prior_drafts / self._config.acceptance_drafts
        share = self._config.look_back_share * self._seconds(1)
        most = max(self._config.look_back_passes * alike, self._draft_seconds / share)
        return min(max(self._acceptance.judged, 2 * alike), most)

    def saw_drafts(self, accepted: Sequence[float]) -> None:
        """Drafts were verified, or looked back on: how often each is accepted, as far as that one tells."""
        for seen in accepted:
            self._acceptance.see(seen, self._step(self._judged_at))
            self._judged_at = self._passes

    def choose(self) -> int:
        """K for the next window: the best as far as is known, now and then a neighbour to know more."""
        chosen = self._decide()
        self._settled = (chosen > 0) == (self._chosen > 0)
        self._chosen = chosen
        return chosen

    def _decide(self) -> int:
        # A line needs points: few, none, many; none once more, for the first passes find cold caches.
        points = ((0, 1), (min(2, self._most), 1), (self._most, 1), (0, 2))
        if self._passes < self._config.first_passes:
            if len(self._extra) == 1:
                return 0  # somebody looks back, and will know more in a moment
            for first, times in points[-1:] if self._extra else points:
                if self._times.get(first + 1, 0) < times:
                    return first
        best = self._best()
        if best != self._last_best:
            self._last_best, self._interval = best, self._config.probe_passes
            self._next_probe = min(self._next_probe, self._passes + self._interval)
        if best and not self._drafted_at:
            return 1  # nobody knows yet what drafting takes
        if self._passes < self._probe_end:
            return self._probed
        if self._passes < self._next_probe:
            return best
        return self._probe(best)

    def observe(
        self,
        drafted: int,
        accepted: int,
        draft_seconds: float,
        pass_seconds: float,
        looked_back: LookedBack = NOTHING,
    ) -> None:
        """A pass ran ``drafted`` + 1 tokens, of whose drafts ``accepted`` were kept."""
        first, self._extra = looked_back
        self._passes += 1
        self._first = towards(self._first, first, max(1 / self._passes, 1 / self._config.mean_passes))
        if drafted:
            self.saw_drafts([1.0] * accepted + [0.0] * (accepted < drafted))
            step = self._step(self._drafted_at) if self._drafted_at else 1.0
            self._draft_seconds = towards(self._draft_seconds, draft_seconds / drafted, step)
            self._drafted_at = self._passes
        if self._settled or not self._extra:
            self._measure(drafted + 1, pass_seconds - first)

    def _measure(self, tokens: int, beyond: float) -> None:
        """A pass of so many ``tokens`` took so many seconds beyond its first token's experts. What memory holds
        and what is on its way are as they are while drafting goes on, or while it does not: the pass in between
        would mislead where that matters, which is where somebody looks back."""
        known = self._pass_seconds.get(tokens, beyond)
        # One slow pass is a stall of the machine, not a property of K: it counts as at most twice the mean.
        seen = min(beyond, known + max(self._first + known, 0.0))
        times = self._times[tokens] = self._times.get(tokens, 0) + 1
        if times > 1:
            off = (seen - known) / max(self._first + known, 1e-9)
            self._noise = towards(self._noise, off**2, 1 / self._config.mean_passes)
        # A plain mean at first: the very first passes of a text find cold caches, and must not count for long.
        step = max(self._step(self._timed_at.get(tokens, 0)), 1 / times)
        self._pass_seconds[tokens] = towards(known, seen, step)
        self._timed_at[tokens] = self._passes

    def rate(self, k: int) -> float:
        """Tokens per second to expect of windows with ``k`` drafts."""
        return self._rate(k, self._acceptance.rate)

    def _rate(self, k: int, acceptance: float) -> float:
        tokens = sum(acceptance**position for position in range(k + 1))
        return tokens / (self._seconds(k + 1) + k * self._draft_seconds)

    def _best(self) -> int:
        """Drafting must be seen to pay, beyond what chance may show: wrong drafts also disturb what memory holds,
        which no one pass shows."""
        best = self._candidate(self._acceptance.rate)
        seen = self.rate(best) * (1 - self._config.doubt * self._doubt(best))
        return best if seen > (1 + self._config.margin) * self.rate(0) else 0

    def _candidate(self, acceptance: float) -> int:
        """The best K beside 0, if drafts are accepted so often."""
        return max(range(1, self._most + 1), key=lambda k: self._rate(k, acceptance))

    def _doubt(self, k: int) -> float:
        """The standard error of ``k``'s rate beside that of no drafts, as a share."""
        return sqrt(self._noise * (1 / self._weight(k + 1) + 1 / self._weight(1)))

    def _weight(self, tokens: int) -> float:
        """Measurements' worth of what is known of passes of so many tokens, or of the nearest size measured."""
        nearest = min(self._times, key=lambda size: abs(size - tokens))
        measured = min(
            float(self._times[nearest]), 2 * self._config.mean_passes
        )  # as steady as such a mean is
        return measured + (self._config.prior_passes if tokens <= len(self._extra) else 0)

    def _probe(self, best: int) -> int:
        """A neighbour of ``best``, each in turn. Probes become rare, unless the two are so close that a probe
        costs nothing; a new best makes them frequent. Where looking back tells what a window costs they become
        rare in any case: K = 0 is never tried, and in its place the best K above it is, if it is close."""
        self._probes += 1
        if best and not self._extra and self._passes - self._timed_at[1] > self._config.probe_passes_most:
            return self._try_none_again()
        if best == 0:
            probed = self._candidate(self._acceptance.rate) if self._extra else 1
        else:
            down = self._probes % 2 or best == self._most
            probed = max(best - 1, 1 if self._extra else 0) if down else best + 1
        close = self.rate(probed) >= (1 - self._config.close) * self.rate(best)
        if self._extra or not close:
            self._interval = min(2 * self._interval, self._config.probe_passes_most)
        if self._extra and best == 0 and not close:
            probed = 0
        # The first pass with drafts after one without teaches nothing then.
        return self._try(probed, 2 if self._extra and best == 0 else 1)

    def _try_none_again(self) -> int:
        """What a pass without drafts took was last measured in another hour, and its neighbours do not tell."""
        self._times[1] = 1
        return self._try(0, 2)

    def _try(self, probed: int, passes: int) -> int:
        self._probed, self._probe_end = probed, self._passes + passes
        self._next_probe = self._probe_end - 1 + self._interval
        return probed

    def _step(self, last: int) -> float:
        """The weight of an observation whose like was last seen in pass ``last``: old knowledge counts less."""
        mean = self._config.mean_passes
        return min(max(1.0, (self._passes - last) / 8), mean / 4) / mean

    def _seconds(self, tokens: int) -> float:
        """Of a pass: what its first token costs, and beyond it what was measured, weighed with what is foreseen."""
        measured = self._first + self._measured(tokens)
        if tokens > len(self._extra) or 1 not in self._pass_seconds or tokens == 1:
            return measured
        foreseen = self._first + self._pass_seconds[1] + self._extra[tokens - 1]
        times = min(float(self._times.get(tokens, 0)), self._config.mean_passes)
        return towards(foreseen, measured, times / (times + self._config.prior_passes))

    def _measured(self, tokens: int) -> float:
        """Beyond the first token: measured, or on the straight line between the nearest measured sizes."""
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
        slope = self._config.token_share * (self._first + known[nearest]) / nearest
        return known[nearest] + slope * (tokens - nearest)


class FixedWindow:
    """Stands in for the governor where the user has chosen K."""

    def __init__(self, k: int) -> None:
        self._k = k

    def begin(self) -> None: ...

    def choose(self) -> int:
        return self._k

    def looks_back(self, k: int, undrafted: int) -> bool:
        return False

    def saw_drafts(self, accepted: Sequence[float]) -> None: ...

    def observe(self, *seen: object) -> None: ...
