"""What experts may take of a card, beside everything else that will be there."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import DynamicCache

from moespac.config import DeviceConfig
from moespac.errors import ConfigError
from moespac.experts.budget import DeviceNeeds, device_slots
from moespac.model.kv_size import kv_bytes_per_token, kv_cache
from moespac.model.lean import lean_trunk
from moespac.types import ModelShape
from tests.families import FAMILIES, UNUSUAL, build_model

MB = 10**6
SHAPE = ModelShape(layers=4, experts=16, top_k=2, record_bytes=10 * MB)
NEEDS = DeviceNeeds(kv_cache=100 * MB, graphs=50 * MB, reserve=150 * MB)


def test_auto_takes_what_is_left_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="moespac"):
        assert device_slots("auto", SHAPE, 600 * MB, NEEDS) == 30
    (record,) = caplog.records
    assert "30 of 64 experts fit" in record.message and "0.10 GB for KV caches" in record.message
    assert device_slots("auto", SHAPE, 9000 * MB, NEEDS) == 64, "never more than all"


@pytest.mark.parametrize("amount", ["310MB", "60%", "100%", "1GB"])
def test_an_amount_that_does_not_fit_is_refused_with_what_does(amount: str) -> None:
    with pytest.raises(ConfigError, match=r"do not fit .* give at most 300MB, or auto") as caught:
        device_slots(amount, SHAPE, 600 * MB, NEEDS)
    assert "\n" not in str(caught.value) and amount in str(caught.value)
    assert device_slots("300MB", SHAPE, 600 * MB, NEEDS) == 30, "what it says is true"


@pytest.mark.parametrize("amount", ["300MB", "45%"])
def test_an_amount_that_fits_is_taken(amount: str) -> None:
    assert device_slots(amount, SHAPE, 600 * MB, NEEDS) == {"300MB": 30, "45%": 28}[amount]


@pytest.mark.parametrize("amount", ["auto", "10MB"])
def test_a_card_that_is_full(amount: str) -> None:
    with pytest.raises(ConfigError, match="--accelerator-memory"):
        device_slots(amount, SHAPE, 305 * MB, NEEDS)


def test_the_needs_follow_from_context_target_and_drafter() -> None:
    cache = kv_cache(build_model("qwen3_moe").config, torch.bfloat16.itemsize)
    config = DeviceConfig(context=100)
    one, two = DeviceNeeds.beside([cache], config), DeviceNeeds.beside([cache, cache], config)
    per_token = 3 * 2 * 2 * 8 * 2  # layers, keys and values, their heads, width, bytes
    assert one.kv_cache == per_token * 100 * config.kv_growth and two.kv_cache == 2 * one.kv_cache
    assert one.total == one.kv_cache + config.graph_pool + config.reserve
    longer = DeviceNeeds.beside([cache], DeviceConfig(context=5000))
    assert longer.kv_cache == per_token * 128 * config.kv_growth, "no more than the model's own context"


@pytest.mark.parametrize("family", [*FAMILIES, *UNUSUAL])
def test_a_cache_is_never_larger_than_estimated(family: str) -> None:
    model = build_model(family)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    grown = []
    for _ in range(2):
        tokens = torch.arange(24)[None]
        if model._supports_default_dynamic_cache():
            model(input_ids=tokens, past_key_values=cache, use_cache=True)
        grown.append(_bytes(cache))
    assert grown[1] - grown[0] <= 24 * kv_bytes_per_token(model.config, 4)
    if family == "qwen3_moe":
        assert grown[1] == 48 * kv_bytes_per_token(model.config, 4)


def test_the_lean_cache_grows_as_accounted() -> None:
    model = build_model("qwen3_moe")
    cache = lean_trunk(model, 1).new_cache()
    cache.reserve(300)
    padding = (
        cache._store.shape[-1] / model.config.head_dim
    )  # for vector loads; the heads of real models need none
    assert cache._store.nbytes == 300 * kv_bytes_per_token(model.config, 4) * padding


def _bytes(cache: DynamicCache) -> int:
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(each.nbytes for each in tensors if isinstance(each, torch.Tensor))
