"""Engines whose accelerator is the CUDA tier, over a card that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from moespac.engine import build
from moespac.experts.cuda.arena import MappedArena, PlainArena
from tests.experts.fake_cuda import PAGE, FakeDriver, FakeVirtualMemory, fake_cuda


@contextmanager
def cuda_in_place_of_a_card(
    monkeypatch: pytest.MonkeyPatch, mapped: bool = True
) -> Iterator[list[FakeDriver]]:
    """Within it ``moespac.load`` opens such engines; yields the cards, in order. ``mapped``: the arena keeps
    records when it shrinks."""
    cards: list[FakeDriver] = []

    def open_fake(device, slots, host, config, bell, tape):
        cards.append(FakeDriver())
        size = slots, host.shape[1]
        arena = MappedArena(*size, FakeVirtualMemory(), PAGE) if mapped else PlainArena(*size, device)
        asynchronous, ahead = config.memory.asynchronous, config.device.copies_ahead
        accelerator = fake_cuda(
            cards[-1], host, slots, bell, asynchronous, arena=arena, copies_ahead=ahead, tape=tape
        )
        accelerator.in_order = False  # joins are computed here at once, and not on the card's stream
        return accelerator

    monkeypatch.setattr(build, "open_accelerator", open_fake)
    yield cards
    for card in cards:
        card.close()
