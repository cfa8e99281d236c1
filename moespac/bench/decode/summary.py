"""Medians over rounds, ratios within rounds, and the claims that are checked with them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median

from moespac.bench.decode.contenders import OURS, Contender, parse_contenders
from moespac.bench.decode.records import OK, Record
from moespac.config import DecodeBenchConfig

_SHOWN = 5e-5  # seconds a token: less would be printed as 0.0 ms


@dataclass(frozen=True)
class Line:
    """One contender under one budget, over its rounds."""

    contender: Contender
    budget: float
    records: tuple[Record, ...]  # those that are OK, by round

    @property
    def name(self) -> str:
        return self.contender.name

    @cached_property
    def rate(self) -> float:
        return self.median(lambda record: record.rate)

    @property
    def spread(self) -> tuple[float, float]:
        rates = [record.rate for record in self.records]
        return min(rates), max(rates)

    def median(self, figure: Callable[[Record], float]) -> float:
        return median(figure(record) for record in self.records)

    def cause(self, name: str) -> float:
        """Seconds a decoded token."""
        return self.median(lambda record: record.causes.get(name, 0.0))

    def median_or_none(self, figure: Callable[[Record], float | None]) -> float | None:
        """Of the rounds that have the figure."""
        known = [value for record in self.records if (value := figure(record)) is not None]
        return median(known) if known else None


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one is as the other: in each round by itself, then the median."""

    value: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True)
class Claim:
    """Something that is to hold, and how it came out; None: the run does not say."""

    text: str
    wanted: float
    who: str
    ratio: Ratio | None

    @property
    def holds(self) -> bool | None:
        return None if self.ratio is None else self.ratio.value >= self.wanted


def lines(records: Iterable[Record]) -> list[Line]:
    """By budget from the largest, in each the fastest first."""
    grouped: dict[tuple[float, str], list[Record]] = defaultdict(list)
    for record in records:
        if record.status == OK and record.tokens:
            grouped[record.budget, record.contender].append(record)
    found = [
        Line(parse_contenders(name)[0], budget, tuple(sorted(group, key=lambda record: record.round)))
        for (budget, name), group in grouped.items()
    ]
    return sorted(found, key=lambda line: (-line.budget, -line.rate))


def causes_of(found: Iterable[Line]) -> list[str]:
    """Causes of this engine's time that show in any of the lines, the largest first."""
    most: dict[str, float] = defaultdict(float)
    for line in found:
        for name in {name for record in line.records for name in record.causes}:
            most[name] = max(most[name], line.cause(name))
    return sorted((name for name in most if most[name] >= _SHOWN), key=lambda name: -most[name])


def ratio(one: Line, other: Line) -> Ratio | None:
    """Of the rounds that both have; None without any."""
    others = {record.round: record for record in other.records}
    return _over_rounds(
        [record.rate / others[record.round].rate for record in one.records if record.round in others]
    )


def share_of_bound(line: Line) -> Ratio | None:
    return _over_rounds([record.rate / record.bound for record in line.records if record.bound])


def _over_rounds(values: Sequence[float]) -> Ratio | None:
    return Ratio(median(values), min(values), max(values), len(values)) if values else None


def claims(found: Sequence[Line]) -> list[Claim]:
    """What the project wants to hold, as far as the budgets are there."""
    budgets = {line.budget for line in found}
    everything = [line for line in found if line.budget == 1]
    quarter = [line for line in found if line.budget == 0.25]
    wanted: list[Claim] = []
    if 1 in budgets:
        wanted += [
            _claim(
                "everything in memory, no speculation, against llama.cpp",
                1.0,
                everything,
                _ours_plain,
                _llama_plain,
            ),
            _claim(
                "everything in memory, each side's best speculation",
                1.3,
                everything,
                _ours_drafted,
                _llama_drafted,
            ),
        ]
    if 0.25 in budgets:
        wanted += [
            _claim("memory for 25%, against llama.cpp with mmap", 4.0, quarter, _ours, _llama),
            _claim(
                "memory for 25%, against our best baseline with speculation",
                1.42,
                quarter,
                _ours,
                _baseline_drafted,
            ),
            _bound_claim("memory for 25%, of the bound", 0.7, quarter),
        ]
    for budget in sorted(budgets, reverse=True):
        here = [line for line in found if line.budget == budget]
        if any(_ours_fixed(line.contender) and line.contender.window for line in here):
            text = f"memory for {budget:.0%}, K governed against the best fixed K"
            wanted.append(_claim(text, DecodeBenchConfig.governed_aim, here, _ours_drafted, _ours_fixed))
    return wanted


Choice = Callable[[Contender], bool]


def _claim(text: str, wanted: float, found: Sequence[Line], ours: Choice, theirs: Choice) -> Claim:
    """The fastest of ours against the fastest of theirs."""
    one, other = _fastest(found, ours), _fastest(found, theirs)
    if one is None or other is None:
        return Claim(text, wanted, "", None)
    return Claim(text, wanted, f"{one.name} / {other.name}", ratio(one, other))


def _bound_claim(text: str, wanted: float, found: Sequence[Line]) -> Claim:
    line = _fastest(found, _ours)
    if line is None:
        return Claim(text, wanted, "", None)
    return Claim(text, wanted, f"{line.name} / its bound", share_of_bound(line))


def _fastest(found: Sequence[Line], choice: Choice) -> Line | None:
    chosen = [line for line in found if choice(line.contender)]
    return max(chosen, key=lambda line: line.rate, default=None)


def _ours(contender: Contender) -> bool:
    """As users run it: no K fixed."""
    return contender.system == OURS and contender.window is None


def _ours_plain(contender: Contender) -> bool:
    return _ours(contender) and contender.draft == "none"


def _ours_drafted(contender: Contender) -> bool:
    return _ours(contender) and contender.draft != "none"


def _ours_fixed(contender: Contender) -> bool:
    """K = 0 is a fixed K too."""
    return contender.system == OURS and (contender.window is not None or contender.draft == "none")


def _llama(contender: Contender) -> bool:
    return contender.is_llama


def _llama_plain(contender: Contender) -> bool:
    return contender.is_llama and contender.draft == "none"


def _llama_drafted(contender: Contender) -> bool:
    return contender.is_llama and contender.draft != "none"


def _baseline_drafted(contender: Contender) -> bool:
    return not contender.is_peer and contender.system != OURS and contender.draft != "none"
