"""One line of JSON a run, appended as soon as it is known: a run that is cut off loses nothing that it had."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from moespac.bench.decode.records import FAILED, MISSING, OK, TIMEOUT, Timed, check_same
from moespac.bench.decode.task import Decoded
from moespac.bench.gpu.job import Gauges, Result, Setting
from moespac.errors import ConfigError

SKIPPED = "skipped"

__all__ = ["FAILED", "MISSING", "OK", "SKIPPED", "TIMEOUT", "GpuRecord", "read_records"]


@dataclass(frozen=True)
class GpuRecord(Timed):
    """One run of one contender, or why there was none."""

    kind: str  # of its job
    model: str
    contender: str
    budget: float  # share of the experts that the accelerator had room for
    status: str
    setting: Setting
    layers: int  # of the model, where it is of the shape
    wanted: int  # tokens of each text
    versions: dict[str, str]
    started: str
    seconds: float  # of the run with what was loaded for it
    reason: str = ""  # why it is not OK, in words
    result: Result = field(default_factory=Result)

    @property
    def texts(self) -> tuple[Decoded, ...]:  # type: ignore[override]
        return self.result.texts

    @property
    def ok(self) -> bool:
        return self.status == OK

    @property
    def timed(self) -> bool:
        """Whether it decoded anything."""
        return self.ok and bool(self.texts) and self.tokens > 0

    @property
    def speculated(self) -> bool:
        return any(text.drafted for text in self.texts)

    @property
    def gauges(self) -> Gauges:
        return self.result.gauges or Gauges()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(line: str) -> GpuRecord:
        """Raises ValueError, TypeError, KeyError or AttributeError for what is no record."""
        data = json.loads(line)
        data["setting"] = Setting(**data["setting"])
        data["result"] = Result.from_dict(data["result"])
        return GpuRecord(**data)


def read_records(file: Path, flag: str) -> list[GpuRecord]:
    """All records of ``file``. Raises ConfigError, naming ``flag``, where they cannot be read or compared."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        records = [GpuRecord.from_json(line) for line in lines if line.strip()]
    except OSError as error:
        raise ConfigError(f"{flag} {file}: cannot be read ({error.strerror}); name another file") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ConfigError(f"{flag} {file}: holds no records of `moespac bench gpu`; name another") from None
    for record in records:
        check_same(vars(records[0].setting), vars(record.setting), f"{flag} {file}")
    return records
