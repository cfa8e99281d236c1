"""Options that several commands share: a dataclass a group, its fields those of moespac/config.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moespac.cli.files import JsonFile
from moespac.config import DeviceConfig, EngineConfig, MemoryConfig, SamplingConfig, TimelineConfig
from moespac.errors import ConfigError

if TYPE_CHECKING:
    from moespac.timeline import Record

MODEL, DRAFT, MEMORY, TEXT, OUTPUT = "Model", "Speculation", "Memory", "Text", "Output"

Model = Annotated[
    Path | None,
    typer.Option(
        help="Directory of a Hugging Face checkpoint or of a pack (`moespac pack`).",
        rich_help_panel=MODEL,
        show_default="the embedded model",
    ),
]


@dataclass(frozen=True)
class DraftFlags:
    """Where drafted tokens come from."""

    draft: Annotated[
        Path | None,
        typer.Option(
            help="Directory of a draft model with the same vocabulary.",
            rich_help_panel=DRAFT,
            show_default="the embedded drafter for the embedded model, else prompt lookup",
        ),
    ] = None
    lookup: Annotated[
        bool,
        typer.Option("--lookup", help="Draft by prompt lookup: no second model.", rich_help_panel=DRAFT),
    ] = False
    no_draft: Annotated[
        bool, typer.Option("--no-draft", help="Decode without speculation.", rich_help_panel=DRAFT)
    ] = False
    window: Annotated[
        str,
        typer.Option(
            metavar="K|auto",
            help="Drafted tokens a pass; 0: no speculation; auto: as many as pay, by measurement.",
            rich_help_panel=DRAFT,
        ),
    ] = str(EngineConfig.window)

    def arguments(self) -> dict[str, Any]:
        """For ``moespac.load``. Raises ConfigError for more than one source of drafts."""
        if (self.draft is not None) + self.lookup + self.no_draft > 1:
            raise ConfigError("--draft, --lookup and --no-draft exclude each other: give one of them")
        source = "lookup" if self.lookup else "none" if self.no_draft else self.draft or "auto"
        return {"draft": source, "window": self._window()}

    def _window(self) -> int | str:
        if self.window == "auto":
            return "auto"
        if not self.window.isdecimal():
            raise ConfigError(f"--window {self.window}: give a number of tokens, 0 or more, or auto")
        return int(self.window)


@dataclass(frozen=True)
class MemoryFlags:
    """What the experts may take of each fast tier, and who decides what is there."""

    host_memory: Annotated[
        str,
        typer.Option(
            metavar="AMOUNT",
            help="Host memory for experts: bytes (2GiB, 500MB), percent of all experts (25%), or auto: what "
            "is free, with room for everything else.",
            rich_help_panel=MEMORY,
        ),
    ] = MemoryConfig.host_memory
    accelerator_memory: Annotated[
        str,
        typer.Option(
            metavar="AMOUNT",
            help="The same on the accelerator. An amount that does not fit the GPU beside trunk, drafter and KV "
            "caches is refused; auto takes what fits. Without a GPU an amount simulates one in this process.",
            rich_help_panel=MEMORY,
        ),
    ] = MemoryConfig.accelerator_memory
    accelerator_context: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="TOKENS",
            help="Prompt and answer whose KV caches fit the GPU beside the experts. Longer ones are no error: "
            "experts make way as they grow.",
            rich_help_panel=MEMORY,
        ),
    ] = DeviceConfig.context
    policy: Annotated[
        str,
        typer.Option(
            help="Who decides which experts are where: moe-spac, or a baseline.", rich_help_panel=MEMORY
        ),
    ] = EngineConfig.policy
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(
            help="What to compute in; auto: float32 on a CPU, bfloat16 on a GPU.", rich_help_panel=MODEL
        ),
    ] = "auto"

    def arguments(self) -> dict[str, Any]:
        """For ``moespac.load``."""
        return asdict(self)


@dataclass(frozen=True)
class ProfileFlags:
    """Whether what is learned about a model's routing outlives the run."""

    profile: Annotated[
        bool,
        typer.Option(
            "--profile/--no-profile",
            help="Start from what earlier runs learned about the model's routing, and keep what this one "
            "learns (in the user's cache directory).",
            rich_help_panel=MEMORY,
        ),
    ] = True

    def arguments(self) -> dict[str, Any]:
        """For ``moespac.load``."""
        return {"profile": "auto" if self.profile else None}


@dataclass(frozen=True)
class TimelineFlags:
    """Whether it is kept who did what when."""

    timeline: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write who did what when, for ui.perfetto.dev or chrome://tracing (JSON).",
            rich_help_panel=OUTPUT,
        ),
    ] = None

    @contextmanager
    def recording(self) -> Iterator[Record | None]:
        """Yields what ``Engine.record_timeline`` takes; the file is written in the end, however that comes.

        Raises ConfigError for a file that cannot be written, before anything is loaded.
        """
        from moespac.timeline import Timeline

        if self.timeline is None:
            yield None
            return
        file, kept = JsonFile(self.timeline, "--timeline"), Timeline(TimelineConfig.in_a_file)
        try:
            yield kept.record
        finally:
            file.write(kept.to_chrome(), compact=True)


@dataclass(frozen=True)
class TextFlags:
    """How much is generated, and how tokens are drawn."""

    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to generate at most.", rich_help_panel=TEXT)
    ] = 128
    temperature: Annotated[
        float, typer.Option(help="0: greedy; 1: the model's own distribution.", rich_help_panel=TEXT)
    ] = SamplingConfig.temperature
    top_k: Annotated[
        int, typer.Option(help="Draw from the k likeliest tokens only; 0: from all.", rich_help_panel=TEXT)
    ] = SamplingConfig.top_k
    top_p: Annotated[
        float,
        typer.Option(
            help="Draw from the likeliest tokens that together reach this probability; 1: from all.",
            rich_help_panel=TEXT,
        ),
    ] = SamplingConfig.top_p
    min_p: Annotated[
        float,
        typer.Option(
            help="Draw from tokens at least this share as likely as the likeliest; 0: from all.",
            rich_help_panel=TEXT,
        ),
    ] = SamplingConfig.min_p
    seed: Annotated[int, typer.Option(help="The same seed draws the same tokens.", rich_help_panel=TEXT)] = (
        SamplingConfig.seed
    )
    stop: Annotated[
        list[str],
        typer.Option(
            help="End before this string; may be given several times.",
            rich_help_panel=TEXT,
            show_default=False,
        ),
    ] = field(default_factory=list)

    def arguments(self) -> dict[str, Any]:
        """For ``Engine.stream``. Raises ConfigError for a value out of range, before any model is loaded."""
        SamplingConfig(self.temperature, self.top_k, self.top_p, self.min_p, self.seed)
        return asdict(self)
