"""Small traces that all trace tests share."""

from __future__ import annotations

import numpy as np

from moespac.trace import Trace, TraceRecorder
from moespac.types import ModelShape, Observation, Window

SHAPE = ModelShape(layers=3, experts=8, top_k=2, record_bytes=1)


def observation(
    rng: np.random.Generator,
    tokens: int,
    drafted: int = 0,
    accepted: int = 0,
    prefill: bool = False,
    shape: ModelShape = SHAPE,
    weights: bool = True,
) -> Observation:
    """A pass with random routing; now and then a layer does not route a token."""
    routing = rng.random((shape.layers, tokens, shape.experts)).argsort(axis=-1)[..., : shape.top_k]
    routing[rng.random(routing.shape) < 0.1] = -1
    given = rng.random(routing.shape).astype(np.float16).astype(np.float32) if weights else None
    window = Window(rng.integers(0, 100, tokens), drafted, prefill)
    return Observation(window, routing, accepted, given)


def recorded(shape: ModelShape = SHAPE, weights: bool = True) -> tuple[Trace, list[list[Observation]]]:
    """A trace of two sequences with prefill, drafts and rejections, and what it was recorded from."""
    rng = np.random.default_rng(7)
    passes = [
        [(6, 0, 0, True), (1, 0, 0, False), (4, 3, 2, False), (4, 3, 0, False)],
        [(3, 0, 0, True), (5, 4, 4, False)],
    ]
    seen = [[observation(rng, *each, shape=shape, weights=weights) for each in text] for text in passes]
    recorder = TraceRecorder(shape, "a test")
    for category, text in zip(("poetry", "code/python"), seen, strict=True):
        recorder.begin_sequence(category)
        for each in text:
            recorder(each)
    return recorder.trace(), seen


def decoded(sequences: list[list[list[int]]], experts: int = 8, layers: int = 1) -> Trace:
    """A trace of plain decoding: all layers route token i of a sequence to the experts given for it."""
    recorder = TraceRecorder(ModelShape(layers, experts, len(sequences[0][0]), 1), "a test")
    for sequence in sequences:
        recorder.begin_sequence()
        for chosen in sequence:
            routing = np.array(chosen)[None, None].repeat(layers, axis=0)
            recorder(Observation(Window(np.array(chosen[:1])), routing, accepted=0))
    return recorder.trace()
