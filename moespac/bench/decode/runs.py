"""RUN: in each round every contender once, each in a fresh process, under the same limit."""

from __future__ import annotations

import datetime
import json
import platform
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import IO, Any

import xxhash

from moespac.bench.ballast import Ballast
from moespac.bench.decode.bound import Needs
from moespac.bench.decode.contenders import Contender
from moespac.bench.decode.files import ModelFiles, drop_from_page_cache
from moespac.bench.decode.limits import measure_limits
from moespac.bench.decode.records import FAILED, MISSING, OK, TIMEOUT, Record, next_round
from moespac.bench.decode.task import Decoded, Task
from moespac.config import DecodeBenchConfig
from moespac.errors import ConfigError

_WORKER = "moespac.bench.decode.worker"
_PACKAGES = ("moespac", "torch", "transformers", "triton", "llama-cpp-python", "accelerate")


@dataclass(frozen=True)
class Plan:
    """Everything that is to be run."""

    files: ModelFiles
    contenders: Sequence[Contender]
    budgets: Sequence[float]
    rounds: int
    prompts: Sequence[Sequence[int]]
    warmup: Sequence[int]
    tokens: int
    threads: int
    format: str
    config: DecodeBenchConfig

    @property
    def setting(self) -> dict[str, Any]:
        """What two records must share to be compared."""
        return {
            "model": self.files.checkpoint.parent.name,
            "format": self.format,
            "experts": self.files.shape.total,
            "expert_bytes": self.files.expert_bytes,
            "prompts": f"{len(self.prompts)} ({xxhash.xxh3_64_hexdigest(repr(self.prompts).encode())[:8]})",
            "tokens": self.tokens,
            "threads": self.threads,
            "machine": platform.node(),
        }

    def turns(self) -> list[tuple[float, list[Contender]]]:
        """Each round of each budget, and who takes part."""
        return [
            (budget, [contender for contender in self.contenders if contender.runs_at(budget)])
            for budget in sorted(self.budgets, reverse=True)  # the limit only ever gets tighter
            for _ in range(self.rounds)
        ]

    def task(self, contender: Contender, budget: float) -> Task:
        files = self.files
        return Task(
            contender.name,
            budget,
            self.threads,
            checkpoint=str(files.checkpoint),
            pack=str(files.pack),
            gguf=str(files.gguf),
            draft=str(files.draft),
            draft_gguf=str(files.draft_gguf),
            offload=str(files.offload),
            expert_bytes=files.expert_bytes,
            prompts=self.prompts,
            warmup=self.warmup,
            tokens=self.tokens,
            config=self.config,
        )


def run_all(
    plan: Plan, before: Sequence[Record], keep: Callable[[Record], None], progress: Callable[[int, int], None]
) -> None:
    """Run what is planned; each record is given to ``keep`` at once. ``before``: records that there are already.

    Raises ConfigError when memory cannot be limited.
    """
    turns, done = plan.turns(), list(before)
    total, finished = sum(len(contenders) for _, contenders in turns), 0
    progress(0, total)
    with ExitStack() as stack:
        ballast: Ballast | None = None
        for budget, contenders in turns:
            if budget < 1 and ballast is None:
                ballast = stack.enter_context(Ballast())
            if ballast is not None:
                ballast.leave(plan.config.loading_bytes)
            limits = measure_limits(plan.files, plan.threads, plan.config)
            for contender in contenders:
                record = _run(plan, contender, budget, ballast)
                number = next_round(done, contender.name, budget)
                done.append(replace(record, round=number, limits=limits))
                keep(done[-1])
                finished += 1
                progress(finished, total)


def _run(plan: Plan, contender: Contender, budget: float, ballast: Ballast | None) -> Record:
    record = Record(
        contender.name,
        budget,
        round=0,
        status=OK,
        setting=plan.setting,
        versions=package_versions(),
        started=datetime.datetime.now().isoformat(timespec="seconds"),
        record_bytes=plan.files.shape.record_bytes,
    )
    if contender.missing:
        reason = f"not installed: {', '.join(contender.missing)} (pip install 'moespac[bench]')"
        return replace(record, status=MISSING, reason=reason)
    drop_from_page_cache(plan.files)
    if ballast is not None:
        ballast.leave(plan.config.loading_bytes)
    task = plan.task(contender, budget)
    with Worker(_WORKER, task.to_dict(), task.config.run_seconds) as worker:
        ready = worker.receive("ready")
        if ready is None:
            return replace(record, status=worker.status, reason=worker.reason)
        left = 0
        if ballast is not None:
            left = ballast.leave(room_for(task, ready))
        worker.go_on()
        done = worker.receive("done")
        if ballast is not None and not ballast.holds:
            raise ConfigError("the memory limit broke while a contender ran; close other programs")
        if done is None:
            return replace(record, status=worker.status, reason=worker.reason)
    return replace(
        record,
        load_seconds=done["load_seconds"],
        memory=done["memory"] | {"left": left},
        texts=tuple(Decoded(**text) for text in done["texts"]),
        needs=Needs(**done["bounds"]) if done["bounds"] else None,
    )


def room_for(task: Task, ready: dict[str, int]) -> int:
    """Bytes to leave for a loaded contender, so that its experts have what the budget says.

    Its own memory and its libraries are taken already, and with them the experts that it holds there; not so the
    buffers that it had while decoding and gave back.
    """
    return task.memory - ready["experts"] + ready["buffers"] + task.config.margin_bytes


class Worker:
    """A process that is told a task and says what came of it, line by line of JSON, with an end to our patience."""

    def __init__(self, module: str, task: dict[str, Any], seconds: float) -> None:
        """``module``'s ``main`` is the other side; ``seconds`` for all that it does."""
        self._seconds = seconds
        self._errors: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._late = False
        self._timer = threading.Timer(self._seconds, self._give_up)
        self._timer.daemon = True
        self._timer.start()
        self.status, self.reason = OK, ""
        self._send(json.dumps(task))

    def receive(self, name: str) -> dict[str, Any] | None:
        """What it says under ``name``; None when it does not come to that, see ``status`` and ``reason``."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        said = json.loads(line) if line.endswith("\n") else {}
        if name in said:
            return said[name]
        self.status, self.reason = FAILED, said.get("failed", "")
        if not self.reason:
            code = self._process.wait()
            self.status = TIMEOUT if self._late else FAILED
            self.reason = f"took longer than {self._seconds:.0f} s" if self._late else self._ended(code)
        return None

    def go_on(self) -> None:
        """The memory limit is set."""
        self._send("go on")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._timer.cancel()
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            assert stream
            with suppress(BrokenPipeError):
                stream.close()

    def _send(self, line: str) -> None:
        assert self._process.stdin
        with suppress(BrokenPipeError):  # it ended: ``receive`` will say how
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _give_up(self) -> None:
        self._late = True
        self._process.kill()

    def _ended(self, code: int) -> str:
        """How a process that said nothing came to its end."""
        if code == -signal.SIGKILL:
            return "was ended by the system: it did not fit the memory that was left"
        if code < 0:
            return f"crashed ({signal.Signals(-code).name})"
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return f"ended with code {code}: {lines[-1][:200] if lines else 'no message'}"


def package_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
