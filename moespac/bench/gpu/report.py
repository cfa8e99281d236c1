"""The records as a Markdown text: goals, tables, what was left out, and how it was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from moespac.bench.gpu import job
from moespac.bench.gpu.records import GpuRecord
from moespac.bench.gpu.tables import TextTable, all_tables
from moespac.bench.gpu.timing import KERNELS, LANE
from moespac.config import GpuBenchConfig, SimulationConfig


def markdown(records: Sequence[GpuRecord], pictures: Sequence[Path] = ()) -> str:
    """A whole report. ``records`` are of one setting and at least one; ``pictures`` lie beside the text."""
    parts = [
        "# moespac on an accelerator",
        _setting(records),
        *(_section(table) for table in all_tables(records)),
        "\n\n".join(f"![{file.stem}]({file.name})" for file in pictures),
        _notes(records),
        _absent(records),
        _method(records[0].setting.config),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _setting(records: Sequence[GpuRecord]) -> str:
    setting, config, versions = records[0].setting, records[0].setting.config, records[-1].versions
    device = _figure(records, "device") or setting.device
    link = _figure(records, "link_bandwidth")
    drafts = "at a real draft model's cost" if setting.draft == "model" else "at no cost, as prompt lookup's"
    facts = [
        f"Device: {device}."
        + (f" Its link alone: {link / 1e9:.1f} GB/s." if link else "")
        + (" **A quick run in small: its figures say nothing.**" if setting.quick else ""),
        f"Model of Qwen3-30B-A3B's shape: {setting.layers} of {GpuBenchConfig.layers} layers of {config.experts}"
        f" experts, top-{config.top_k}, {setting.format}; random weights. Routing: {setting.trace}. Drafts are"
        f" right with probability {setting.acceptance:g} each, by replay, {drafts}. {setting.tokens} tokens of"
        f" each text, seed {setting.seed}.",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in versions.items()) + ".",
    ]
    return "\n\n".join(facts)


def _figure(records: Sequence[GpuRecord], name: str):  # -> str | float | None
    found = [r.result.figures.get(name) for r in records if r.kind == job.LINK_JOB and r.ok]
    return found[-1] if found else None


def _section(table: TextTable) -> str:
    rule = ["---", *["---:"] * (len(table.head) - 1)]
    rows = [
        [f"**{cell}**" if at in table.ours and cell else cell for cell in row]
        for at, row in enumerate(table.rows)
    ]
    lines = [f"| {' | '.join(cells)} |" for cells in [table.head, rule, *rows]]
    return f"## {table.title}\n\n" + "\n".join(lines)


def _notes(records: Sequence[GpuRecord]) -> str:
    said = [
        f"- {r.contender}, {r.model} at {r.budget:.0%}: {note}" for r in records for note in r.result.notes
    ]
    return "## Notes\n\n" + "\n".join(dict.fromkeys(said)) if said else ""


def _absent(records: Sequence[GpuRecord]) -> str:
    said = list(dict.fromkeys([*_failures(records), *_cut_short(records)]))
    return "## Not measured, or cut short\n\n" + "\n".join(f"- {line}" for line in said) if said else ""


def _failures(records: Sequence[GpuRecord]) -> Iterator[str]:
    """One line for runs that were left out for the same reason."""
    groups: dict[tuple[str, float, str, str], list[str]] = {}
    for record in records:
        if not record.ok:
            groups.setdefault((record.model, record.budget, record.status, record.reason), []).append(
                record.contender
            )
    for (model, budget, status, reason), names in groups.items():
        yield f"{', '.join(names)} ({model} at {budget:.0%}), {status}: {reason}"


def _cut_short(records: Sequence[GpuRecord]) -> Iterator[str]:
    for record in records:
        wanted = record.wanted * len(record.texts)
        if record.timed and record.tokens < wanted:
            yield (
                f"{record.contender} ({record.model} at {record.budget:.0%}): its time was up after"
                f" {record.tokens} tokens; its rate is of these"
            )


_METHOD = """## How it was measured

- One process loads a model for all runs of a share; each contender finds all experts in host memory, an empty
  accelerator and a policy that has learned nothing, and warms up with {warmup} tokens of another text. Tokens a
  second are of decoding alone. A run ends after {seconds:g} s, or two passes: the rate is then that of the
  tokens it came to.
- Policies run in this engine: its kernels, its transfers, its trunk for all of them. So a policy's row says
  what its decisions are worth here, not how fast the program is that it comes from. llama.cpp, accelerate and
  vllm-offload in that list are policies; "transformers + accelerate", "transformers, compiled" and "llama.cpp,
  CUDA" are programs.
- Baselines whose systems speculate draft {window} tokens a pass; moe-spac's governor chooses. All are given the
  same text, the same right and wrong drafts, and for a wrong draft the routing of another token of the text.
  Policies that see the drafter's routing see it right {draft_routing:.0%} of the time; those that ask the next
  layer's router are answered with the routing to come, which is generous.
- The shape's experts are one random record; each has its own copy in host memory and on the accelerator.
- Hits: active experts that were resident where they were computed, on either device.
- Link: bytes over the time in which a copy ran, in {watched} tokens decoded after what was timed; beside it the
  bandwidth of large copies alone.
- Device busy: {busy}. For moe-spac on a GPU: {kernels}.
- Peak: tensors of this process on the device, trunk, drafter and KV cache among them; CUDA's own memory is not.
- The standard baselines are those that the paper's mean is over. The best speculative baseline is the fastest that
  drafted."""


def _method(config: GpuBenchConfig) -> str:

    return _METHOD.format(
        warmup=config.warmup_tokens,
        seconds=config.decode_seconds,
        window=config.window,
        draft_routing=SimulationConfig().draft_routing_accuracy,
        watched=config.watched_tokens,
        busy=LANE,
        kernels=KERNELS,
    )
