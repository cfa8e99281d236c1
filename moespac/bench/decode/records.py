"""One line of JSON a run, appended as soon as it is known: what was measured is not lost, whatever comes after."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

from moespac.bench.decode.bound import Needs
from moespac.bench.decode.limits import Limits
from moespac.bench.decode.task import Decoded
from moespac.errors import ConfigError

OK, MISSING, FAILED, TIMEOUT = "ok", "missing", "failed", "timeout"


class Timed:
    """What follows from texts that were decoded."""

    texts: tuple[Decoded, ...]

    @property
    def tokens(self) -> int:
        """Decoded, over all texts; the first of each is its prefill's."""
        return sum(text.tokens for text in self.texts)

    @property
    def rate(self) -> float:
        """Tokens a second of decoding alone."""
        return self.tokens / sum(text.seconds for text in self.texts)

    @property
    def first_seconds(self) -> float:
        """To the first token, in the median over the texts."""
        return median(text.first_seconds for text in self.texts)

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / sum(text.passes for text in self.texts)

    @property
    def acceptance(self) -> float | None:
        """Of drafted tokens; None where nothing was drafted."""
        drafted = sum(text.drafted for text in self.texts)
        return sum(text.accepted for text in self.texts) / drafted if drafted else None

    @property
    def hit_rate(self) -> float | None:
        known = [text.hit_rate for text in self.texts if text.hit_rate is not None]
        return mean(known) if known else None

    @property
    def causes(self) -> dict[str, float]:
        """Seconds of decoding by cause, each for one token."""
        names = {name: None for text in self.texts for name in text.causes}
        return {name: sum(text.causes.get(name, 0.0) for text in self.texts) / self.tokens for name in names}


@dataclass(frozen=True)
class Record(Timed):
    """One run of one contender under one budget, or why there was none."""

    contender: str
    budget: float  # share of the experts that memory had room for
    round: int
    status: str
    setting: dict[str, Any]  # what has to be equal for records to be compared
    versions: dict[str, str]
    started: str
    reason: str = ""  # why it is not OK, in words
    limits: Limits | None = None  # measured in the same round
    record_bytes: int = 0  # of one packed expert
    load_seconds: float = 0.0
    memory: dict[str, int] = field(default_factory=dict)  # bytes: own, model, libraries, experts, left
    texts: tuple[Decoded, ...] = ()
    needs: Needs | None = None  # of our engine's passes

    @property
    def read_per_token(self) -> float:
        """Bytes from the disk for each decoded token."""
        return sum(text.read_bytes for text in self.texts) / self.tokens

    @property
    def bound(self) -> float | None:
        """Tokens a second that no schedule of these passes can beat at this round's bandwidths."""
        if self.needs is None or self.limits is None:
            return None
        seconds = self.needs.seconds(self.record_bytes, self.limits.storage, self.limits.memory)
        return self.needs.tokens / seconds if seconds else None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(line: str) -> Record:
        """Raises ValueError, TypeError or KeyError for what is no record."""
        data = json.loads(line)
        data["texts"] = tuple(Decoded(**text) for text in data["texts"])
        for name, kind in (("limits", Limits), ("needs", Needs)):
            data[name] = kind(**data[name]) if data[name] else None
        return Record(**data)


def read_records(file: Path, flag: str) -> list[Record]:
    """All records of ``file``. Raises ConfigError, naming ``flag``, where they cannot be read or compared."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        records = [Record.from_json(line) for line in lines]
    except OSError as error:
        raise ConfigError(f"{flag} {file}: cannot be read ({error.strerror}); name another file") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ConfigError(
            f"{flag} {file}: holds no records of `moespac bench decode`; name another"
        ) from None
    for record in records:
        check_same(records[0].setting, record.setting, f"{flag} {file}")
    return records


def check_same(one: dict[str, Any], other: dict[str, Any], where: str) -> None:
    """Raises ConfigError when records of the two settings cannot be compared."""
    for name in one.keys() | other.keys():
        if one.get(name) != other.get(name):
            raise ConfigError(
                f"{where}: its records are of another setting ({name}: {one.get(name)}, not {other.get(name)});"
                " name another file"
            )


def next_round(records: Sequence[Record], contender: str, budget: float) -> int:
    """How many rounds the contender has behind it: those of equal number are compared."""
    return sum(record.contender == contender and record.budget == budget for record in records)
