"""A machine and a model with round figures that all simulator tests share: every duration can be told by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moespac.sim.hardware import HardwareProfile
from moespac.sim.shapes import SimModel
from moespac.trace import Trace, TraceRecorder
from moespac.types import Observation, Window

MODEL = SimModel(
    name="tiny",
    format="f32",
    layers=2,
    experts=4,
    top_k=2,
    hidden=8,
    shared_experts=0,
    expert_weights=1,
    expert_bytes=100,
    trunk_weights=1,
    trunk_bytes=2000,
    embedding_weights=0,
    embedding_bytes=0,
    drafter_bytes=3000,
)
# An expert takes 1 s on the host and 0.2 s on the accelerator, a copy 2 s, a read 4 s, a layer's trunk 1 s, a
# drafted token 3 s. A copy beside an expert on the host: half of the memory each, so both take twice as long.
MACHINE = HardwareProfile(
    name="round",
    host_memory=10_000,
    host_bandwidth=100.0,
    host_flops=1e12,
    host_expert_overhead=0.0,
    layer_overhead=0.0,
    storage_bandwidth=50.0,
    storage_latency=2.0,
    storage_depth=4,
    accelerator_memory=10_000,
    accelerator_bandwidth=1000.0,
    accelerator_flops=1e12,
    accelerator_launch=0.1,
    link_bandwidth=100.0,
    link_latency=1.0,
)
HOST_ONLY = replace(MACHINE, accelerator_memory=0)


def decoded(sequences: Sequence[Sequence[Sequence[Sequence[int]]]], prompt: bool = True) -> Trace:
    """Plain decoding: for each token of each sequence and each layer, its experts. ``prompt``: the first token of a
    sequence is one. Token ids count from 0."""
    layers, k = len(sequences[0][0]), len(sequences[0][0][0])
    recorder = TraceRecorder(replace(MODEL, layers=layers, top_k=k).to_model_shape(), "a test")
    for sequence in sequences:
        recorder.begin_sequence()
        for at, chosen in enumerate(sequence):
            window = Window(np.array([at]), prefill=prompt and at == 0)
            recorder(Observation(window, np.array(chosen)[:, None], accepted=0))
    return recorder.trace()


def random_trace(length: int, sequences: int = 1, seed: int = 0) -> Trace:
    """Texts whose tokens like some experts better than others."""
    rng = np.random.default_rng(seed)
    liking = rng.gumbel(size=(sequences, length, MODEL.layers, MODEL.experts)) + np.linspace(
        0, 1.5, MODEL.experts
    )
    return decoded(np.argsort(-liking, axis=-1)[..., : MODEL.top_k].tolist(), prompt=False)
