"""The whole engine over the CUDA tier, with a card that is not there: lossless, whatever is page-locked or late."""

from __future__ import annotations

from pathlib import Path

import pytest

import moespac
from moespac.timeline import ACCELERATOR, LINK, Timeline
from tests.engine.cuda import cuda_in_place_of_a_card
from tests.families import reference_tokens, save_checkpoint

PROMPT = (5, 17, 3, 60, 17, 3)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("policy", ["moe-spac", "lru", "accelerate", "fiddler"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_greedy_tokens_are_the_models_own(
    family: str, policy: str, asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_checkpoint(family, tmp_path)
    settings = {
        "host_memory": "40%",
        "accelerator_memory": "30%",
        "policy": policy,
        "asynchronous": asynchronous,
    }
    with cuda_in_place_of_a_card(monkeypatch) as cards:
        with moespac.load(path, draft="lookup", window=3, profile=None, **settings) as engine:
            timeline = Timeline()
            engine.record_timeline(timeline.record)
            result = engine.generate(PROMPT, max_new_tokens=20)
            assert result.token_ids == reference_tokens(family, PROMPT, 20)
            engine.runtime.memory.check_integrity()
        if policy in ("lru", "accelerate"):  # the others may find that this card is not worth it
            assert cards[0].copy_stream.put and cards[0].trunk_stream.put
            assert {LINK, ACCELERATOR} <= {event.lane for event in timeline.events}
            assert result.summary.bytes_read["link"] > 0 and result.summary.link_bandwidth > 0
        assert result.summary.page_locked == pytest.approx(0.5, abs=0.1) and result.summary.shrinks == 0
