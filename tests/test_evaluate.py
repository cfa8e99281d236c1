"""Perplexity against values known in closed form."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from moespac.errors import ConfigError
from moespac.evaluate import Perplexity, perplexity

VOCABULARY = 11
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


def uniform(input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
    return SimpleNamespace(logits=torch.zeros(*input_ids.shape, VOCABULARY))


class Bigram:
    """Predicts from the last token alone, so that windows cannot matter; remembers what it was shown."""

    def __init__(self) -> None:
        self.table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
        self.windows: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        self.windows.append(input_ids[0].tolist())
        return SimpleNamespace(logits=self.table[input_ids])


def test_uniform_model_is_as_surprised_as_its_vocabulary_is_large() -> None:
    found = perplexity(uniform, TOKENS)
    assert found.nats == pytest.approx(math.log(VOCABULARY))
    assert found.ppl == pytest.approx(VOCABULARY)
    assert found.tokens == len(TOKENS) - 1


@pytest.mark.parametrize("context", [1, 2, 3, 5, 9, 10, 11, 512])
def test_every_token_but_the_first_is_predicted_once(context: int) -> None:
    model = Bigram()
    log_probs = model.table.log_softmax(-1)
    expected = -sum(log_probs[a, b].item() for a, b in pairwise(TOKENS)) / 10
    found = perplexity(model, TOKENS, context)
    assert found.nats == pytest.approx(expected, rel=1e-6)
    assert sum(model.windows, []) == TOKENS[:-1]  # noqa: RUF017
    assert all(len(window) == context for window in model.windows[:-1])


def test_progress_counts_tokens_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    perplexity(uniform, TOKENS, 4, lambda done, total: seen.append((done, total)))
    assert seen == [(4, 10), (8, 10), (10, 10)]


@pytest.mark.parametrize("tokens", [[], [1]])
def test_nothing_to_predict_is_an_error(tokens: list[int]) -> None:
    with pytest.raises(ConfigError, match="nothing to predict"):
        perplexity(uniform, tokens)


def test_perplexity_beyond_a_float_is_infinite() -> None:
    assert Perplexity(1e4, 1).ppl == math.inf
