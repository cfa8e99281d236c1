"""The records as a Markdown text: tables, ratios, where the time went, and how it was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moespac.bench.decode.contenders import OURS
from moespac.bench.decode.records import OK, Record
from moespac.bench.decode.summary import (
    Claim,
    Line,
    Ratio,
    causes_of,
    claims,
    lines,
    ratio,
    share_of_bound,
)
from moespac.config import DecodeBenchConfig


def markdown(records: Sequence[Record]) -> str:
    """A whole report. ``records`` are of one setting and at least one."""
    found = lines(records)
    parts = [
        "# Decoding, side by side",
        _setting(records),
        *(_budget(budget, found, records) for budget in sorted({r.budget for r in records}, reverse=True)),
        _claims(claims(found)),
        _curve(found),
        _causes([line for line in found if not line.contender.is_peer]),
        _absent(records),
        _method(DecodeBenchConfig()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _setting(records: Sequence[Record]) -> str:
    setting, versions = records[0].setting, records[-1].versions
    limits = [record.limits for record in records if record.limits]
    facts = [
        f"Model {setting['model']}: {setting['experts']} experts in {setting['format']},"
        f" {setting['expert_bytes'] / 1e6:.0f} MB together; {setting['prompts'].split()[0]} prompts,"
        f" {setting['tokens']} tokens decoded after each; {setting['threads']} threads on as many cores.",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in versions.items()) + ".",
    ]
    if limits:
        storage, memory = ([getattr(each, name) / 1e9 for each in limits] for name in ("storage", "memory"))
        facts.append(
            f"Measured between the runs: storage {_range(storage)} GB/s (whole records, 8 reads in flight),"
            f" memory {_range(memory)} GB/s."
        )
    return "\n\n".join(facts)


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low}–{high}"


def _budget(budget: float, found: Sequence[Line], records: Sequence[Record]) -> str:
    here = [line for line in found if line.budget == budget]
    if not here:
        return ""
    governed = (line for line in here if line.contender.system == OURS and line.contender.window is None)
    leader = next(governed, here[0])
    title = f"## Memory for {budget:.0%} of the experts"
    head = (
        "tokens/s",
        "lowest–highest",
        f"{leader.name} is faster",
        "first token, s",
        "MB read a token",
        "hits",
        "tokens a pass",
        "accepted",
        "bound, tokens/s",
        "of bound",
    )
    return f"{title}\n\n{_table(['contender', *head], [_row(line, leader) for line in here])}"


def _row(line: Line, leader: Line) -> list[str]:
    low, high = line.spread
    bound, share = line.median_or_none(lambda record: record.bound), share_of_bound(line)
    return [
        line.name,
        f"{line.rate:.2f}",
        f"{low:.2f}–{high:.2f}",
        "" if line is leader else _times(ratio(leader, line)),
        f"{line.median(lambda record: record.first_seconds):.2f}",
        f"{line.median(lambda record: record.read_per_token) / 1e6:.1f}",
        _percent(line.median_or_none(lambda record: record.hit_rate)),
        f"{line.median(lambda record: record.tokens_per_pass):.2f}",
        _percent(line.median_or_none(lambda record: record.acceptance)),
        "" if bound is None else f"{bound:.1f}",
        "" if share is None else f"{share.value:.0%}",
    ]


def _claims(checked: Sequence[Claim]) -> str:
    rows = []
    for claim in checked:
        verdict = {True: "yes", False: "**no**", None: "not measured"}[claim.holds]
        rows.append([claim.text, claim.who, _times(claim.ratio), f"{claim.wanted:g}", verdict])
    if not rows:
        return ""
    head = ["what is compared", "who", "ratio (median, range over rounds)", "wanted", "holds"]
    return f"## Ratios\n\n{_table(head, rows)}"


def _times(value: Ratio | None) -> str:
    if value is None:
        return ""
    spread = f" ({value.low:.2f}–{value.high:.2f})" if value.rounds > 1 else ""
    return f"{value.value:.2f}×{spread}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _curve(found: Sequence[Line]) -> str:
    """Tokens/s by budget, where there is more than one."""
    budgets = sorted({line.budget for line in found}, reverse=True)
    if len(budgets) < 2:
        return ""
    rates = {(line.name, line.budget): line.rate for line in found}
    names = dict.fromkeys(line.name for line in found)
    rows = [
        [name, *(f"{rates[name, budget]:.2f}" if (name, budget) in rates else "" for budget in budgets)]
        for name in names
    ]
    head = ["tokens/s with memory for", *(f"{budget:.0%}" for budget in budgets)]
    return f"## As memory shrinks\n\n{_table(head, rows)}"


def _causes(found: Sequence[Line]) -> str:
    """Milliseconds a decoded token, this engine's runs."""
    causes = causes_of(found)
    if not causes:
        return ""
    rows = [
        [line.name, f"{line.budget:.0%}", *(f"{1e3 * line.cause(cause):.1f}" for cause in causes)]
        for line in found
    ]
    head = ["ms a token", "memory", *(cause.replace("_", " ") for cause in causes)]
    return f"## Where this engine's time went\n\n{_table(head, rows)}"


def _absent(records: Sequence[Record]) -> str:
    """A line for each contender that did not come to a result, and for each that ran out of time."""
    said = dict.fromkeys([*_failures(records), *_cut_short(records)])
    return "## Not measured, or cut short\n\n" + "\n".join(f"- {line}" for line in said) if said else ""


def _failures(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        if record.status != OK:
            where = "" if record.reason.startswith("not installed") else f" at {record.budget:.0%}"
            yield f"{record.contender}{where}: {record.reason}"


def _cut_short(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        texts = int(record.setting["prompts"].split()[0])
        if record.status == OK and record.tokens < texts * record.setting["tokens"]:
            yield (
                f"{record.contender} at {record.budget:.0%}: its time was up after {record.tokens} tokens of"
                f" {len(record.texts)} prompts; its rate is of these"
            )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *rows])


_METHOD = """## How it was measured

- Each contender runs in a fresh process, in turn, once a round; figures are medians over the rounds, ratios are
  taken within each round first. All decode the same number of tokens greedily after the same token ids and do not
  stop at an end of text. Tokens a second are of decoding alone: the first token of each prompt, and loading, do not
  count.
- Memory: below 100% another process locks memory until what is left for a contender's experts, in its own memory or
  in the page cache, is the given share of all packed experts. Its process without experts comes on top, and so does
  a margin of {margin} MB for the kernel. The limit is set once the contender is loaded and has decoded two tokens;
  its code and data are then locked in memory, so that experts are all that the limit concerns. All files of the
  model are dropped from the page cache before it starts.
- One prompt warms up before the measured ones: caches fill, pages are mapped.
- moe-spac with drafts chooses K by itself; baselines with drafts have K = {window}. llama.cpp+draft drafts up to
  {most} tokens, as long as the draft model is {sure:.0%} sure (its own defaults); +lookup is llama-cpp-python's
  prompt lookup with its defaults. llama.cpp maps its file (mmap); llama.cpp-ram loads it, in the layout that it
  computes fastest.
- llama.cpp's file holds the same weights as F32, BF16, Q8_0 or Q4_0 for f32, bf16, int8 and int4. transformers
  computes in bfloat16; +disk leaves to accelerate what does not fit the same number of bytes.
- The bound of a run: the experts that a clairvoyant cache of the same size would still have read for its passes,
  over the storage bandwidth, or the weights of all active experts over the memory bandwidth, whichever is longer.
  Each prompt's decoding starts with the best possible content of memory."""


def _method(config: DecodeBenchConfig) -> str:
    return _METHOD.format(
        margin=config.margin_bytes >> 20,
        window=config.baseline_window,
        most=config.llama_draft_most,
        sure=config.llama_draft_probability,
    )
