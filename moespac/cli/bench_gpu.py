"""``moespac bench gpu``: everything that is claimed of a machine with an accelerator, in ten minutes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moespac.cli.bars import counting
from moespac.cli.files import ResultFile
from moespac.cli.shares import share_of_experts
from moespac.config import GpuBenchConfig
from moespac.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from moespac.bench.gpu.job import Setting
    from moespac.bench.gpu.jobs import Wish
    from moespac.bench.gpu.records import GpuRecord
    from moespac.bench.gpu.tables import TextTable

_MODEL, _RUNS, _RESULTS = "Model", "Runs", "Results"
_RECORDS = "gpu.jsonl"
_WIDE = 130  # columns of a terminal for whole tables; narrower ones show less of them
_NAME = 26  # characters of a contender's name, in one line


def gpu(
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="gpu.jsonl, report.md and plots go here; records that are there already are added to.",
            rich_help_panel=_RESULTS,
        ),
    ] = Path("bench-results/gpu"),
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the models go, some 5 GB; what is there already is used again.",
            rich_help_panel=_MODEL,
            show_default="DIR of --out, work",
        ),
    ] = None,
    device: Annotated[
        Literal["auto", "cuda", "cpu"],
        typer.Option(help="cpu: the accelerator is played by this process.", rich_help_panel=_RUNS),
    ] = "auto",
    minutes: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="What there is no time for is left out, the least important first.",
            rich_help_panel=_RUNS,
        ),
    ] = 9.0,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="All of it in small, to see that it runs; its figures say nothing.",
            rich_help_panel=_RUNS,
        ),
    ] = False,
    budgets: Annotated[
        str,
        typer.Option(
            metavar="SHARES",
            help="Shares of all experts that the accelerator has room for, the most important first.",
            rich_help_panel=_RUNS,
        ),
    ] = "17,25,50",
    contenders: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Policies, with semicolons between: moe-spac; moe-spac, K = 0; sp-moe.",
            rich_help_panel=_RUNS,
            show_default="all",
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Of the model of Qwen3-30B-A3B's shape.",
            rich_help_panel=_MODEL,
            show_default="as many of 48 as fit memory",
        ),
    ] = None,
    format: Annotated[
        Literal["bf16", "int8", "int4"],
        typer.Option(help="Of that model's experts.", rich_help_panel=_MODEL),
    ] = "bf16",
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="TRACE",
            help="Recorded routing to replay, of the model's shape.",
            rich_help_panel=_MODEL,
            show_default="synthetic, with the locality of Qwen3-30B-A3B's",
        ),
    ] = None,
    acceptance: Annotated[
        float,
        typer.Option(min=0, max=1, help="Of each replayed draft.", rich_help_panel=_MODEL),
    ] = 0.8,
    draft: Annotated[
        Literal["model", "lookup"],
        typer.Option(
            help="What replayed drafts cost: a model of Qwen3-0.6B's shape runs for its time, or nothing.",
            rich_help_panel=_MODEL,
        ),
    ] = "model",
    tokens: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Decoded of each text at most.",
            rich_help_panel=_RUNS,
            show_default="64; 12 with --quick",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.", rich_help_panel=_MODEL)] = 0,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Run nothing: report these records.",
            rich_help_panel=_RESULTS,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Tokens a second of this engine under every policy, beside transformers and llama.cpp, on an accelerator.

    A model of Qwen3-30B-A3B's shape with replayed routing and acceptance, and the embedded pair with its own. Needs
    no network and no model. One line of JSON a run is added as it ends: what was measured is not lost. Goals first.
    """
    from moespac.bench.gpu.records import read_records

    _make(out, "--out")
    if source is None:
        setting = _setting(
            device, quick, layers, format, trace, acceptance, draft, tokens, seed, _shares(budgets)
        )
        wish = _wish(setting, budgets, work or out / "work", contenders)
        source = out / _RECORDS
        _run(wish, minutes * 60, source)
        records = read_records(source, "--out")
    else:
        records = read_records(source, "--from")
    if not records:
        raise ConfigError(f"{source}: holds no records; run something first")
    _show(records, out)


def _shares(text: str) -> list[float]:
    """Each once, in the order given. Raises ConfigError."""
    parts = [part.strip().removesuffix("%") for part in text.split(",") if part.strip()]
    if not parts:
        raise ConfigError("--budgets: names no share; give some like 17,25,50")
    return list(dict.fromkeys(share_of_experts(f"{part}%", "--budgets") for part in parts))


def _setting(
    device: str,
    quick: bool,
    layers: int | None,
    format: str,
    trace: Path | None,
    acceptance: float,
    draft: str,
    tokens: int | None,
    seed: int,
    budgets: Sequence[float],
) -> Setting:
    """With what was left open decided. Raises ConfigError."""
    import torch

    from moespac.bench.gpu.job import Setting
    from moespac.bench.gpu.jobs import layers_that_fit
    from moespac.host_memory import free_bytes

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: torch finds no CUDA device here; give --device cpu --quick to try it"
        )
    config = GpuBenchConfig.quick() if quick else GpuBenchConfig()
    card = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None
    fit = layers_that_fit(config, format, max(budgets), free_bytes(), card)
    if (layers or 2) > fit:
        raise ConfigError(
            f"memory has room for {fit} layers of this model; give --layers less, --format int4 or --quick"
        )
    return Setting(
        device=device,
        quick=quick,
        layers=min(layers or fit, config.layers),
        format=format,
        tokens=tokens or (12 if quick else 64),
        acceptance=acceptance,
        draft=draft,
        trace=str(trace) if trace else "synthetic",
        seed=seed,
    )


def _wish(setting: Setting, budgets: str, work: Path, contenders: str | None) -> Wish:
    """All that can be wrong is found here, before any run."""
    from moespac.bench.gpu.contenders import contender
    from moespac.bench.gpu.jobs import Wish
    from moespac.bench.gpu.shape import record_bytes
    from moespac.bench.gpu.stage import replayed_trace
    from moespac.types import ModelShape

    config = setting.config
    names = [name.strip() for name in (contenders or "").split(";") if name.strip()]
    for name in names:
        contender(name, config.window)
    shape = ModelShape(setting.layers, config.experts, config.top_k, record_bytes(config, setting.format))
    if setting.trace != "synthetic":
        replayed_trace(setting, shape)
    _make(work, "--work")
    return Wish(setting, _shares(budgets), str(work.resolve()), names)


def _make(folder: Path, flag: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{flag} {folder}: cannot be used ({error.strerror}); name another folder"
        ) from None


def _run(wish: Wish, seconds: float, file: Path) -> None:
    """Add a record a run to ``file``. Raises ConfigError for a file of another setting."""
    from moespac.bench.decode.records import check_same
    from moespac.bench.gpu.jobs import jobs_of
    from moespac.bench.gpu.records import SKIPPED, read_records
    from moespac.bench.gpu.runs import run_all

    ResultFile(file, "--out")
    before = read_records(file, "--out") if file.exists() else []
    if before:
        check_same(vars(before[0].setting), vars(wish.setting), f"--out {file}")

    left_out = ""  # said last

    def keep(record: GpuRecord) -> None:
        nonlocal left_out
        with file.open("a", encoding="utf-8") as stream:
            stream.write(record.to_json() + "\n")
        if record.status == SKIPPED:
            said = f"{record.model} {record.budget:.0%} is left out: {record.reason}"
            if said != left_out:
                typer.echo(said, err=True)
            left_out = said
            return
        rate = f"{record.rate:.2f} tokens/s" if record.timed else record.reason or record.status
        typer.echo(f"{record.model} {record.budget:.0%}  {record.contender}: {rate}", err=True)

    try:
        with counting("gpu") as progress:
            run_all(jobs_of(wish), seconds, keep, progress)
    except KeyboardInterrupt:
        typer.echo(f"stopped; the runs so far are in {file}", err=True)


def _show(records: Sequence[GpuRecord], out: Path) -> None:
    """Tables on the terminal, the report and the plots into ``out``; without matplotlib no plots."""
    from rich.console import Console

    from moespac.bench.gpu.plots import draw_all
    from moespac.bench.gpu.report import markdown
    from moespac.bench.gpu.tables import all_tables

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _WIDE)
    for table in all_tables(records):
        console.print(_rich(table, console.width < _WIDE))
    pictures: list[Path] = []
    try:
        pictures = draw_all(records, out)
    except ConfigError as reason:
        typer.echo(f"no plots: {reason}", err=True)
    report = ResultFile(out / "report.md", "--out")
    report.write_bytes(markdown(records, pictures).encode("utf-8"))
    for file in (out / "report.md", *pictures):
        typer.echo(f"wrote {file}", err=True)


def _rich(table: TextTable, narrow: bool) -> Table:
    from rich.table import Table

    shown = Table(title=table.title, title_justify="left")
    kept = [at for at, name in enumerate(table.head) if not (narrow and name in table.spare)]
    for at in kept:
        least = 0 if at else min(max(len(row[0]) for row in table.rows), _NAME)
        shown.add_column(table.head[at], justify="right" if at else "left", min_width=least)
    for at, row in enumerate(table.rows):
        shown.add_row(*(row[column] for column in kept), style="bold" if at in table.ours else None)
    return shown
