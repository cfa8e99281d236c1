"""The CUDA tier on a card: what a stand-in cannot show."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

import moespac
from moespac.config import DeviceConfig, EngineConfig
from moespac.experts.cuda.accelerator import CudaAccelerator
from moespac.experts.cuda.arena import MappedArena, open_arena
from moespac.experts.movers import host_arena
from moespac.experts.open_accelerator import open_accelerator
from moespac.experts.workers import Bell, Priority
from moespac.schedule.tiers import Move
from moespac.timeline import Tape
from tests.families import reference_tokens, save_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA card here")

RECORD = 4 << 20
SLOTS = 24


@pytest.fixture
def card():
    bell, host = Bell(), host_arena(SLOTS, RECORD)
    host.copy_(torch.arange(1, SLOTS + 1, dtype=torch.uint8)[:, None].expand(SLOTS, RECORD))
    accelerator = open_accelerator(torch.device("cuda"), SLOTS, host, EngineConfig(), bell, Tape())
    assert isinstance(accelerator, CudaAccelerator)
    yield accelerator, host, bell
    accelerator.close()


def wait(bell: Bell, *tickets) -> None:
    while True:
        seen = bell.count()
        if all(ticket.done for ticket in tickets):
            assert [ticket.error for ticket in tickets] == [None] * len(tickets)
            return
        bell.wait_beyond(seen)


def test_records_arrive_and_copies_are_as_fast_as_the_link(card) -> None:
    accelerator, host, bell = card
    tickets = [accelerator.copy_in("", host[s], s, Priority.SPECULATIVE) for s in range(SLOTS)]
    wait(bell, *tickets)
    assert accelerator.arena[:, -1].tolist() == list(range(1, SLOTS + 1))
    start = time.perf_counter()
    tickets = [accelerator.copy_in("", host[s], s, Priority.SPECULATIVE) for s in range(SLOTS)]
    wait(bell, *tickets)
    spent, busy = time.perf_counter() - start, sum(ticket.seconds for ticket in tickets)
    assert busy > 0.8 * spent, "the link does not idle between copies"
    if accelerator.page_locked == 1:
        assert SLOTS * RECORD / busy > 5e9


def test_computing_sees_what_was_copied_and_the_trunk_sees_what_was_computed(card) -> None:
    accelerator, host, bell = card
    wait(bell, *[accelerator.copy_in("", host[s], s, Priority.DEMAND) for s in range(SLOTS)])
    x = torch.ones(RECORD, device="cuda") * 2  # of the trunk, on the stream that is current
    out = torch.empty(SLOTS, device="cuda")

    def job() -> None:
        for slot in range(SLOTS):
            out[slot] = (accelerator.arena[slot].float() * x).mean()

    ticket = accelerator.compute("", job)
    assert (out + 0).tolist() == [2.0 * (slot + 1) for slot in range(SLOTS)], "the join is on the same stream"
    wait(bell, ticket)
    assert ticket.seconds > 0


def test_memory_is_given_back_and_records_stay(card) -> None:
    accelerator, host, bell = card
    wait(bell, *[accelerator.copy_in("", host[s], s, Priority.DEMAND) for s in range(SLOTS)])
    torch.cuda.empty_cache()
    before, _ = torch.cuda.mem_get_info()
    moves = [Move(SLOTS - 1, 0)] if accelerator.keeps else []
    accelerator.shrink(1, moves)
    after, _ = torch.cuda.mem_get_info()
    assert after - before >= SLOTS * RECORD - DeviceConfig.arena_piece
    if accelerator.keeps:
        assert int(accelerator.arena[0, 0]) == SLOTS


def test_the_arena_is_mapped() -> None:
    arena = open_arena(SLOTS, RECORD, torch.device("cuda"), DeviceConfig())
    assert isinstance(arena, MappedArena), "every card of these years has virtual memory management"
    assert arena.records.is_cuda and arena.records.shape == (SLOTS, RECORD)
    arena.close()


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_greedy_tokens_are_the_models_own(family: str, asynchronous: bool, tmp_path: Path) -> None:
    prompt = (5, 17, 3, 60, 17, 3)
    path = save_checkpoint(family, tmp_path)
    settings = {"host_memory": "50%", "accelerator_memory": "25%", "asynchronous": asynchronous}
    with moespac.load(path, draft="lookup", window=3, dtype="float32", profile=None, **settings) as engine:
        assert engine.model.device.type == "cuda"
        assert engine.generate(prompt, max_new_tokens=20).token_ids == reference_tokens(family, prompt, 20)


def test_an_amount_that_no_card_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_checkpoint("qwen3_moe", tmp_path)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (1 << 20, 80 << 30))
    with pytest.raises(moespac.ConfigError, match="do not fit"):
        moespac.load(path, draft="none", accelerator_memory="50%", profile=None)
