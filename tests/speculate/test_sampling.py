import math

import pytest
import torch

from moespac.config import SamplingConfig, SpeculationConfig
from moespac.errors import ConfigError
from moespac.speculate.sampling import draw, probabilities


def logits(*rows):
    """Logits whose softmax is ``rows``."""
    return torch.tensor(rows).log()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (SamplingConfig(temperature=1), [0.4, 0.3, 0.2, 0.1]),
        (SamplingConfig(temperature=0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        (SamplingConfig(temperature=1.0, top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (SamplingConfig(temperature=1.0, top_k=9), [0.4, 0.3, 0.2, 0.1]),
        (SamplingConfig(temperature=1.0, top_p=0.6), [4 / 7, 3 / 7, 0, 0]),
        (SamplingConfig(temperature=1.0, top_p=0.0), [1, 0, 0, 0]),
        (SamplingConfig(temperature=1.0, min_p=0.6), [4 / 7, 3 / 7, 0, 0]),
        # top-p sees what top-k left: 4/7 alone reaches 0.5; of all four tokens it would take two
        (SamplingConfig(temperature=1.0, top_k=2, top_p=0.5), [1, 0, 0, 0]),
        # min-p sees the tempered distribution: 9/16 < 0.6, although 3/4 > 0.6
        (SamplingConfig(temperature=0.5, min_p=0.6), [1, 0, 0, 0]),
    ],
)
def test_filters_and_their_order(sampling, expected):
    probs = probabilities(logits([0.4, 0.3, 0.2, 0.1]), sampling)
    torch.testing.assert_close(probs, torch.tensor([expected], dtype=torch.float32))


def test_rows_are_independent_and_float32_whatever_comes_in():
    probs = probabilities(
        logits([0.7, 0.2, 0.1], [0.1, 0.2, 0.7]).bfloat16(), SamplingConfig(temperature=1.0, top_k=1)
    )
    assert probs.dtype == torch.float32
    assert probs.tolist() == [[1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_the_bounds_of_temperature_stay_in_float32(temperature):
    probs = probabilities(torch.tensor([[300.0, 299.0, -math.inf]]), SamplingConfig(temperature=temperature))
    assert torch.isfinite(probs).all()
    assert probs[0, 2] == 0


def test_a_seed_fixes_the_draws_and_impossible_tokens_are_never_drawn():
    probs = torch.tensor([0.5, 0.0, 0.5])
    first, second = ([draw(probs, g) for _ in range(200)] for g in (generator(1), generator(1)))
    assert first == second
    assert set(first) == {0, 2}


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": math.nan},
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"temperature": 1e-9},
        {"temperature": "0.7"},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 1.01},
        {"top_p": -0.1},
        {"top_p": math.nan},
        {"min_p": 2},
        {"min_p": math.nan},
        {"seed": -1},
        {"seed": 2**63},
        {"seed": 1.0},
        {"seed": True},
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(values):
    with pytest.raises(ConfigError, match=f"^{next(iter(values))} .* cannot be used: give [^\n]*$"):
        SamplingConfig(**values)


def test_only_temperature_0_is_greedy():
    assert SamplingConfig().greedy
    assert SamplingConfig(temperature=0).greedy
    assert not SamplingConfig(temperature=0.1).greedy


@pytest.mark.parametrize("sizes", [(0, 3), (4, 3)])
def test_ngram_sizes_must_be_a_range(sizes):
    with pytest.raises(ConfigError, match=r"^[^\n]*$"):
        SpeculationConfig(min_ngram=sizes[0], max_ngram=sizes[1])
