"""DRAFT: where the tokens ahead come from. A drafter decides how fast the target speaks, never what it says.

V is the width of the target's logits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moespac.config import GraphConfig, SamplingConfig
from moespac.errors import DraftError
from moespac.model.graphed import GraphedTrunk
from moespac.model.trunk import open_draft_trunk
from moespac.speculate.sampling import draw, probabilities


@dataclass(frozen=True)
class Draft:
    """Tokens to be verified, possibly none."""

    tokens: list[int] = field(default_factory=list)
    probs: torch.Tensor | None = None  # (len(tokens), V), what each was drawn from; None: it was not a draw


class Drafter(Protocol):
    """Guesses how a sequence goes on. Cheap when asked for nothing."""

    name: str

    def begin(self, sampling: SamplingConfig, generator: torch.Generator) -> None:
        """A request starts: how its tokens are drawn, and from which randomness."""

    def propose(self, tokens: list[int], k: int) -> Draft:
        """At most ``k`` tokens to follow ``tokens``, the whole accepted sequence so far, never empty."""

    def look_back(self, tokens: list[int], chances: list[float]) -> list[float]:
        """How drafts would have fared that were not asked for: what ``acceptance_seen`` says of each token that
        would have been drafted, of the last ``len(chances)`` of ``tokens``, each in its turn and after the true
        ones. ``chances``: what the target gave to each, and chose it by; 1 where it does not draw.

        Afterwards ``tokens`` are known to the drafter, and ``propose`` takes what it does while drafting goes on.
        """

    def reset(self) -> None:
        """Forget the sequence."""

    def close(self) -> None:
        """Release what is held; the drafter is not used again."""


class NoDrafter:
    """No speculation: every window is one token."""

    name = "none"

    def begin(self, sampling: SamplingConfig, generator: torch.Generator) -> None: ...

    def propose(self, tokens: list[int], k: int) -> Draft:
        return Draft()

    def look_back(self, tokens: list[int], chances: list[float]) -> list[float]:
        return []

    def reset(self) -> None: ...

    def close(self) -> None: ...


class PromptLookupDrafter:
    """The longest tail of the sequence that occurred before goes on as it did the last time.

    Needs no second model, and pays where text repeats itself: code, quotation, summaries. After Prompt Lookup
    Decoding (Saxena 2023); the index of last positions and the periodic continuation are ours.
    """

    name = "prompt-lookup"

    def __init__(self, max_ngram: int, min_ngram: int) -> None:
        assert 1 <= min_ngram <= max_ngram
        self._sizes = range(min_ngram, max_ngram + 1)
        self.reset()

    def begin(self, sampling: SamplingConfig, generator: torch.Generator) -> None: ...

    def propose(self, tokens: list[int], k: int) -> Draft:
        if k <= 0:
            return Draft()
        self._follow(tokens)
        start = self._match(tokens)
        if start is None:
            return Draft()
        period = len(tokens) - start  # a match that runs into the end of the sequence goes round again
        return Draft([tokens[start + i % period] for i in range(k)])

    def look_back(self, tokens: list[int], chances: list[float]) -> list[float]:
        seen = []
        for at in range(len(tokens) - len(chances), len(tokens)):
            if draft := self.propose(tokens[:at], 1).tokens:
                seen.append(acceptance_seen(float(draft == tokens[at : at + 1]), chances[at - len(tokens)]))
        self._follow(tokens)
        return seen

    def reset(self) -> None:
        self._seen: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # n-gram -> where its last occurrence was continued

    def close(self) -> None:
        self.reset()

    def _follow(self, tokens: list[int]) -> None:
        """Index the n-grams of ``tokens`` that something follows, so never the tail itself."""
        if tokens[: len(self._seen)] != self._seen:
            self.reset()
        for end in range(max(1, len(self._seen)), len(tokens)):
            for n in self._sizes:
                if n <= end:
                    self._next[tuple(tokens[end - n : end])] = end
        self._seen += tokens[len(self._seen) :]

    def _match(self, tokens: list[int]) -> int | None:
        """Where the continuation of the longest known tail starts."""
        for n in reversed(self._sizes):
            if n < len(tokens) and (start := self._next.get(tuple(tokens[-n:]))) is not None:
                return start
        return None


class ModelDrafter:
    """A smaller model of the same vocabulary, greedy or sampled as the request is.

    It keeps the KV cache of what it was fed and brings it in line with each sequence it is given: what
    differs is cropped, what is missing is fed. So a rejection, or a new request that begins like the last,
    costs only the tokens that changed. ``tick`` is called between drafted tokens: transfers make progress.
    """

    name = "model"

    def __init__(
        self, model: PreTrainedModel, vocab_size: int, tick: Callable[[], None] = lambda: None
    ) -> None:
        """``model``: of ``load_draft_model``, or any whose tokens are the target's; ``vocab_size``: V."""
        config = model.config.get_text_config()
        self._trunk = open_draft_trunk(model, torch.get_num_threads(), GraphConfig())
        self._vocab_size = vocab_size
        self._embeddings: int = config.vocab_size
        self._context: int = getattr(config, "max_position_embeddings", sys.maxsize)  # ALiBi: no limit
        self._tick = tick
        self._sampling = SamplingConfig()
        self._generator = torch.Generator()
        self.reset()

    def begin(self, sampling: SamplingConfig, generator: torch.Generator) -> None:
        self._sampling = sampling
        self._generator = generator

    def propose(self, tokens: list[int], k: int) -> Draft:
        k = min(k, self._context - len(tokens) + 1)  # the last drafted token is never fed, hence + 1
        if k <= 0:
            return Draft()
        missing = self._rewind(tokens)
        if max(missing) >= self._embeddings:  # the target's padding has ids that the draft model lacks
            return Draft()
        if self._sampling.greedy and isinstance(self._trunk, GraphedTrunk) and self._trunk.drafts:
            return Draft(self._feed_back(self._trunk, missing, k))
        choices = [self._choose(self._feed(missing)[0])]
        while len(choices) < k:
            self._tick()
            choices.append(self._choose(self._feed([choices[-1][0]])[0]))
        drafted, rows = zip(*choices, strict=True)
        return Draft(list(drafted), None if self._sampling.greedy else torch.stack(rows))

    def look_back(self, tokens: list[int], chances: list[float]) -> list[float]:
        """One pass over what the cache lacks: all but the last token, which the next draft begins with."""
        if len(tokens) > self._context:
            return []
        missing = self._rewind(tokens)
        judged = min(len(chances), len(missing) - 1)
        if judged <= 0 or max(missing) >= self._embeddings:
            return []
        came, logits = missing[-judged:], self._feed(missing[:-1], keep=judged)
        if self._sampling.greedy:
            likeliest = logits.argmax(dim=-1).tolist()
            drafted = [float(draft == token) for draft, token in zip(likeliest, came, strict=True)]
        else:
            drafted = probabilities(logits, self._sampling)[range(judged), came].tolist()
        return [acceptance_seen(*both) for both in zip(drafted, chances[-judged:], strict=True)]

    def reset(self) -> None:
        self._cache = self._trunk.new_cache()
        self._cached: list[int] = []

    def close(self) -> None:
        self.reset()

    def _rewind(self, tokens: list[int]) -> list[int]:
        """Crop the cache to what it shares with ``tokens``; returns what is left to feed, never nothing."""
        shared = min(_common_prefix(self._cached, tokens), len(tokens) - 1)
        if surplus := len(self._cached) - shared:
            self._cache.rewind(surplus)
            del self._cached[shared:]
        return tokens[shared:]

    def _feed_back(self, trunk: GraphedTrunk, missing: list[int], k: int) -> list[int]:
        """``k`` greedy tokens after ``missing``, each fed to the next on the device."""
        with self._reset_on_failure():
            known = min(self._vocab_size, self._embeddings)
            drafted = trunk.draft(missing, self._cache, k, known, self._tick)
        self._cached += [*missing, *drafted[:-1]]
        return drafted

    @torch.inference_mode()
    def _feed(self, tokens: list[int], keep: int = 1) -> torch.Tensor:
        """Logits (keep, V), float32, of what follows the last of ``tokens``, which join the cache."""
        with self._reset_on_failure():
            logits = self._trunk(torch.tensor(tokens), self._cache, keep=keep)
        self._cached += tokens
        return _fit(logits.cpu(), self._vocab_size)

    @contextmanager
    def _reset_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.reset()  # cut short (Ctrl-C too), it may have grown some layers and not others
            raise

    def _choose(self, logits: torch.Tensor) -> tuple[int, torch.Tensor | None]:
        """A token, and the distribution (V,) it was drawn from if it was drawn."""
        if self._sampling.greedy:
            return int(logits.argmax()), None
        (probs,) = probabilities(logits[None], self._sampling)
        return draw(probs, self._generator), probs


def acceptance_seen(drafted: float, chosen: float) -> float:
    """How often a draft would have been kept, as the one token tells that came: min(1, q / p).

    ``drafted``: the drafter's probability q of the token; 1 and 0 where it does not draw, as a draft that was right
    or wrong. ``chosen``: the target's p, above 0. A draft is kept with probability sum over tokens of min(p, q)
    (see ``verify``), and the mean of this over tokens drawn from p is just that. Agreement of the likeliest tokens,
    or q alone, would not be.
    """
    return min(1.0, drafted / chosen)


def load_draft_model(
    path: str | Path,
    target_vocab_size: int,
    target_tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """The draft model at ``path``, in evaluation mode on the CPU.

    Raises DraftError as ``check_draft_model``, before any weights are read, and when they cannot be read.
    """
    check_draft_model(path, target_vocab_size, target_tokenizer)
    with _mapped_errors(path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    model, report = loaded
    if missing := report["missing_keys"]:
        raise DraftError(f"the draft model at {path} lacks {len(missing)} tensors: download it again")
    return model.eval()


def check_draft_model(
    path: str | Path, target_vocab_size: int, target_tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedConfig:
    """The configuration of the draft model at ``path``; weights need not be there.

    Raises DraftError when there is none, it cannot be read, its tokens are not the target's, or its cache
    cannot be taken back after a rejection.
    """
    if not Path(path).is_dir():
        raise DraftError(f"no draft model at {path}: give the directory of a Hugging Face checkpoint")
    with _mapped_errors(path):
        config = AutoConfig.from_pretrained(path)
        # Without these files transformers makes up a tokenizer that has no tokens.
        tokenizer = AutoTokenizer.from_pretrained(path) if any(Path(path).glob("tokenizer*")) else None
    _check_rewindable(config, path)
    _check_vocabulary(config, tokenizer, target_vocab_size, target_tokenizer, path)
    return config


@contextmanager
def _mapped_errors(path: str | Path) -> Iterator[None]:
    """Other libraries' errors, as one line of ours."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DraftError(f"cannot load the draft model at {path}, check it is complete: {reason}") from error


def _check_rewindable(config: PreTrainedConfig, path: str | Path) -> None:
    if not DynamicCache(config=config).is_croppable:
        raise DraftError(
            f"the draft model at {path} ({config.model_type}) has recurrent layers, which cannot take back a"
            " rejected token: use a draft model with attention only, or prompt lookup"
        )


def _check_vocabulary(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    target_size: int,
    target_tokenizer: PreTrainedTokenizerBase | None,
    path: str | Path,
) -> None:
    """The token ids must mean the same; embeddings may be padded to different sizes beyond the last token."""
    size = config.get_text_config().vocab_size
    if tokenizer is not None and target_tokenizer is not None:
        vocabulary = tokenizer.get_vocab()
        if vocabulary != target_tokenizer.get_vocab():
            raise DraftError(
                f"the draft model at {path} has other tokens than the target:"
                " use a draft model of the target's family, or prompt lookup"
            )
        if size == target_size or max(vocabulary.values()) < min(size, target_size):
            return
    elif size == target_size:
        return
    raise DraftError(
        f"the draft model at {path} has a vocabulary of {size}, the target of {target_size}:"
        " use a draft model of the target's family, or prompt lookup"
    )


def _fit(logits: torch.Tensor, size: int) -> torch.Tensor:
    """(T, D) -> (T, size): padding beyond the target's vocabulary is cut, what the draft lacks is impossible."""
    lacking = size - logits.shape[-1]
    return torch.nn.functional.pad(logits, (0, lacking), value=-torch.inf)  # a negative pad cuts


def _common_prefix(a: list[int], b: list[int]) -> int:
    """Its length, by bisection: comparing slices is fast, a loop over a long context is not."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
