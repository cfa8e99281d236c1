"""What a worker is told and what it gives back: the words both sides share."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moespac.bench.decode.task import Decoded
from moespac.config import GpuBenchConfig

SHAPE, PAIR = "shape", "pair"  # the models
ENGINE, OFFLOAD_JOB, RESIDENT_JOB, COMPILED_JOB, LLAMA_JOB = (
    "engine",
    "offload",
    "resident",
    "compiled",
    "llama",
)
LINK_JOB, EXACT_JOB = "link", "exact"


@dataclass(frozen=True)
class Setting:
    """What has to be equal for records to be compared."""

    device: str  # cuda or cpu
    quick: bool
    layers: int  # of the shape's
    format: str  # of the shape's experts
    tokens: int  # decoded of each text
    acceptance: float
    draft: str  # model or lookup: what a draft costs
    trace: str  # a file, or "synthetic"
    seed: int

    @property
    def config(self) -> GpuBenchConfig:
        return GpuBenchConfig.quick() if self.quick else GpuBenchConfig()


@dataclass(frozen=True)
class Job:
    """Runs that share a loaded model, in the order of their importance."""

    kind: str
    model: str
    budget: float  # share of the experts that the accelerator has room for
    runs: tuple[str, ...]
    seconds: float  # that it is expected to take
    layers: int  # of the shape, the setting's or fewer
    tokens: int  # decoded of each text
    setting: Setting
    work: str  # folder of the models

    @property
    def folder(self) -> Path:
        return Path(self.work)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Job:
        return Job(**data | {"setting": Setting(**data["setting"]), "runs": tuple(data["runs"])})


@dataclass(frozen=True)
class Gauges:
    """Of one run's decoding, on the accelerator; None: not known, and the reason is in the record."""

    link_bytes: int = 0
    link_seconds: float = 0.0  # in which a copy ran
    busy_share: float | None = None  # of the wall time
    busy_source: str = ""  # where that comes from, and what it leaves out
    peak_bytes: int | None = None  # of tensors on the device
    used_bytes: int | None = None  # of the device, this process's and all others'
    device_bytes: int | None = None  # the device has
    layer_seconds: float | None = None  # of host time on the critical path, a layer, where the engine says it
    expert_slots: int = 0  # on the accelerator
    record_bytes: int = 0

    @property
    def link_rate(self) -> float | None:
        """Bytes/s while something was copied."""
        return self.link_bytes / self.link_seconds if self.link_bytes and self.link_seconds else None


@dataclass(frozen=True)
class Result:
    """What one run gave: texts, or figures of its own."""

    texts: tuple[Decoded, ...] = ()
    gauges: Gauges | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what a reader must know of it

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Result:
        """Raises TypeError or KeyError for what is none."""
        gauges = Gauges(**data["gauges"]) if data["gauges"] else None
        texts = tuple(Decoded(**text) for text in data["texts"])
        return Result(texts, gauges, dict(data["figures"]), tuple(data["notes"]))
