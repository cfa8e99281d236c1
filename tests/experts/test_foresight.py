"""Routers asked early: what is made of their logits and learned from them, against the formulas in numpy; and that
the residual stream they are asked with is the right one."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import moespac
from moespac.config import ForesightConfig
from moespac.engine.build import DEMO
from moespac.experts.kernels.foresight import NativeForesight
from moespac.experts.kernels.library import Known, load_library
from moespac.experts.pack import pack
from moespac.policy.foresight import Foresight
from moespac.types import ModelShape

pytestmark = pytest.mark.skipif(load_library() is None, reason="no native kernel on this machine")

SHAPE = ModelShape(layers=6, experts=10, top_k=3, record_bytes=1)
CONFIG = ForesightConfig()


class World:
    """Random history and memory, and routers that say random things."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.ran, self.to_come = self.random.random((2, SHAPE.total)) ** 4
        self.ready, self.filling = self.random.random((2, SHAPE.total)) < 0.3
        self.policy = Foresight(CONFIG)
        self.native = NativeForesight(self.policy, SHAPE)
        self.address = self.native.begin()
        self.library: Any = load_library()
        self.known = Known(*(part.ctypes.data for part in (self.ran, self.to_come, self.ready, self.filling)))

    def hear(self, row: int, distance: int, logits: np.ndarray) -> None:
        place = self.library.moespac_foresight_place(self.address, row, distance)
        ctypes.memmove(place, np.ascontiguousarray(logits, np.float32).ctypes.data, logits.size * 4)
        known = ctypes.addressof(self.known)
        self.library.moespac_foresight_hear(self.address, known, row, distance, len(logits), SHAPE.top_k)

    def learn(self, row: int, index: np.ndarray) -> None:
        to_come = self.to_come.ctypes.data
        self.library.moespac_foresight_learn(
            self.address, to_come, row, index.ctypes.data, len(index), SHAPE.top_k
        )

    @property
    def soon(self) -> list[int]:
        return self.native.soon.tolist()

    def logits(self, tokens: int) -> np.ndarray:
        return self.random.normal(size=(tokens, SHAPE.experts)).astype(np.float32) * 3

    # ---- the same, by the formulas -----------------------------------------------------------------------

    def features(self, row: int, logits: np.ndarray) -> np.ndarray:
        """(T, experts, 3)"""
        ordered = np.sort(logits, axis=1)[:, ::-1]
        middle = ordered[:, SHAPE.top_k - 1 : SHAPE.top_k + 1].mean(axis=1, keepdims=True)
        margins = (logits - middle) / logits.std(axis=1, keepdims=True)
        history = np.log(np.maximum(self.to_come.reshape(-1, SHAPE.experts)[row], 0.01))
        return np.stack([margins, np.broadcast_to(history, margins.shape), np.ones_like(margins)], axis=2)

    def need(self, features: np.ndarray, distance: int) -> np.ndarray:
        chances = 1 / (1 + np.exp(-features @ self.policy.weights[distance - 1]))
        return 1 - np.prod(1 - chances, axis=0)


@pytest.mark.parametrize("seed", range(20))
def test_those_that_are_needed_soon_are_lined_up(seed: int) -> None:
    world = World(seed)
    world.policy.weights[:] += world.random.normal(size=(CONFIG.layers, 3)) * 0.3
    urgent: dict[int, float] = {}
    for distance in range(1, CONFIG.layers + 1):
        row, logits = 1 + distance, world.logits(tokens=2)
        world.hear(row, distance, logits)
        need = world.need(world.features(row, logits), distance)
        mine = slice(row * SHAPE.experts, (row + 1) * SHAPE.experts)
        np.testing.assert_allclose(world.native.worth[mine], np.maximum(need, world.ran[mine]), rtol=1e-4)
        absent = ~(world.ready | world.filling)[mine]
        for expert in np.flatnonzero(absent & (need >= CONFIG.least)):
            urgent[mine.start + int(expert)] = need[expert] * CONFIG.fade ** (distance - 1)
    assert world.soon == sorted(urgent, key=urgent.__getitem__, reverse=True)


def test_being_right_is_learned() -> None:
    """A router whose choices always come is believed, and one whose choices never come is not."""
    world, row = World(1), 4
    for _ in range(300):
        logits = world.logits(tokens=2)
        right = np.argsort(-logits, axis=1)[:, : SHAPE.top_k].copy()
        wrong = np.argsort(logits, axis=1)[:, : SHAPE.top_k].copy()
        for distance, index in ((1, right), (3, wrong)):
            world.hear(row, distance, logits)
            expected, features = world.policy.weights.copy(), world.features(row, logits)
            chances = 1 / (1 + np.exp(-features @ expected[distance - 1]))
            came = (index[:, :, None] == np.arange(SHAPE.experts)).any(axis=1)
            missed = np.einsum("te,tef->f", came - chances, features)
            expected[distance - 1] += CONFIG.step * missed / index.size
            world.learn(row, index)
            assert world.soon == []
            world.native.begin()
            np.testing.assert_allclose(world.policy.weights, expected, rtol=1e-4, atol=1e-5)
    near, middle, far = world.policy.weights[:, 0]
    assert near > 3 and far < -2 and middle == CONFIG.weights[0]


def test_what_was_said_of_another_row_teaches_nothing() -> None:
    world = World(2)
    before = world.policy.weights.copy()
    world.hear(1, 1, world.logits(tokens=1))
    world.learn(1 + CONFIG.layers, np.zeros((1, SHAPE.top_k), np.int64))  # in the same place
    assert (world.policy.weights == before).all()
    world.native.begin()  # another pass
    world.learn(1, np.zeros((1, SHAPE.top_k), np.int64))
    assert (world.policy.weights == before).all()


def test_logits_that_are_no_numbers_do_no_harm() -> None:
    world = World(3)
    logits = world.logits(tokens=1)
    logits[0, 4] = np.nan
    world.hear(2, 1, logits)
    world.hear(3, 2, np.zeros((1, SHAPE.experts), np.float32))
    assert len(world.soon) <= 2 * SHAPE.experts


@torch.inference_mode()
def test_routers_are_asked_with_the_stream_of_the_layer_that_runs(tmp_path: Path) -> None:
    """The margins that are left of the last pass, against transformers' own modules."""
    pack(DEMO / "target", tmp_path / "f32", "f32", progress=False)
    with moespac.load(tmp_path / "f32", host_memory="30%", window=0, draft="none", profile=None) as some:
        done = some.generate("The river ran past the mill and", max_new_tokens=12)
        tokens = [*some.tokenizer("The river ran past the mill and").input_ids, *done.token_ids[:-1]]
        native, top_k, layers = some.runtime._foresight, some.shape.top_k, some.shape.layers
        assert native is not None
        heard = native.margins[:, :, 0].copy()  # (distance, row % layers ahead, experts), of one token
        believed = native.known.weights[0, 0]
    model: Any = AutoModelForCausalLM.from_pretrained(DEMO / "target", dtype=torch.float32).eval()
    streams: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_hook(
            lambda module, given, out: streams.append(given[0][0, -1].clone())
        )
    model(torch.tensor([tokens]))
    for distance in range(1, CONFIG.layers + 1):
        layer = model.model.layers[layers - 1]
        norm, router = layer.post_attention_layernorm, layer.mlp.gate.weight
        stream = streams[layers - 1 - distance]
        normed = norm.weight * stream / (stream.pow(2).mean() + norm.variance_epsilon).sqrt()
        logits = (router @ normed).numpy()
        middle = np.sort(logits)[::-1][top_k - 1 : top_k + 1].mean()
        expected = (logits - middle) / logits.std()
        np.testing.assert_allclose(heard[distance - 1, (layers - 1) % CONFIG.layers], expected, atol=2e-2)
    assert believed != CONFIG.weights[0]
