"""Records of a decode bench that never ran, in round figures."""

from __future__ import annotations

from typing import Any

from moespac.bench.decode.bound import Needs
from moespac.bench.decode.limits import Limits
from moespac.bench.decode.records import OK, Record
from moespac.bench.decode.task import Decoded

SETTING = {
    "model": "tiny-x1",
    "format": "int8",
    "experts": 8,
    "expert_bytes": 8000,
    "prompts": "1 (abc)",
    "tokens": 10,
    "threads": 2,
}


def text(seconds: float, tokens: int = 10, **more: Any) -> Decoded:
    figures = {"first_seconds": 0.5, "read_bytes": 1000 * tokens, "passes": tokens} | more
    return Decoded(token_ids=list(range(tokens + 1)), seconds=seconds, **figures)


def record(
    contender: str, rate: float, budget: float = 0.25, round: int = 0, needs: Needs | None = None, **more: Any
) -> Record:
    """Ten tokens at ``rate`` a second."""
    fields: dict[str, Any] = {
        "status": OK,
        "setting": SETTING,
        "versions": {"moespac": "0"},
        "started": "2026-11-24T12:00:00",
        "limits": Limits(storage=1000.0, memory=8000.0),
        "record_bytes": 1000,
        "texts": (text(10 / rate),),
    }
    return Record(contender, budget, round, needs=needs, **fields | more)
