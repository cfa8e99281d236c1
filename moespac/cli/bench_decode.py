"""``moespac bench decode``: this engine beside llama.cpp, transformers and its own baselines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moespac.cli.bars import counting
from moespac.cli.files import ResultFile
from moespac.cli.shares import share_of_experts
from moespac.config import DecodeBenchConfig
from moespac.errors import ConfigError

if TYPE_CHECKING:
    from moespac.bench.decode.prompts import Text
    from moespac.bench.decode.records import Record
    from moespac.bench.decode.runs import Plan

_MODEL, _RUNS, _RESULTS = "Model", "Runs", "Results"


def decode(
    work: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Where the model goes, on the disk to measure; what is there already is used again.",
            rich_help_panel=_MODEL,
        ),
    ] = Path("bench-results/decode"),
    factor: Annotated[
        int,
        typer.Option(min=1, help="How many times as wide the experts become.", rich_help_panel=_MODEL),
    ] = DecodeBenchConfig.factor,
    format: Annotated[
        Literal["f32", "bf16", "int8", "int4"],
        typer.Option(help="How experts are stored, by us and in llama.cpp's file.", rich_help_panel=_MODEL),
    ] = "int8",
    budgets: Annotated[
        str,
        typer.Option(
            "--budgets",
            "--budget",
            metavar="SHARES",
            help="Shares of all experts that memory has room for, with commas between: 100,75,50,25,10 gives the"
            " curve. Below 100 memory is locked to leave no more.",
            rich_help_panel=_RUNS,
        ),
    ] = "100,25",
    contenders: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="With commas between: llama.cpp, llama.cpp-ram, transformers, transformers+disk, moe-spac or"
            " another policy; all but transformers also with +draft or +lookup, a policy with +draft@2 (K = 2).",
            rich_help_panel=_RUNS,
            show_default="a dozen",
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="How often each contender runs.", rich_help_panel=_RUNS)
    ] = DecodeBenchConfig.rounds,
    tokens: Annotated[
        int, typer.Option(min=2, help="Decoded after each prompt.", rich_help_panel=_RUNS)
    ] = DecodeBenchConfig.tokens,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Lines of JSON, each with "turns" (the first is asked) or "prompt".',
            rich_help_panel=_RUNS,
            show_default="six of our own",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="And as many cores, for each contender.",
            rich_help_panel=_RUNS,
            show_default="all physical cores",
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="A line of JSON a run, added to what the file holds.",
            rich_help_panel=_RESULTS,
            show_default="DIR/decode.jsonl",
        ),
    ] = None,
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
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the report here, in Markdown.",
            rich_help_panel=_RESULTS,
            show_default="the terminal",
        ),
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Draw the results here.", rich_help_panel=_RESULTS, show_default=False
        ),
    ] = None,
) -> None:
    """Tokens a second of this engine, its baselines, llama.cpp and transformers, in turn, under one memory limit.

    The model is the embedded pair with wider experts. Peers come with the extra "bench". Close what else is
    running. Ctrl-C keeps the runs so far.
    """
    from moespac.bench.decode.records import read_records

    report_file = ResultFile(report, "--report") if report else None
    if source is None:
        shares = _shares(budgets)
        plan = _plan(work, factor, format, shares, contenders, rounds, tokens, prompts, threads)
        source = json or work / "decode.jsonl"
        _run(plan, source)
        records = read_records(source, "--json")
    else:
        records = read_records(source, "--from")
    if not records:
        raise ConfigError(f"{source}: holds no records; run something first")
    _show(records, report_file, plots)


def _shares(text: str) -> list[float]:
    """Each once, in the order given. Raises ConfigError."""
    parts = [part.strip().removesuffix("%") for part in text.split(",") if part.strip()]
    if not parts:
        raise ConfigError("--budgets: names no share; give some like 100,25")
    return list(dict.fromkeys(share_of_experts(f"{part}%", "--budgets") for part in parts))


def _plan(
    work: Path,
    factor: int,
    format: str,
    shares: Sequence[float],
    names: str | None,
    rounds: int,
    tokens: int,
    prompts: Path | None,
    threads: int | None,
) -> Plan:
    """All that can be wrong is found here, before any run; then the model is made."""
    from moespac.bench.decode.contenders import DEFAULT, parse_contenders

    chosen = parse_contenders(",".join(DEFAULT) if names is None else names)
    texts = read_texts(prompts)

    from moespac.bench.decode.files import make_files
    from moespac.bench.decode.prompts import WARMUP, tokenize
    from moespac.bench.decode.runs import Plan

    files = make_files(work, factor, format, gguf=any(c.is_llama and not c.missing for c in chosen))
    return Plan(
        files,
        chosen,
        shares,
        rounds,
        prompts=tokenize(texts, files.checkpoint),
        warmup=tokenize([WARMUP], files.checkpoint)[0],
        tokens=tokens,
        threads=threads or _physical_cores(),
        format=format,
        config=DecodeBenchConfig(),
    )


def read_texts(prompts: Path | None) -> Sequence[Text]:
    """Of the file, or our own. Raises ConfigError."""
    from moespac.bench.decode.prompts import BUILT_IN, Text
    from moespac.cli.prompts import read_prompts

    if prompts is None:
        return BUILT_IN
    return [Text(each.category, each.text, each.chat) for each in read_prompts(prompts, "--prompts")]


def _physical_cores() -> int:
    import psutil

    usable = len(psutil.Process().cpu_affinity() or [0])
    return min(psutil.cpu_count(logical=False) or usable, usable)


def _run(plan: Plan, file: Path) -> None:
    """Add a record a run to ``file``. Raises ConfigError for a file of another setting."""
    from moespac.bench.decode.records import check_same, read_records
    from moespac.bench.decode.runs import run_all

    ResultFile(file, "--json")
    before = read_records(file, "--json") if file.exists() else []
    if before:
        check_same(before[0].setting, plan.setting, f"--json {file}")

    def keep(record: Record) -> None:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(record.to_json() + "\n")

    try:
        with counting("decode") as progress:
            run_all(plan, before, keep, progress)
    except KeyboardInterrupt:
        typer.echo(f"stopped; the runs so far are in {file}", err=True)


def _show(records: Sequence[Record], report: ResultFile | None, plots: Path | None) -> None:
    from moespac.bench.decode.report import markdown

    text = markdown(records)
    if report is None:
        typer.echo(text, nl=False)
    else:
        report.write_bytes(text.encode("utf-8"))
    if plots is not None:
        from moespac.bench.decode.plots import draw_all

        for picture in draw_all(records, plots):
            typer.echo(f"wrote {picture}", err=True)
