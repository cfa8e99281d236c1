"""An engine as lm-evaluation-harness sees a model (EleutherAI's `lm_eval`, the extra `eval`).

Scores come from teacher forcing through the transformers model over the tiers, answers from the engine itself,
drafts and all; both equal those of transformers on the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moespac.engine.engine import Engine
from moespac.errors import ConfigError

_MAX_NEW_TOKENS = 256  # where a task does not say: the harness's own default

Progress = Callable[[int, int], None]


def evaluate_tasks(
    engine: Engine,
    tasks: Sequence[str],
    directory: Path | None,
    limit: int | None,
    shots: int | None,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Metric -> value of each task. ``directory`` has task files (YAML) of one's own; ``limit``: documents of each.

    Raises ConfigError for tasks that there are not, or that cannot be loaded.
    """
    manager = TaskManager(include_path=None if directory is None else str(directory))
    known = set(manager.all_tasks)
    if unknown := [task for task in tasks if task not in known]:
        raise ConfigError(
            f"--tasks {','.join(unknown)}: there is no such task; `lm-eval ls tasks` lists them"
        )
    model = EngineLM(engine, progress)
    try:
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            bootstrap_iters=0,
            task_manager=manager,
            log_samples=False,
        )
    except (OSError, ValueError, ConnectionError) as error:  # their data: not there, or not to be downloaded
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"--tasks {','.join(tasks)}: cannot be loaded ({reason}); check their data"
        ) from None
    return found["results"]


class EngineLM(TemplateLM):
    """``progress`` is told how many of how many requests of a kind are answered."""

    def __init__(self, engine: Engine, progress: Progress = lambda done, total: None) -> None:
        super().__init__()
        if engine.tokenizer is None:
            raise ConfigError("tasks are texts, and this model has no tokenizer; add its tokenizer files")
        self._engine = engine
        self._progress = progress
        self.tokenizer: Any = engine.tokenizer

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    @property
    def max_length(self) -> int:
        return self._engine.context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Special tokens are the tokenizer's own habit, unless the text begins with them already."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        return [self._whole_text(*request.args) for request in self._counted(requests)]

    def _whole_text(self, text: str) -> float:
        """Each token once, in windows of the whole context."""
        tokens = self.tok_encode(text)
        windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
        return sum(self._score(*make_disjoint_window(window))[0] for window in windows)

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        return [self._score(context, continuation) for _, context, continuation in self._counted(requests)]

    @torch.inference_mode()
    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """The logarithm of the continuation's probability, and whether greedy decoding would have written it."""
        model: Any = self._engine.model
        inputs = (context + continuation)[-(self.max_length + 1) :][:-1]
        ids = torch.tensor([inputs], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, -len(continuation) :].float()
        target = torch.tensor(continuation, device=logits.device)
        chosen = logits.log_softmax(-1).gather(1, target[:, None])
        return chosen.double().sum().item(), bool((logits.argmax(-1) == target).all())

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        return [self._answer(*request.args) for request in self._counted(requests)]

    def _answer(self, context: str, wanted: dict[str, Any]) -> str:
        stop = wanted.get("until") or []
        most = int(wanted.get("max_gen_toks") or wanted.get("max_new_tokens") or _MAX_NEW_TOKENS)
        prompt = self.tok_encode(context)[-(self.max_length - most) :]
        sampled = {
            key: wanted[key]
            for key in ("temperature", "top_k", "top_p", "min_p")
            if wanted.get(key) is not None
        }
        return self._engine.generate(
            prompt,
            max_new_tokens=most,
            stop=[stop] if isinstance(stop, str) else list(stop),
            **(sampled if wanted.get("do_sample") else {}),
        ).text

    def _counted(self, requests: Sequence[Any]) -> Iterable[Any]:
        for done, request in enumerate(requests, start=1):
            yield request
            self._progress(done, len(requests))
