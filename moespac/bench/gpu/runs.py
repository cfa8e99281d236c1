"""RUN: job after job, each in a worker of its own, while there is time."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from moespac.bench.decode.runs import Worker, package_versions
from moespac.bench.gpu.job import Job, Result
from moespac.bench.gpu.records import SKIPPED, GpuRecord

Keep = Callable[[GpuRecord], None]

_WORKER = "moespac.bench.gpu.worker"
_LEAST = 0.6  # of the seconds that a job is expected to take: with less left it is not begun
_MOST = 1.5  # of them, until its runs that have not begun are left out: others want time too


def run_all(
    jobs: Sequence[Job],
    seconds: float,
    keep: Keep,
    progress: Callable[[int, int], None],
    now: Callable[[], float] = time.monotonic,
    work: Callable[[Job, float], Iterator[GpuRecord]] | None = None,
) -> None:
    """Every job that there is time for in ``seconds``; each record is given to ``keep`` at once, and so is one for
    each run that was left out. ``work`` does a job within so many seconds; a worker process, unless it is given."""
    work = work or work_off
    end = now() + seconds
    total, finished = sum(len(each.runs) for each in jobs), 0
    progress(0, total)
    for each in jobs:
        left = end - now()
        if left < _LEAST * each.seconds:
            reason = f"{max(left, 0):.0f} of {seconds:.0f} s were left, and it takes about {each.seconds:.0f}"
            found: Iterator[GpuRecord] = (record_of(each, name, SKIPPED, reason) for name in each.runs)
        else:
            found = work(replace(each, seconds=min(_MOST * each.seconds, left)), left)
        for record in found:
            keep(record)
            finished += 1
            progress(finished, total)


def work_off(task: Job, left: float) -> Iterator[GpuRecord]:
    """A record for each of the task's runs, in order, in ``left`` seconds and some patience. When a run ends its
    worker, a fresh one goes on with those after it."""
    config = task.setting.config
    end = time.monotonic() + left
    for attempt in range(config.restarts + 1):
        seconds = max(min(task.seconds, end - time.monotonic()), 0.0)
        with Worker(_WORKER, replace(task, seconds=seconds).to_dict(), seconds + config.patience) as worker:
            done = 0
            for name in task.runs:
                started, start = _now(), time.monotonic()
                said = worker.receive("run")
                done += 1
                if said is None:
                    yield record_of(task, name, worker.status, worker.reason, started=started)
                    break
                result = Result.from_dict(said["result"]) if "result" in said else Result()
                record = record_of(task, name, said["status"], said.get("reason", ""), result, started)
                yield replace(record, seconds=time.monotonic() - start)
        task = replace(task, runs=task.runs[done:])
        if not task.runs:
            return
        if time.monotonic() >= end or attempt == config.restarts:
            break
    for name in task.runs:
        yield record_of(task, name, SKIPPED, "the runs before it used the time up, or ended too many workers")


def record_of(
    task: Job, name: str, status: str, reason: str, result: Result | None = None, started: str = ""
) -> GpuRecord:
    """Of one of the task's runs."""
    return GpuRecord(
        kind=task.kind,
        model=task.model,
        contender=name,
        budget=task.budget,
        status=status,
        setting=task.setting,
        layers=task.layers,
        wanted=task.tokens,
        versions=package_versions(),
        started=started or _now(),
        seconds=0.0,
        reason=reason,
        result=result or Result(),
    )


def _now() -> str:
    return datetime.datetime.now().isoformat(timespec="seconds")
