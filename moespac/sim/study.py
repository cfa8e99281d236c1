"""Many simulations, several at once, and what they assume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from moespac.policy.baselines.belady import BeladyPolicy
from moespac.sim.capacity import excess_bytes
from moespac.sim.result import SimResult
from moespac.sim.simulator import PolicyFactory, Setting, build, check_fit, run, simulate
from moespac.trace.schema import Trace


@dataclass(frozen=True)
class Task:
    """One policy over some sequences of a trace."""

    policy: str
    setting: Setting
    sequences: tuple[int, ...]
    factory: PolicyFactory | None = None  # what stands for ``policy``; None: what has that name


def simulate_all(
    trace: Trace, tasks: Sequence[Task], jobs: int, progress: Callable[[int, int], None]
) -> list[SimResult]:
    """The results in the order of the tasks, ``jobs`` processes at work. ``progress`` is told how many of how many
    are done. Raises what ``simulate`` raises."""
    progress(0, len(tasks))
    if jobs == 1:
        results = []
        for done, task in enumerate(tasks, start=1):
            results.append(_simulate(trace, task))
            progress(done, len(tasks))
        return results
    with ProcessPoolExecutor(jobs) as pool:
        futures = [pool.submit(_simulate, trace, task) for task in tasks]
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()  # the first that failed ends the study
            progress(done, len(tasks))
    return [future.result() for future in futures]


def _simulate(trace: Trace, task: Task) -> SimResult:
    if task.factory is None:
        return simulate(trace, task.policy, task.setting, task.sequences)
    check_fit(trace, task.setting.model)
    return run(build(task.factory, task.setting), trace, task.setting, task.sequences)


def records(results: Sequence[SimResult], setting: Setting) -> list[dict[str, Any]]:
    """The results and where they were obtained, for JSON."""
    where = {
        "hardware": setting.hardware.name,
        "model": setting.model.name,
        "host_slots": setting.capacity.host,
        "accelerator_slots": setting.capacity.accelerator,
        "window": setting.window,
        "acceptance": setting.acceptance,
        "draft": setting.draft,
        "seed": setting.seed,
    }
    return [
        result.to_dict() | {"share_of_belady": share_of_bound(result, results)} | where for result in results
    ]


def share_of_bound(result: SimResult, results: Sequence[SimResult]) -> float | None:
    """How near ``result`` comes to belady's tokens a second; None where that is not among the results."""
    bound = next((other for other in results if other.policy == BeladyPolicy.name), None)
    return None if bound is None else result.tokens_per_second / bound.tokens_per_second


def assumptions(trace: Trace, setting: Setting) -> list[str]:
    """What a reader of the results must know, a line each."""
    hardware, prompt = setting.hardware, setting.assumed.prompt_tokens
    said = [f"routing: {trace.source}"]
    if not setting.window:
        said.append("nothing is drafted")
    elif trace.speculative:
        said.append("drafts and their acceptance are the recorded ones, for every policy that speculates")
    else:
        governed = ", ".join(sorted(setting.governed)) or "no policy"
        said += [
            f"acceptance is assumed: {setting.acceptance:g} for each draft, drawn with seed {setting.seed};"
            " rejected drafts have the routing of other tokens of the same text",
            f"K = {setting.window}, fixed; {governed} chooses 0 to {setting.window} itself,"
            " belady the best of them",
        ]
    if not trace.prefill.any():
        said.append(f"no prompts were recorded: each text's first {prompt} tokens are run as one")
    if setting.warm:
        said.append("memories begin with what each policy's own first plan holds, costs as measured")
    unknown = [name for name, source in hardware.sources.items() if source.startswith("UNKNOWN")]
    if unknown:
        said.append(f"{hardware.name}: {', '.join(unknown)} was not published and is fitted, see the profile")
    if excess := excess_bytes(hardware, setting.model, setting.capacity):
        said.append(
            f"{hardware.name} lacks {excess / 1e9:.1f} GB for this cache; simulated as if it had them"
        )
    return said
