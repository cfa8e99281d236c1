"""Recorded over static buffers, a decoder says what it says in torch: any window, any length, after any rewind."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import moespac
from moespac.config import GraphConfig, SamplingConfig
from moespac.model.graphed import GraphedTrunk, graphed_trunk
from moespac.model.lean import lean_trunk
from moespac.model.recorder import CudaRecorder, InProcess, Recorder
from moespac.model.static_cache import StaticCache
from moespac.schedule.stats import PassClock
from moespac.speculate.drafters import ModelDrafter
from tests.families import VOCABULARY, build_model, reference_tokens, save_checkpoint
from tests.model.recording import OperationRecorder

PLAIN = ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe"]
SMALL = GraphConfig(least_bucket=16, windows_kept=4)  # buckets change and windows are forgotten all the time
TOKENS = torch.arange(120) * 31 % VOCABULARY


def dense_model() -> torch.nn.Module:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, **sizes, **heads)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 2.0 / parameter.shape[-1] ** 0.5)
    return model


def recorded(model: torch.nn.Module, recorder: Recorder | None = None, config=SMALL) -> GraphedTrunk:
    lean = lean_trunk(model, threads=1)
    assert lean is not None
    trunk = graphed_trunk(model, lean, recorder or OperationRecorder(), PassClock(), config)
    assert trunk is not None
    return trunk


class Checked:
    """A sequence in a recorded trunk beside the same sequence in torch."""

    def __init__(self, trunk: GraphedTrunk) -> None:
        self._trunk, self._cache = trunk, trunk.new_cache()
        self._lean = trunk._lean
        self._lean_cache = self._lean.new_cache()
        self.tolerance = 1e-5  # of the spread of the logits

    @property
    def length(self) -> int:
        assert self._cache.length == self._lean_cache.length
        return self._cache.length

    @torch.inference_mode()
    def run(self, tokens: torch.Tensor, keep: int) -> None:
        expected = self._lean(tokens, self._lean_cache, keep)
        logits = self._trunk(tokens, self._cache, keep)
        assert logits.shape == expected.shape
        assert float((logits.cpu() - expected).abs().max() / expected.std()) < self.tolerance

    def rewind(self, tokens: int) -> None:
        self._cache.rewind(tokens)
        self._lean_cache.rewind(tokens)


@pytest.mark.parametrize("family", [*PLAIN, "dense"])
def test_windows_in_any_order_say_what_torch_says(family: str) -> None:
    model = dense_model() if family == "dense" else build_model(family)
    choose, recorder = random.Random(family), OperationRecorder()
    trunk = recorded(model, recorder)
    before = recorder.recorded
    sequences = [Checked(trunk) for _ in range(2)]
    for _ in range(40):
        sequence = choose.choice(sequences)  # each has an arena of its own
        if sequence.length > 90 or choose.random() < 0.25:
            sequence.rewind(choose.randint(0, sequence.length))
        size = choose.choice([1, 1, 5, choose.randint(1, 17), 24])
        sequence.run(
            torch.tensor([choose.randrange(VOCABULARY) for _ in range(size)]), choose.randint(1, size)
        )
    assert recorder.recorded - before >= 8


def test_every_window_size_and_a_bucket_that_ends_with_it() -> None:
    model = build_model("qwen3_moe")
    trunk = recorded(model)
    for size in range(1, 18):
        sequence = Checked(trunk)
        sequence.run(TOKENS[: 32 - size], 1)
        for _ in range(3):  # as it is, while it is recorded, and as a recording
            sequence.run(TOKENS[32 - size : 32], size)
            sequence.rewind(size)
        sequence.run(TOKENS[32 - size : 32], size)
        sequence.run(TOKENS[32:33], 1)


def test_what_was_recorded_before_a_cache_moved_is_forgotten() -> None:
    trunk = recorded(build_model("qwen3_moe"), config=GraphConfig(least_bucket=16, windows_kept=24))
    sequence = Checked(trunk)
    for _ in range(3):
        sequence.run(TOKENS[:3], 3)
        sequence.rewind(3)
    sequence.run(TOKENS[:100], 1)  # more room than any check before took
    sequence.rewind(97)
    sequence.run(TOKENS[50:53], 3)
    sequence.run(TOKENS[60:90], 30)


def test_a_recording_is_made_once() -> None:
    model, recorder = build_model("qwen3_moe"), OperationRecorder()
    trunk = recorded(model, recorder, GraphConfig())
    before = recorder.recorded
    for _ in range(2):
        sequence = Checked(trunk)
        for start in (0, 3, 6):
            sequence.run(TOKENS[start : start + 3], 3)
        del sequence  # its arena goes to the next, with what was recorded over it
    assert recorder.recorded - before == 3 + 1


def test_arenas_are_lent_again_and_only_when_used() -> None:
    trunk = recorded(build_model("olmoe"))
    first, unused = trunk.new_cache(), trunk.new_cache()
    trunk(TOKENS[:3], first, 1)
    arena = first.arena
    assert unused._arena is None
    del first
    assert trunk.new_cache().arena is arena


def test_attention_reads_no_more_than_the_bucket() -> None:
    """Keys beyond it are spoilt, and nobody notices."""
    model = build_model("qwen3_moe")
    trunk = recorded(model)
    long = trunk.new_cache()
    trunk(TOKENS[:60], long, 1)
    arena = long.arena
    assert arena.room == 64
    del long
    sequence = Checked(trunk)
    assert isinstance(sequence._cache, StaticCache) and sequence._cache.arena is arena
    with torch.inference_mode():
        sequence._cache.arena.store[..., 16:, :] = torch.nan
    sequence.run(TOKENS[:9], 9)
    sequence.run(TOKENS[9:16], 7)


def test_a_context_bounds_the_room() -> None:
    trunk = recorded(build_model("qwen3_moe", max_position_embeddings=80))
    cache = trunk.new_cache()
    trunk(TOKENS[:70], cache, 1)
    assert cache.arena.room == 80


def test_where_nothing_can_be_recorded_the_trunk_runs_in_torch(monkeypatch, caplog) -> None:
    from moespac.model import trunk as trunks

    monkeypatch.setattr(trunks, "recorder_for", lambda device: OperationRecorder(failing=True))
    with caplog.at_level("WARNING", "moespac"):
        opened = trunks.open_trunk(build_model("qwen3_moe"), 1, PassClock(), GraphConfig())
    assert type(opened).__name__ == "LeanTrunk"
    assert len(caplog.records) == 1 and "not permitted" in caplog.text


def test_a_router_that_waits_for_the_device_is_not_recorded(caplog) -> None:
    model = build_model("qwen3_moe")
    gate = model.model.layers[1].mlp.gate
    route = gate.forward
    gate.forward = lambda x: route(x * (1.0 if x.sum().item() < 1e9 else 0.5))
    lean = lean_trunk(model, threads=1)
    with caplog.at_level("WARNING", "moespac"):
        assert graphed_trunk(model, lean, OperationRecorder(), PassClock(), SMALL) is None
    assert "waits for the device" in caplog.text


# ---- drafting ----------------------------------------------------------------------------------------


def drafter(model: torch.nn.Module, monkeypatch, recorder: Recorder | None, vocabulary: int) -> ModelDrafter:
    monkeypatch.setattr("moespac.model.trunk.recorder_for", lambda device: recorder)
    made = ModelDrafter(model, vocabulary)
    made.begin(SamplingConfig(), torch.Generator())
    return made


@pytest.mark.parametrize("vocabulary", [VOCABULARY, VOCABULARY - 20, VOCABULARY + 5])
def test_drafts_fed_back_on_the_device_are_those_of_one_step_after_the_other(monkeypatch, vocabulary) -> None:
    model, choose = dense_model(), random.Random(vocabulary)
    stepping = drafter(model, monkeypatch, None, vocabulary)
    recorder = OperationRecorder()
    feeding = drafter(model, monkeypatch, recorder, vocabulary)
    assert isinstance(feeding._trunk, GraphedTrunk) and feeding._trunk.drafts
    tokens = TOKENS[:20].tolist()
    for _ in range(12):
        k = choose.randint(1, 20)
        tokens = [token for token in tokens if token < vocabulary]
        expected = stepping.propose(tokens, k).tokens
        assert feeding.propose(tokens, k).tokens == expected
        tokens = tokens + expected[: choose.randint(0, len(expected))] + [choose.randrange(vocabulary)]
        if len(tokens) > 90 or choose.random() < 0.2:
            tokens = tokens[: choose.randint(1, 30)]


def test_drafting_ticks_between_tokens_and_waits_once(monkeypatch) -> None:
    events: list[str] = []

    class Watched(OperationRecorder):
        def mailbox(self, source):
            box = super().mailbox(source)
            wait = box.wait
            box.wait = lambda: (events.append("wait"), wait())
            return box

    made = drafter(dense_model(), monkeypatch, Watched(), VOCABULARY)
    made._tick = lambda: events.append("tick")
    made.propose([5, 6, 7], 4)
    assert events == ["tick"] * 3 + ["wait"]


def test_a_drafter_that_was_interrupted_starts_afresh(monkeypatch) -> None:
    made = drafter(dense_model(), monkeypatch, OperationRecorder(), VOCABULARY)
    expected = made.propose([5, 6, 7], 4).tokens

    def interrupt() -> None:
        raise KeyboardInterrupt

    made._tick = interrupt
    with pytest.raises(KeyboardInterrupt):
        made.propose([5, 6, 7, 8], 4)
    made._tick = lambda: None
    assert made.propose([5, 6, 7], 4).tokens == expected


# ---- in the engine -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


@pytest.mark.parametrize("budget", ["100%", "40%"])
def test_greedy_tokens_are_the_models_own(checkpoint: Path, monkeypatch, budget: str) -> None:
    monkeypatch.setattr("moespac.model.trunk.recorder_for", lambda device: OperationRecorder())
    settings = {"host_memory": budget, "accelerator_memory": "25%", "profile": None, "window": 4}
    with moespac.load(checkpoint, draft="none", **settings) as engine:
        assert isinstance(engine.trunk, GraphedTrunk)
        engine.drafter = ModelDrafter(build_model("qwen3_moe"), VOCABULARY)
        prompt = (5, 17, 3, 60, 17, 3)
        result = engine.generate(prompt, max_new_tokens=30)
        assert result.token_ids == reference_tokens("qwen3_moe", prompt, 30)
        summary = result.summary
        assert summary.acceptance_rate is not None and summary.acceptance_rate > 0.5
        assert summary.host_us_per_layer is not None and summary.host_us_per_layer > 0
        # A recording, a copy with its event, and the experts' output; the last recording is one more a pass.
        assert summary.launches_per_layer == pytest.approx(4 + 1 / 3, abs=0.01)
        assert summary.seconds["wait_for_device"] > 0
        engine.runtime.memory.check_integrity()


def test_sampling_and_log_probabilities_work_over_it(checkpoint: Path, monkeypatch) -> None:
    settings = {"draft": "lookup", "host_memory": "100%", "profile": None, "window": 3}
    drawn = []
    for recorder in (None, InProcess()):
        monkeypatch.setattr("moespac.model.trunk.recorder_for", lambda device, recorder=recorder: recorder)
        with moespac.load(checkpoint, **settings) as engine:
            drawn.append(
                engine.generate((5, 17, 5, 17), max_new_tokens=12, temperature=0.8, seed=4).token_ids
            )
    assert drawn[0] == drawn[1]


def test_a_timeline_shows_the_stretches_on_the_device(checkpoint: Path, monkeypatch) -> None:
    monkeypatch.setattr("moespac.model.trunk.recorder_for", lambda device: InProcess())
    timeline = moespac.timeline.Timeline()
    with moespac.load(checkpoint, draft="none", host_memory="100%", profile=None) as engine:
        engine.record_timeline(timeline.record)
        engine.generate((5, 17), max_new_tokens=3)
    spans = [event for event in timeline.events if event.lane == "accelerator trunk"]
    assert [event.name for event in spans[:4]] == [f"stretch {n}" for n in range(4)]
    assert all(a.start + a.duration <= b.start + 1e-9 for a, b in pairwise(spans))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: graphs are captured there")
@pytest.mark.parametrize("family", PLAIN)
def test_on_cuda(family: str) -> None:
    device = torch.device("cuda")
    model = build_model(family).to(device)
    trunk = recorded(model, CudaRecorder(device), GraphConfig(least_bucket=16, windows_kept=4))
    sequence, choose = Checked(trunk), random.Random(family)
    sequence.tolerance = 1e-4  # other kernels, other orders of summing
    for _ in range(20):
        if sequence.length > 80 or choose.random() < 0.25:
            sequence.rewind(choose.randint(0, sequence.length))
        size = choose.choice([1, 2, 5, 17, 24])
        sequence.run(torch.tensor([choose.randrange(VOCABULARY) for _ in range(size)]), size)
    assert trunk._recorder.captures


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: graphs are captured there")
def test_drafts_on_cuda(monkeypatch) -> None:
    feeding = drafter(dense_model().to("cuda"), monkeypatch, CudaRecorder(torch.device("cuda")), VOCABULARY)
    stepping = drafter(dense_model(), monkeypatch, None, VOCABULARY)
    assert isinstance(feeding._trunk, GraphedTrunk)
    tokens = TOKENS[:20].tolist()
    for k in (1, 4, 8, 20, 4):
        expected = stepping.propose(tokens, k).tokens
        assert feeding.propose(tokens, k).tokens == expected
        tokens += expected[: k // 2 + 1]
    assert feeding._trunk._recorder.captures
