"""A summary as a table, and figures as people read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from moespac.engine.summary import Summary


def summary_table(summary: Summary) -> Table:
    """What a generation cost and where the time went."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    rows = {
        "tokens": f"{len(summary.token_ids)} new, {summary.prompt_tokens} of prompt; {summary.finish_reason}",
        "speed": f"{figure(summary.tokens_per_second, '.1f')} tokens/s decoding",
        "acceptance": f"{share(summary.acceptance_rate)} of drafts; {summary.drafter}, K = {summary.window}",
        "accepted length": f"{figure(summary.mean_accepted, '.2f')} tokens a pass, {summary.passes} passes",
        "hit rate": f"{share(summary.hit_rate)} of active experts; {summary.policy}",
        "read": by_name(summary.bytes_read),
        "peak experts": by_name(summary.peak_bytes),
        **_accelerator(summary),
        "time": _times(summary.seconds),
        "exactness": summary.exactness,
    }
    for label, value in rows.items():
        table.add_row(label, Text(value))
    return table


def _accelerator(summary: Summary) -> dict[str, str]:
    """What is worth a line of the way to the accelerator, and of its memory."""
    rows = {}
    if summary.link_bandwidth is not None:
        rows["link"] = f"{summary.link_bandwidth / 1e9:.1f} GB/s while it is busy"
        if summary.page_locked is not None:
            rows["link"] += f"; {summary.page_locked:.0%} of host memory is page-locked"
    if summary.shrinks:
        rows["out of memory"] = f"{summary.shrinks} times; experts made way on the accelerator"
    return rows


def figure(value: float | None, format: str) -> str:
    return "n/a" if value is None else f"{value:{format}}"


def share(value: float | None) -> str:
    return figure(value, ".1%")


def by_name(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size(nbytes)}" for name, nbytes in sizes.items())


def size(nbytes: int) -> str:
    """Bytes in decimal units, three digits."""
    amount, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 999.5:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.3g} {unit}"


def rate(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"


def _times(seconds: dict[str, float]) -> str:
    """Seconds by cause, the largest first, with their shares of the total."""
    causes = {cause: spent for cause, spent in seconds.items() if cause != "total"}
    total = seconds["total"]
    ordered = sorted(causes.items(), key=lambda item: -item[1])
    shown = (
        (cause, spent) for cause, spent in ordered if spent > total / 200
    )  # what rounds to 0% says nothing
    shares = [f"{spent:.2f} s ({spent / total:.0%}) {cause}" for cause, spent in shown]
    return "\n".join([f"{total:.2f} s", *shares])
