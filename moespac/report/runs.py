"""What a run's JSON says, whichever command wrote it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moespac.errors import ConfigError
from moespac.timeline import ACCELERATOR

CONCURRENT = ACCELERATOR.replace(" ", "_")  # overlaps with the other causes, which add up to the total


@dataclass(frozen=True)
class Run:
    """One generation or simulation. Rates are None where the run does not have them."""

    name: str
    tokens: int  # decoded
    tokens_per_second: float | None
    hit_rate: float | None
    acceptance: float | None
    mean_accepted: float | None
    bytes_read: dict[str, int]  # by link, of the whole run
    seconds: dict[str, float]  # of the whole run, by cause; no total

    @property
    def causes(self) -> dict[str, float]:
        """Seconds of the deciding thread, which add up to the run's."""
        return {cause: spent for cause, spent in self.seconds.items() if cause != CONCURRENT}


def read_runs(files: Sequence[Path]) -> list[Run]:
    """All runs of files that `moespac generate --json` or `moespac simulate --json` wrote, each with its own name.

    Raises ConfigError for what cannot be read.
    """
    found = [(file.stem, name, data) for file in files for name, data in _records(file)]
    several = len({stem for stem, _, _ in found}) > 1
    names = [" ".join(filter(None, (stem if several or not name else "", name))) for stem, name, _ in found]
    seen: dict[str, int] = {}
    runs = []
    for name, (stem, _, data) in zip(names, found, strict=True):
        seen[name] = seen.get(name, 0) + 1
        unique = name if seen[name] == 1 else f"{name} ({seen[name]})"
        try:
            runs.append(_simulated(unique, data) if "link_bytes" in data else _generated(unique, data))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{stem}: is no run of generate or simulate ({error}); write one with --json"
            ) from None
    return runs


def _records(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        data = json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); name a run's JSON file") from None
    except ValueError:
        raise ConfigError(f"{file}: is not JSON; write one with `moespac generate --json`") from None
    several = isinstance(data, list)
    records = data if several else [data]
    if not records or not all(isinstance(record, dict) for record in records):
        raise ConfigError(f"{file}: is no run; write one with `moespac generate --json`")
    for record in records:
        yield (str(record.get("policy", "")) if several else ""), record


def _generated(name: str, data: Mapping[str, Any]) -> Run:
    return Run(
        name=name,
        tokens=len(data["token_ids"]),
        tokens_per_second=data["tokens_per_second"],
        hit_rate=data["hit_rate"],
        acceptance=data["acceptance_rate"],
        mean_accepted=data["mean_accepted"],
        bytes_read=dict(data["bytes_read"]),
        seconds=_seconds(data["seconds"]),
    )


def _simulated(name: str, data: Mapping[str, Any]) -> Run:
    drafted = data["drafted"]
    return Run(
        name=name,
        tokens=data["tokens"],
        tokens_per_second=data["tokens_per_second"],
        hit_rate=data["hit_rate"],
        acceptance=data["accepted"] / drafted if drafted else None,
        mean_accepted=data["mean_accepted"],
        bytes_read={"storage": data["storage_bytes"], "link": data["link_bytes"]},
        seconds=_seconds(data["seconds"]),
    )


def _seconds(by_cause: Mapping[str, float]) -> dict[str, float]:
    return {cause: float(spent) for cause, spent in by_cause.items() if cause != "total"}
