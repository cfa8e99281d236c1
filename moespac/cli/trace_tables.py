"""What is known of a trace, as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moespac.cli.tables import figure, share
from moespac.config import AnalysisConfig
from moespac.trace.analysis import Analysis
from moespac.trace.schema import Trace


def print_tables(console: Console, trace: Trace, analysis: Analysis) -> None:
    """Everything that ``moespac trace show`` says."""
    config = AnalysisConfig()
    for table in (
        _origin(trace, analysis),
        _locality(analysis, config),
        _windows(analysis),
        _lru(analysis, config),
    ):
        console.print(table)


def coverage_table(found: Sequence[dict[str, Any]]) -> Table:
    """``found``: the records of ``bench.coverage.compare``, the bound last."""
    best = found[-1]["coverage_tokens"]
    table = _table(
        "Coverage of the demand", "estimator", "of routings", "of distinct experts", "of the bound"
    )
    for record in found:
        tokens, experts = record["coverage_tokens"], record["coverage_experts"]
        table.add_row(record["estimator"], share(tokens), share(experts), share(tokens / best))
    return table


def _origin(trace: Trace, analysis: Analysis) -> Table:
    shape = trace.shape
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    drafted = int(trace.drafted.sum())
    rows = {
        "source": trace.source,
        "model": f"{shape.layers} MoE layers, {shape.experts} experts each, top {shape.top_k}",
        "text": f"{trace.sequences} sequences, {analysis.tokens} decoded tokens, "
        f"{int(np.diff(trace.pass_offsets)[trace.prefill].sum())} of prompts",
        "categories": ", ".join(f"{name} ({n})" for name, n in _categories(trace)) or "unknown",
        "speculation": f"{drafted} drafted, {share(trace.accepted.sum() / drafted)} accepted, "
        f"{len(trace.drafted)} passes"
        if trace.speculative
        else "none: one token a pass",
    }
    for label, value in rows.items():
        table.add_row(label, Text(value))
    return table


def _categories(trace: Trace) -> list[tuple[str, int]]:
    """Benchmarks, or categories where no benchmark is named, with their sequences."""
    names = (category.split("/")[0] for category in trace.categories)
    return Counter(name for name in names if name).most_common()


def _locality(analysis: Analysis, config: AnalysisConfig) -> Table:
    table = _table("Reuse and skew", "", "all layers", "lowest layer", "highest layer")
    table.add_row("next use, median in tokens", figure(analysis.median_reuse, "d"))
    table.add_row("used at the next token again", share(analysis.repeated_within(1)))
    table.add_row(f"used within {config.near} tokens again", share(analysis.repeated_within(config.near)))
    _add_layers(table, "entropy (even use: 100%)", analysis.entropy)
    even = share(1 / analysis.shape.experts)
    _add_layers(table, f"top expert's share (even: {even})", analysis.frequency[:, 0])
    return table


def _windows(analysis: Analysis) -> Table:
    table = _table("Windows of consecutive tokens", "tokens", "distinct experts", "of a layer's", "overlap")
    table.caption = "overlap: of a window's experts, those that the window before it used too"
    for length, unique, overlap in zip(analysis.lengths, analysis.unique, analysis.overlap, strict=True):
        mean = float(unique.mean())
        if np.isfinite(mean):
            shared = float(overlap.mean())
            table.add_row(
                str(length),
                f"{mean:.1f}",
                share(mean / analysis.shape.experts),
                share(shared if np.isfinite(shared) else None),
            )
    return table


def _lru(analysis: Analysis, config: AnalysisConfig) -> Table:
    table = _table(
        "LRU in each layer, token by token", "slots a layer", "hits", "lowest layer", "highest layer"
    )
    experts = analysis.shape.experts
    for slots in sorted({max(1, round(part * experts)) for part in config.slot_shares}):
        _add_layers(table, f"{slots} of {experts}", analysis.lru_hits[:, slots - 1])
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _add_layers(table: Table, label: str, values: NDArray[np.float64]) -> None:
    table.add_row(label, *(share(float(value)) for value in (values.mean(), values.min(), values.max())))
