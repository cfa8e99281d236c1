"""What a worker is told, what a contender is, and what it gives back: the words both sides share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moespac.config import DecodeBenchConfig


@dataclass(frozen=True)
class Task:
    """One run of one contender."""

    contender: str
    budget: float  # share of the experts that may be in memory
    threads: int
    checkpoint: str
    pack: str
    gguf: str
    draft: str
    draft_gguf: str
    offload: str
    expert_bytes: int  # of all experts, packed
    prompts: Sequence[Sequence[int]]  # token ids
    warmup: Sequence[int]
    tokens: int  # decoded after each prompt, besides the one that the prefill gives
    config: DecodeBenchConfig

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"config": vars(self.config)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Task:
        return Task(**data | {"config": DecodeBenchConfig(**data["config"])})

    @property
    def memory(self) -> int:
        """Bytes that experts may take."""
        return int(self.budget * self.expert_bytes)

    @property
    def folder(self) -> Path:
        """Where all forms of the model lie."""
        return Path(self.checkpoint).parent


@dataclass(frozen=True)
class Decoded:
    """One prompt, continued."""

    token_ids: list[int]
    first_seconds: float  # from the prompt to its first token
    seconds: float  # from then on
    read_bytes: int  # from the disk, meanwhile
    passes: int  # of the target, meanwhile
    drafted: int = 0
    accepted: int = 0
    hit_rate: float | None = None  # of our engine: active experts that were in memory
    causes: dict[str, float] = field(default_factory=dict)  # seconds of decoding by cause, our engine's

    @property
    def tokens(self) -> int:
        """Decoded: all but the first, which is the prefill's."""
        return len(self.token_ids) - 1


class Decoder(ABC):
    """A contender at work: loaded when constructed, greedy, blind to the end of text."""

    held_expert_bytes = 0  # experts in its own memory, which is then not left for the page cache

    @abstractmethod
    def decode(self, prompt: Sequence[int], tokens: int, deadline: float) -> Decoded:
        """``tokens`` + 1 new ones, or fewer: at least two passes are made, no new one after ``deadline``
        (of ``time.perf_counter``)."""

    def begin(self) -> None:
        """What was decoded so far was warming up."""

    def bounds(self) -> dict[str, Any]:
        """What the decoding since ``begin`` cannot do without, where that is known."""
        return {}

    def close(self) -> None:
        """Free what it holds."""
