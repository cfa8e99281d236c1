"""A drafter that has not drafted for a while is asked what it would have drafted, and the governor is told."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

import moespac
from moespac.config import SamplingConfig
from moespac.speculate.drafters import ModelDrafter
from moespac.speculate.governor import FixedWindow
from moespac.speculate.sampling import probabilities
from tests.families import VOCABULARY, build_model, save_checkpoint

PROMPTS = ([5, 17, 3, 17], [60, 2, 9], [1, 1, 30, 8, 4])
TOKENS = 40


class Scripted(FixedWindow):
    """Drafts in two passes of seven; what it hears is kept."""

    def __init__(self) -> None:
        super().__init__(0)
        self._windows = itertools.cycle([0, 0, 0, 0, 2, 2, 0])
        self.seen: list[float] = []
        self.draft_seconds: list[float] = []

    def choose(self) -> int:
        return next(self._windows)

    def looks_back(self, k: int, undrafted: int) -> bool:
        return undrafted >= (1 if k else 3)

    def saw_drafts(self, accepted) -> None:
        self.seen += accepted

    def observe(self, drafted, accepted, draft_seconds, *seen) -> None:
        self.draft_seconds.append(draft_seconds)


class Spy(ModelDrafter):
    """Notes what it is shown, and takes its time to look back."""

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__(build_model("qwen3_moe", num_hidden_layers=2), VOCABULARY)
        self.asked: list[tuple[list[int], list[float]]] = []
        self.answered: list[float] = []
        self.shown = 0  # tokens that it knew when it last drafted or looked back
        self.pause = pause

    def propose(self, tokens, k):
        self.shown = len(tokens)
        return super().propose(tokens, k)

    def look_back(self, tokens, chances):
        assert len(tokens) - len(chances) >= self.shown  # nothing is judged twice
        self.shown = len(tokens)
        time.sleep(self.pause)
        self.asked.append((list(tokens), chances))
        seen = super().look_back(tokens, chances)
        self.answered += seen
        return seen


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory):
    path = save_checkpoint("qwen3_moe", tmp_path_factory.mktemp("target"))
    with moespac.load(path, draft="none", host_memory="50%", window=0, profile=None) as engine:
        yield engine


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.2, "top_k": 6}])
def test_each_of_several_streams_drafters_is_asked_of_its_own_text(engine, settings) -> None:
    governor, engine._governor = engine._governor, Scripted()
    streams = [engine.stream(prompt, max_new_tokens=TOKENS, **settings) for prompt in PROMPTS]
    for stream in streams:
        stream.drafter = Spy()
    while not all(stream.done for stream in streams):
        for stream in streams:
            if not stream.done:
                stream.advance()
    heard, engine._governor = engine._governor.seen, governor
    sampling, model = SamplingConfig(**settings), build_model("qwen3_moe")
    for prompt, stream in zip(PROMPTS, streams, strict=True):
        stream.close()
        spy, tokens = stream.drafter, prompt + stream.result.token_ids
        assert len(spy.asked) > 5
        with torch.inference_mode():
            logits = model(torch.tensor([tokens])).logits[0].float()
        for shown, chances in spy.asked:
            assert shown == tokens[: len(shown)]
            places = range(len(shown) - len(chances), len(shown))
            assert 1 <= len(chances) <= 3 and places[0] >= len(prompt)
            if sampling.greedy:
                assert chances == [1.0] * len(chances)
            else:
                rows = probabilities(logits[[place - 1 for place in places]], sampling)
                expected = rows[range(len(places)), [tokens[place] for place in places]].tolist()
                assert chances == pytest.approx(expected, rel=1e-3)
    assert len(heard) == sum(len(stream.drafter.answered) for stream in streams) > 30
    assert sum(heard) == pytest.approx(sum(sum(stream.drafter.answered) for stream in streams))


def test_it_is_no_part_of_what_drafting_takes_and_changes_no_token(engine) -> None:
    plain = engine.generate(PROMPTS[0], max_new_tokens=TOKENS)
    governor, engine._governor = engine._governor, Scripted()
    drafter, engine.drafter = engine.drafter, Spy(pause=0.1)
    result = engine.generate(PROMPTS[0], max_new_tokens=TOKENS)
    scripted, engine._governor = engine._governor, governor
    spy, engine.drafter = engine.drafter, drafter
    assert result.token_ids == plain.token_ids
    assert len(spy.asked) > 5
    assert sorted(scripted.draft_seconds)[-3] < 0.1  # but for a pause of the machine
    assert result.summary.seconds["draft"] > 0.1 * len(spy.asked)


def test_a_fixed_window_never_looks_back(engine) -> None:
    for k in (0, 2):
        governor, engine._governor = engine._governor, FixedWindow(k)
        drafter, engine.drafter = engine.drafter, Spy()
        engine.generate(PROMPTS[1], max_new_tokens=TOKENS)
        spy, engine.drafter, engine._governor = engine.drafter, drafter, governor
        assert spy.asked == []
