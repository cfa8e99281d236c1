"""One job in a process of its own, so that its memory and its failures are its own.

Reads a ``Job`` as one line of JSON; says ``{"run": {...}}`` for each of its runs, in order. What libraries print
goes to standard error.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from moespac.bench.decode.worker import be_expendable, own_stdout
from moespac.bench.gpu import exactness, job, link, peers
from moespac.bench.gpu.contenders import contender
from moespac.bench.gpu.job import SHAPE, Job, Result
from moespac.bench.gpu.records import FAILED, MISSING, OK, SKIPPED
from moespac.bench.gpu.stage import Stage, fill_accelerator, pair_stage, shape_stage
from moespac.bench.gpu.timing import time_engine
from moespac.bench.paper import OURS_PLAIN
from moespac.errors import MoespacError

Message = dict[str, Any]

_OTHERS: dict[str, Callable[[Job], Result]] = {
    job.OFFLOAD_JOB: peers.time_offload,
    job.COMPILED_JOB: peers.time_compiled,
    job.LLAMA_JOB: peers.time_llama,
    job.LINK_JOB: link.measure_link,
    job.EXACT_JOB: exactness.compare,
}


def main() -> int:
    channel = own_stdout()
    be_expendable()
    logging.basicConfig(level=logging.WARNING)
    for message in run(Job.from_dict(json.loads(sys.stdin.readline()))):
        print(json.dumps({"run": message}), file=channel, flush=True)
    return 0


def run(task: Job) -> Iterator[Message]:
    """A message for each run."""
    if task.kind == job.ENGINE:
        yield from _run_engine(task)
    elif task.kind == job.RESIDENT_JOB:
        yield _attempt(lambda: _run_resident(task))
    else:
        yield _attempt(lambda: _OTHERS[task.kind](task))


def _run_engine(task: Job) -> Iterator[Message]:
    """Every contender over one loaded model, those that time is left for."""
    start = time.perf_counter()
    stage = shape_stage(task) if task.model == SHAPE else pair_stage(task)
    config = task.setting.config
    try:
        for name in task.runs:
            if time.perf_counter() - start > task.seconds:
                yield {"status": SKIPPED, "reason": "no time was left"}
                continue
            chosen = contender(name, config.window)
            engine = stage.engine_for(chosen)
            tokens = task.tokens
            yield _done(time_engine(engine, stage.prompts, tokens, config, profiled=chosen.is_ours))
    finally:
        stage.close()


def _run_resident(task: Job) -> Result:
    """Without drafts, on the shape's own random routers, every expert on the accelerator."""
    stage: Stage = shape_stage(task, replayed=False)
    config = task.setting.config
    config = replace(config, decode_seconds=config.decode_seconds * 2)
    try:
        engine = stage.engine_for(contender(OURS_PLAIN, config.window))
        fill_accelerator(engine.runtime, config.filling_reads)
        return time_engine(engine, stage.prompts, task.tokens, config, profiled=True)
    finally:
        stage.close()


def _attempt(work: Callable[[], Result]) -> Message:
    try:
        return _done(work())
    except peers.NotAtHand as reason:
        return {"status": MISSING, "reason": str(reason)}
    except (MoespacError, torch.OutOfMemoryError) as error:
        return {"status": FAILED, "reason": " ".join(str(error).split())[:300]}


def _done(result: Result) -> Message:
    return {"status": OK, "result": result.to_dict()}


if __name__ == "__main__":
    sys.exit(main())
