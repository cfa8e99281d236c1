"""One contender in a process of its own, so that its memory and its failures are its own.

Reads a ``Task`` as one line of JSON; says ``{"ready": ...}`` once it is loaded and has decoded a few tokens; waits
for a line, before which the memory limit is set; warms up, decodes all prompts and says ``{"done": ...}``.
What libraries print goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, TextIO

from moespac.bench.decode.contenders import Contender, parse_contenders
from moespac.bench.decode.task import Decoded, Decoder, Task
from moespac.bench.decode.usage import above_present, forget_peak, keep_in_memory, memory
from moespac.errors import MoespacError

_FIRST_TO_GO = 1000  # oom_score_adj: should memory run out, it is the contender that did not fit


def main() -> int:
    channel = own_stdout()
    be_expendable()
    task = Task.from_dict(json.loads(sys.stdin.readline()))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task.threads])
    try:
        for message in run(task):
            print(json.dumps(message), file=channel, flush=True)
            if "ready" in message and not sys.stdin.readline():
                return 1  # the parent is gone
    except MoespacError as error:
        print(json.dumps({"failed": str(error)}), file=channel, flush=True)
    return 0


def run(task: Task) -> Iterator[dict[str, Any]]:
    """The messages of one run."""
    start = time.perf_counter()
    decoder = load(parse_contenders(task.contender)[0], task)
    loaded = time.perf_counter() - start
    config = task.config
    try:
        forget_peak()
        decoder.decode(task.warmup, config.ready_tokens, float("inf"))
        held = memory(task.folder)
        if task.budget < 1:
            keep_in_memory(task.folder)
        yield {"ready": asdict(held) | {"experts": decoder.held_expert_bytes, "buffers": above_present()}}
        decoder.decode(task.warmup, config.warmup_tokens, time.perf_counter() + config.warmup_seconds)
        decoder.begin()
        texts = list(_decode_all(decoder, task))
        yield {
            "done": {
                "load_seconds": loaded,
                "texts": [asdict(text) for text in texts],
                "bounds": decoder.bounds(),
                "memory": asdict(memory(task.folder)) | {"experts": decoder.held_expert_bytes},
            }
        }
    finally:
        decoder.close()


def load(contender: Contender, task: Task) -> Decoder:
    """The contender's libraries are imported only here: nobody pays for those of others."""
    if contender.is_llama:
        from moespac.bench.decode.llama import LlamaDecoder

        return LlamaDecoder(contender, task)
    if contender.is_peer:
        from moespac.bench.decode.transformers_model import TransformersDecoder

        return TransformersDecoder(contender, task)
    from moespac.bench.decode.ours import EngineDecoder

    return EngineDecoder(contender, task)


def _decode_all(decoder: Decoder, task: Task) -> Iterator[Decoded]:
    """Each prompt once, until the time is up."""
    left = task.config.decode_seconds
    for prompt in task.prompts:
        decoded = decoder.decode(prompt, task.tokens, time.perf_counter() + left)
        yield decoded
        left -= decoded.seconds
        if left <= 0:
            return


def own_stdout() -> TextIO:
    """Standard output for messages alone; what else is printed goes to standard error."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return channel


def be_expendable() -> None:
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(_FIRST_TO_GO))


if __name__ == "__main__":
    sys.exit(main())
