"""A card with an artificial cap: experts, KV caches and drafter never exceed it, and the text is the same."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import moespac
from moespac.engine.engine import Engine
from moespac.errors import DeviceMemoryError
from moespac.experts.out_of_memory import is_out_of_memory
from moespac.model import lean
from moespac.model.cache import KvCache
from moespac.model.lean import LeanCache
from moespac.policy.registry import POLICIES
from moespac.speculate.drafters import ModelDrafter, NoDrafter
from tests.engine.cuda import cuda_in_place_of_a_card
from tests.families import VOCABULARY, build_model, reference_tokens, save_checkpoint

PROMPT = (5, 17, 3, 60, 17, 3)
NEW_TOKENS = 60


class Meter:
    """The card's memory: expert slots, and whatever KV caches are there. ``cap``: bytes."""

    def __init__(self) -> None:
        self.cap = 1 << 60
        self.most = 0
        self.refused = 0
        self.engine: Engine | None = None
        self._caches: weakref.WeakSet[LeanCache] = weakref.WeakSet()

    @property
    def experts(self) -> int:
        assert self.engine is not None
        accelerator = self.engine.runtime._computers.accelerator
        return accelerator.arena.numel() if accelerator is not None else 0

    @property
    def caches(self) -> int:
        return sum(cache._store.nbytes for cache in self._caches)

    def take(self, cache: LeanCache, nbytes: int) -> None:
        """``nbytes`` are needed while the old ones of ``cache`` are still there."""
        self._caches.add(cache)
        if self.engine is None:
            return  # loading
        if self.experts + self.caches + nbytes > self.cap:
            self.refused += 1
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {nbytes} bytes. GPU 0 has ..."
            )
        self.most = max(self.most, self.experts + self.caches + nbytes)


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Meter:
    """Caches double from 8 tokens on, and ask the meter."""
    meter = Meter()
    reserve = LeanCache.reserve
    monkeypatch.setattr(lean, "_LEAST_ROOM", 8)

    def metered(self: LeanCache, tokens: int) -> torch.Tensor:
        shape = self._store.shape
        if self.length + tokens > shape[3]:
            room = max(8, 2 * shape[3], self.length + tokens)
            meter.take(self, room * shape[0] * shape[1] * shape[2] * shape[4] * self._store.element_size())
        return reserve(self, tokens)

    monkeypatch.setattr(LeanCache, "reserve", metered)
    return meter


@pytest.fixture(params=["in process", "cuda", "cuda, one allocation"])
def tier(request, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "in process":
        yield request.param
        return
    with cuda_in_place_of_a_card(monkeypatch, mapped=request.param == "cuda"):
        yield request.param


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


def open_engine(path: Path, meter: Meter | None = None, **settings) -> Engine:
    settings = {"host_memory": "50%", "accelerator_memory": "75%", "window": 3} | settings
    engine = moespac.load(path, draft="none", profile=None, **settings)
    if meter is not None:
        meter.engine = engine
    return engine


def test_the_cap_is_never_exceeded_and_the_text_is_the_same(
    checkpoint: Path, meter: Meter, tier: str, caplog
) -> None:
    expected = reference_tokens("qwen3_moe", PROMPT, NEW_TOKENS)
    with open_engine(checkpoint, meter) as engine:
        engine.drafter = ModelDrafter(build_model("qwen3_moe"), VOCABULARY)
        assert engine.generate(PROMPT, max_new_tokens=NEW_TOKENS).token_ids == expected
        free, meter.refused = meter.most, 0
        meter.most = 0
        engine.drafter.reset()
        meter.cap = (
            free - 3 * engine.shape.record_bytes
        )  # what the caches grow to does not fit beside the experts
        with caplog.at_level(logging.WARNING, logger="moespac"):
            result = engine.generate(PROMPT, max_new_tokens=NEW_TOKENS)
        memory = engine.runtime.memory
        memory.check_integrity()
        assert result.token_ids == expected
        assert meter.refused and 0 < meter.most <= meter.cap < free
        assert result.summary.shrinks == engine.runtime.stats.shrinks > 0
        assert memory.accelerator.slots == memory.residency.capacity.accelerator < 18
        assert any("experts made way" in record.message for record in caplog.records)
        again = engine.generate(PROMPT, max_new_tokens=NEW_TOKENS)
        assert again.token_ids == expected and again.summary.shrinks == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_goes_on_with_one_slot(checkpoint: Path, meter: Meter, policy: str) -> None:
    with open_engine(checkpoint, meter, policy=policy) as engine:
        expected = reference_tokens("qwen3_moe", PROMPT, 20)
        assert engine.generate(PROMPT, max_new_tokens=20).token_ids == expected
        meter.cap = meter.most - meter.experts + engine.shape.record_bytes  # what caches take, and one record
        meter.most = 0
        assert engine.generate(PROMPT, max_new_tokens=20).token_ids == expected
        assert meter.most <= meter.cap
        assert engine.runtime.memory.accelerator.slots == 1
        assert engine.generate(PROMPT, max_new_tokens=20).token_ids == expected
        engine.runtime.memory.check_integrity()


def test_without_a_slot_left_it_is_one_line_and_the_engine_lives(
    checkpoint: Path, meter: Meter, tier: str
) -> None:
    with open_engine(checkpoint, meter) as engine:
        meter.cap = 1000
        with pytest.raises(DeviceMemoryError, match="one expert left") as caught:
            engine.generate(PROMPT, max_new_tokens=NEW_TOKENS)
        assert "\n" not in str(caught.value)
        assert engine.runtime.memory.accelerator.slots == 1
        engine.runtime.memory.check_integrity()
        meter.cap = 1 << 60
        assert engine.generate(PROMPT, max_new_tokens=8).token_ids == reference_tokens("qwen3_moe", PROMPT, 8)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_a_cache_that_a_failed_pass_leaves_half_grown(
    family: str, tmp_path: Path, tier: str, monkeypatch
) -> None:
    """transformers' own: it is made anew from the tokens."""
    expected = reference_tokens(family, PROMPT, 24)
    with open_engine(save_checkpoint(family, tmp_path)) as engine:
        forward, calls = engine.runtime.forward, 0

        def failing(layer: int, *arguments):
            nonlocal calls
            calls += 1
            if calls in (5, 17, 18, 40):  # in the prefill, and in the midst of passes
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
            return forward(layer, *arguments)

        for layer, module in enumerate(m for m in engine.model.modules() if hasattr(m, "stand_in")):
            norm = getattr(module, "post_expert_norm", None)
            module._forward = functools.partial(failing, layer, norm)
        stream = engine.stream(PROMPT, max_new_tokens=24)
        assert isinstance(stream._sequence.cache, KvCache)
        for _ in stream:
            pass
        assert stream.result.token_ids == expected
        assert engine.runtime.stats.shrinks >= 3


def test_a_job_that_runs_out_of_memory(checkpoint: Path, tier: str) -> None:
    """On the accelerator: the temporaries of its experts."""
    with open_engine(checkpoint, policy="lru") as engine:  # which computes them all there
        accelerator = engine.runtime._computers.accelerator
        compute, failures = accelerator.compute, 3

        def failing(name, job):
            def run() -> None:
                nonlocal failures
                if failures:
                    failures -= 1
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
                job()

            return compute(name, run)

        accelerator.compute = failing
        result = engine.generate(PROMPT, max_new_tokens=20)
        assert result.token_ids == reference_tokens("qwen3_moe", PROMPT, 20)
        assert failures == 0 and result.summary.shrinks
        engine.runtime.memory.check_integrity()
        assert not engine.runtime.memory.accelerator._pins.any()


def test_a_draft_model_that_runs_out_of_memory(checkpoint: Path) -> None:
    with open_engine(checkpoint) as engine:
        drafter = engine.drafter = ModelDrafter(build_model("qwen3_moe"), VOCABULARY)
        trunk, calls = drafter._trunk, 0

        class Failing:
            new_cache = trunk.new_cache

            def __call__(self, *arguments, **keywords):
                nonlocal calls
                calls += 1
                if calls in (1, 4, 5):
                    raise RuntimeError(
                        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
                    )
                return trunk(*arguments, **keywords)

        drafter._trunk = Failing()
        result = engine.generate(PROMPT, max_new_tokens=20)
        assert result.token_ids == reference_tokens("qwen3_moe", PROMPT, 20)
        assert result.summary.shrinks >= 2 and result.summary.acceptance_rate


def test_other_errors_are_not_taken_for_it(checkpoint: Path) -> None:
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(MemoryError())
    with open_engine(checkpoint) as engine:

        def broken(*_, keep):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        engine.drafter = NoDrafter()
        engine.trunk = type("Broken", (), {"__call__": broken, "new_cache": engine.trunk.new_cache})()
        with pytest.raises(RuntimeError, match="illegal"):
            engine.generate(PROMPT, max_new_tokens=4)
        assert engine.runtime.stats.shrinks == 0


def test_without_an_accelerator_there_is_nothing_to_give(checkpoint: Path) -> None:
    with open_engine(checkpoint, accelerator_memory="none") as engine:

        def broken(*_, keep):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        engine.trunk = type("Broken", (), {"__call__": broken, "new_cache": engine.trunk.new_cache})()
        with pytest.raises(torch.OutOfMemoryError):
            engine.generate(PROMPT, max_new_tokens=4)


def test_the_arena_that_shrinks_gives_its_pages_back() -> None:
    """In process: the system has them again, and the budget's peak is remembered."""
    from moespac.experts.in_process import InProcessAccelerator
    from moespac.experts.workers import Bell

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    accelerator = InProcessAccelerator(64, 1 << 20, Bell(), asynchronous=False)
    accelerator.arena.fill_(1)
    before = resident()
    accelerator.shrink(16, [])
    assert before - resident() > 40 << 20
    assert accelerator.arena.shape == (16, 1 << 20) and np.all(accelerator.arena.numpy() == 1)
    accelerator.close()
