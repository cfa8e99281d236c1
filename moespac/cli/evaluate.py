"""``moespac eval``: perplexity of a model, beside that of the original it was packed from; or a harness's tasks."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moespac.cli.bars import counting, loaded
from moespac.cli.files import JsonFile, read_text
from moespac.cli.flags import MODEL, TEXT, MemoryFlags, Model
from moespac.cli.spread import spread
from moespac.errors import ConfigError

if TYPE_CHECKING:
    from moespac.evaluate import Perplexity

TASKS = "Tasks"

Against = Annotated[
    Path | None,
    typer.Option(help="Directory of the original, to compare with: same tokenizer.", rich_help_panel=MODEL),
]
TextFile = Annotated[
    Path | None,
    typer.Option("--text", help="A UTF-8 text to predict; - for standard input.", rich_help_panel=TEXT),
]


@dataclass(frozen=True)
class TaskFlags:
    """What lm-evaluation-harness is to run."""

    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Tasks with commas between them.", rich_help_panel=TASKS),
    ] = None
    task_directory: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Tasks of your own, as YAML files.", rich_help_panel=TASKS),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Documents of each task.", show_default="all", rich_help_panel=TASKS),
    ] = None
    shots: Annotated[
        int | None,
        typer.Option(
            min=0, help="Examples before each question.", show_default="the task's", rich_help_panel=TASKS
        ),
    ] = None
    json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the tasks' scores here.", rich_help_panel=TASKS),
    ] = None


@spread
def evaluate(
    *,
    model: Model = None,
    against: Against = None,
    text: TextFile = None,
    max_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens of the text to use at most.", rich_help_panel=TEXT)
    ] = 4096,
    context: Annotated[
        int, typer.Option(min=1, help="Tokens a window; windows do not overlap.", rich_help_panel=TEXT)
    ] = 512,
    tasks: TaskFlags,
    memory: MemoryFlags,
) -> None:
    """Perplexity of a model on a text, with --against how much quantised experts cost; or a harness's tasks.

    --tasks runs lm-evaluation-harness over the engine; it comes with the extra "eval".
    """
    if (text is None) == (tasks.tasks is None):
        raise ConfigError(
            "give --text FILE for a perplexity, or --tasks NAMES for a harness's tasks; one of them"
        )
    if text is None:
        return _run_tasks(model, tasks, memory)
    words = read_text(text, "--text")
    settings = memory.arguments() | {"draft": "none", "profile": None}
    results = {"model": _measure(model, words, max_tokens, context, settings)}
    if against is not None:
        results["original"] = _measure(against, words, max_tokens, context, settings)
        if results["original"].token_ids != results["model"].token_ids:
            raise ConfigError(
                f"--against {against}: has another tokenizer, so nothing compares; name the original"
            )
    Console().print(_table(results))


def _run_tasks(model: Path | None, flags: TaskFlags, memory: MemoryFlags) -> None:
    try:
        from moespac.harness import evaluate_tasks
    except ImportError:
        raise ConfigError("--tasks needs lm-evaluation-harness: pip install 'moespac[eval]'") from None
    names = [name.strip() for name in (flags.tasks or "").split(",") if name.strip()]
    if not names:
        raise ConfigError("--tasks: names no task; `lm-eval ls tasks` lists them")
    file = JsonFile(flags.json, "--json") if flags.json else None
    with loaded(model, memory.arguments() | {"profile": None}) as engine, counting("answering") as progress:
        found = evaluate_tasks(engine, names, flags.task_directory, flags.limit, flags.shots, progress)
    table = Table("task", "metric", "value")
    for task, metrics in found.items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                table.add_row(Text(task), Text(metric.removesuffix(",none")), f"{value:.4f}")
    Console().print(table)
    if file:
        file.write(found)


@dataclass(frozen=True)
class _Result:
    name: str
    token_ids: list[int]
    perplexity: Perplexity


def _measure(
    path: Path | None, words: str, max_tokens: int, context: int, settings: dict[str, Any]
) -> _Result:
    from moespac.evaluate import perplexity

    name = "the embedded model" if path is None else str(path)
    with loaded(path, settings) as engine:
        if engine.tokenizer is None:
            raise ConfigError(f"{name}: has no tokenizer to read a text with; add its tokenizer files")
        if context > engine.context:
            raise ConfigError(f"--context {context}: {name} takes {engine.context} tokens; give at most that")
        token_ids = engine.tokenizer.encode(words)[:max_tokens]
        with counting(name) as progress:
            return _Result(name, token_ids, perplexity(engine.model, token_ids, context, progress))


def _table(results: dict[str, _Result]) -> Table:
    table = Table("", "nats a token", "perplexity", "tokens")
    for role, result in results.items():
        found = result.perplexity
        name = Text(f"{role}: {result.name}")  # a path may hold brackets, which rich would take for markup
        table.add_row(name, f"{found.nats:.4f}", f"{found.ppl:.3f}", str(found.tokens))
    if "original" in results:
        model, original = (results[role].perplexity for role in ("model", "original"))
        lost = model.nats - original.nats
        table.add_row("model / original", f"{lost:+.4f}", f"{exp(lost):.4f}", "")
    return table
