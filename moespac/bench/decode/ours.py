"""This engine as a contender, under any of its policies."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import moespac
from moespac.bench.decode.bound import needs_of
from moespac.bench.decode.contenders import OURS, Contender
from moespac.bench.decode.task import Decoded, Decoder, Task
from moespac.bench.decode.usage import read_from_disk
from moespac.trace.recorder import TraceRecorder
from moespac.types import ModelShape, Observation


class EngineDecoder(Decoder):
    """``moespac.load`` and its ``stream``; nothing is learned from earlier runs."""

    def __init__(self, contender: Contender, task: Task) -> None:
        self._engine = moespac.load(
            task.pack,
            draft=task.draft if contender.draft == "draft" else contender.draft,
            window=_window(contender, task),
            host_memory=f"{task.budget:.4%}",
            policy=contender.system,
            profile=None,
        )
        self._engine.model.generation_config.eos_token_id = None  # all decode equally many tokens
        self._recorder = _Recorder(self._engine.shape)
        self._slots = max(1, int(task.budget * self._engine.shape.total + 1e-9))

    def decode(self, prompt: Sequence[int], tokens: int, deadline: float) -> Decoded:
        self._recorder.begin_sequence()
        stream = self._engine.stream(prompt, max_new_tokens=tokens + 1)
        for _ in stream:
            if time.perf_counter() > deadline and self._recorder.decoding:
                stream.close()
                break
        summary = stream.result.summary
        self.held_expert_bytes = summary.peak_bytes["host"]
        prefill = summary.seconds["prefill"]
        return Decoded(
            token_ids=summary.token_ids,
            first_seconds=prefill,
            seconds=summary.seconds["total"] - prefill,
            read_bytes=read_from_disk() - self._recorder.read_before_decoding,
            passes=summary.passes,
            drafted=self._recorder.drafted,
            accepted=self._recorder.accepted,
            hit_rate=summary.hit_rate,
            causes={
                cause: spent for cause, spent in summary.seconds.items() if cause not in ("prefill", "total")
            },
        )

    def begin(self) -> None:
        self._recorder = _Recorder(self._engine.shape)
        self._engine.runtime.recorder = self._recorder

    def bounds(self) -> dict[str, Any]:
        return needs_of(self._recorder.trace(), self._slots).to_dict()

    def close(self) -> None:
        self._engine.close()


class _Recorder(TraceRecorder):
    """Notes with each pass what was read before the decoding began, and how the drafts of this text fare."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__(shape, "decode bench")
        self.begin_sequence()

    def begin_sequence(self, category: str = "") -> None:
        super().begin_sequence(category)
        self.read_before_decoding = read_from_disk()
        self.drafted = self.accepted = 0
        self.decoding = False

    def __call__(self, observation: Observation) -> None:
        super().__call__(observation)
        if observation.window.prefill:
            self.read_before_decoding = read_from_disk()
        else:
            self.decoding = True
            self.drafted += observation.window.drafted
            self.accepted += observation.accepted


def _window(contender: Contender, task: Task) -> Any:
    """K: none without a draft, governed for our own method, fixed for the baselines."""
    if contender.draft == "none":
        return 0
    if contender.window is not None:
        return contender.window
    return "auto" if contender.system == OURS else task.config.baseline_window
