"""transformers as a contender: its own model and ``generate``, all in memory or with accelerate's disk offload."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria

from moespac.bench.decode.contenders import Contender
from moespac.bench.decode.task import Decoded, Decoder, Task
from moespac.bench.decode.usage import read_from_disk


class TransformersDecoder(Decoder):
    """In the checkpoint's own bfloat16: it has no kernels for our int8 and int4."""

    def __init__(self, contender: Contender, task: Task) -> None:
        torch.set_num_threads(task.threads)
        placement: dict[str, Any] = {}
        if contender.system == "transformers+disk":
            placement = {
                "device_map": "auto",
                "max_memory": {"cpu": task.memory},
                "offload_folder": task.offload,
            }
        self._model: Any = AutoModelForCausalLM.from_pretrained(task.checkpoint, dtype="auto", **placement)
        self._model.eval()
        self._model.generation_config.eos_token_id = None  # all decode equally many tokens

    def decode(self, prompt: Sequence[int], tokens: int, deadline: float) -> Decoded:
        return generate(self._model, prompt, tokens, deadline)


def generate(model: Any, prompt: Sequence[int], tokens: int, deadline: float, **settings: Any) -> Decoded:
    """``model.generate`` as ``Decoder.decode`` wants it; ``settings`` are passed on."""
    watch = _Watch(deadline)
    start = time.perf_counter()
    ids = model.generate(
        input_ids=torch.tensor([list(prompt)], device=model.device),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
        max_new_tokens=tokens + 1,
        do_sample=False,
        stopping_criteria=[watch],
        **settings,
    )
    return Decoded(
        token_ids=ids[0, len(prompt) :].tolist(),
        first_seconds=watch.first - start,
        seconds=watch.last - watch.first,
        read_bytes=watch.read,
        passes=watch.tokens - 1,
    )


class _Watch(StoppingCriteria):
    """Called after each token: notes the time, and ends the text when it is up."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self.tokens = 0
        self.first = self.last = 0.0
        self.read = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> Any:
        if input_ids.is_cuda:
            torch.cuda.synchronize()  # what was launched is not yet done
        self.last = time.perf_counter()
        self.tokens += 1
        if self.tokens == 1:
            self.first, self._read_before = self.last, read_from_disk()
        self.read = read_from_disk() - self._read_before
        ended = self.tokens >= 3 and self.last > self._deadline
        return torch.full((input_ids.shape[0],), ended, device=input_ids.device, dtype=torch.bool)
