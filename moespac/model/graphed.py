"""A plain decoder on a device, launched as recordings over static buffers: on CUDA, as CUDA graphs.

A window of up to ``GraphConfig.most_tokens`` is one recording for each stretch between two blocks of experts, for
its size and its bucket of lengths; between two of them the host learns the router's choice from one small copy, and
dispatches the experts. Where all experts are on the device, and for dense models, the pass is one recording.
Prompts run in torch, over the same weights and the same cache.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from moespac.config import GraphConfig
from moespac.experts.runtime import OffloadedExperts
from moespac.model.lean import LeanTrunk, deviation, tolerance
from moespac.model.recorder import Mailbox, Recorder, Stopwatch, Work
from moespac.model.static_cache import Arena, ArenaPool, ArenaShape, StaticCache
from moespac.model.stretches import Buffers, Decoder, DeviceExperts, RoutingRow, Window, read_decoder
from moespac.schedule.stats import PassClock
from moespac.timeline import TRUNK_ON_DEVICE

log = logging.getLogger(__name__)

_CHECKED = (
    (0, 40),
    (40, 41),
    (41, 46),
    (46, 63),
)  # a prompt, a token, and two windows; less than any context
_IDLE = (
    "wait_for_device",
    "wait_for_experts",
    "wait_for_accelerator",
    "host_experts",
)  # not the host's own time


class MayBeResident(Protocol):
    """Who has a model's experts."""

    def resident(self) -> DeviceExperts | None:
        """All of them, if every one is on the device; the same object for as long as it stays so."""


class GraphedTrunk:
    """Runs a decoder over a window. Made by ``graphed_trunk``; one pass at a time."""

    def __init__(
        self,
        decoder: Decoder,
        lean: LeanTrunk,
        context: int,
        recorder: Recorder,
        clock: PassClock,
        config: GraphConfig,
    ) -> None:
        """``lean`` runs the prompts; ``context``: tokens that a sequence can have at most."""
        self._runtime: MayBeResident | None = None
        self._decoder = decoder
        self._lean = lean
        self._recorder = recorder
        self._clock = clock
        self._most = config.most_tokens
        self._buffers = Buffers(decoder, config.most_tokens)
        self._feed = recorder.feed(self._buffers.inputs)
        self._drafted = recorder.mailbox(self._buffers.drafted)
        self._experts = [block.experts for block in decoder.routed]
        shape = ArenaShape(len(decoder.layers), decoder.groups, decoder.width, context)
        self._arenas = ArenaPool(partial(Arena, shape, decoder.embedding, lean.rotary.at, config))

    @property
    def drafts(self) -> bool:
        """Whether ``draft`` can be called: there are no experts, which would need the host in between."""
        return not self._experts

    def attach(self, experts: MayBeResident) -> None:
        """Passes are asked for as a whole while all experts are on the device."""
        self._runtime = experts

    def new_cache(self) -> StaticCache:
        return StaticCache(self._arenas)

    @torch.inference_mode()
    def __call__(self, tokens: torch.Tensor, cache: StaticCache, keep: int) -> torch.Tensor:
        """As ``trunk.Trunk``; the logits of a window stay on the device."""
        count = len(tokens)
        if count > self._most:
            return self._prompt(tokens, cache, keep)
        begin, idle = self._clock.now(), self._idle()
        arena, bucket = cache.arena, self._begin(tokens.tolist(), cache, cache.length + count)
        experts = self._runtime.resident() if self._runtime is not None else None
        if self._experts and experts is None:
            self._in_stretches(self._stretches(arena, count, bucket))
        else:
            self._whole(self._recorded_whole(arena, count, bucket, experts))
        cache.length += count
        self._clock.path.passed(len(self._experts), self._clock.now() - begin - (self._idle() - idle))
        return self._buffers.logits[count - keep : count].clone()

    @torch.inference_mode()
    def draft(
        self,
        tokens: Sequence[int],
        cache: StaticCache,
        count: int,
        vocabulary: int,
        tick: Callable[[], None] = lambda: None,
    ) -> list[int]:
        """The ``count`` likeliest tokens, each after the ones before it, of the first ``vocabulary`` there are.

        ``tokens`` and all drafted ones but the last join the cache. The host only launches, and learns the tokens
        once they are drafted; ``tick`` is called between them.
        """
        assert self.drafts
        missing, drafted = list(tokens), list[int]()
        if len(missing) > self._most:
            self._prompt(torch.tensor(missing[:-1]), cache, 1)
            missing = missing[-1:]
        while len(drafted) < count:
            if drafted:
                tick()
            together = min(count - len(drafted), self._most)
            drafted += self._draft_together(missing, cache, together, vocabulary, tick)
            missing = drafted[-1:]
        return drafted

    def _draft_together(
        self, tokens: list[int], cache: StaticCache, count: int, vocabulary: int, tick: Callable[[], None]
    ) -> list[int]:
        """At most ``most_tokens`` drafted tokens, without a word from the device in between."""
        end = cache.length + len(tokens) + count - 1
        arena, bucket = cache.arena, self._begin(tokens, cache, end)
        self._fed_back(arena, len(tokens), bucket, vocabulary)()
        for _ in range(count - 1):
            tick()
            self._fed_back(arena, 1, bucket, vocabulary)()
        self._drafted.send()
        with self._clock.measure("wait_for_device"):
            self._drafted.wait()
        cache.length = end
        return self._drafted.host[:count].tolist()

    # ---- what runs -----------------------------------------------------------------------------------

    def _begin(self, tokens: list[int], cache: StaticCache, end: int) -> int:
        """The device gets where the window stands, and what it is; the bucket of ``end`` tokens."""
        bucket = cache.arena.reserve(cache.length, end)
        self._feed([cache.length, 0, *tokens])
        return bucket

    def _in_stretches(self, stretches: _Stretches) -> None:
        watch = _Watch(self._recorder.stopwatch(), self._clock) if self._clock.tape.record else None
        window, count, path = stretches.window, stretches.window.tokens, self._clock.path
        x, block = self._buffers.x[:count], self._buffers.block[:count]
        for number, experts in enumerate(self._experts):
            self._launch(stretches, number, watch)
            row = window.rows[number]
            index, weights = row.index, row.weights
            if isinstance(experts, OffloadedExperts):  # the host decides who computes them
                index = stretches.sent(number, self._clock)
                path.launches += 2  # the copy, and the event behind it
                experts.write(block, x, index, weights)
            else:
                block.copy_(experts.forward(x, index, weights))
            path.launches += 1
        self._launch(stretches, len(self._experts), watch)
        stretches.met = True
        if watch is not None:
            watch.tell()

    def _launch(self, stretches: _Stretches, number: int, watch: _Watch | None) -> None:
        launch = stretches.launch(number, self._recorder, self._buffers)
        if watch is None:
            launch()
        else:
            watch.time(launch)
        self._clock.path.launches += 1

    def _whole(self, whole: _Whole) -> None:
        whole.launch()
        self._clock.path.launches += 1
        if whole.experts is None:
            return
        whole.routing.send()
        self._clock.path.launches += 2
        with self._clock.measure("wait_for_device"):  # for the logits too, which were there before
            whole.routing.wait()
        rows = [RoutingRow(row, whole.window.tokens, self._decoder.top_k) for row in whole.routing.host]
        whole.experts.ran([row.index for row in rows], [row.weights for row in rows])

    def _prompt(self, tokens: torch.Tensor, cache: StaticCache, keep: int) -> torch.Tensor:
        """Any number of tokens, in torch."""
        start, end = cache.length, cache.length + len(tokens)
        cache.arena.reserve(start, end)
        x = F.embedding(tokens.to(self._recorder.device), self._decoder.embedding)
        rotary = self._lean.rotary.at(start, end)
        logits = self._lean.in_torch(x, cache.arena.store, start, rotary, keep)
        cache.length = end
        return logits

    def _idle(self) -> float:
        return sum(self._clock.seconds.get(cause, 0.0) for cause in _IDLE)

    # ---- what is recorded ----------------------------------------------------------------------------

    def _stretches(self, arena: Arena, tokens: int, bucket: int) -> _Stretches:
        def make() -> _Stretches:
            return _Stretches(self._window(arena, tokens, bucket), self._recorder)

        return arena.recorded(("stretches", tokens, bucket), make)

    def _recorded_whole(
        self, arena: Arena, tokens: int, bucket: int, experts: DeviceExperts | None
    ) -> _Whole:
        def make() -> _Whole:
            window = self._window(arena, tokens, bucket)
            work = self._recorder.record(partial(window.whole, experts), self._buffers.state)
            return _Whole(window, work, experts, self._recorder.mailbox(window.routing))

        return arena.recorded(("whole", tokens, bucket, experts), make)

    def _fed_back(self, arena: Arena, tokens: int, bucket: int, vocabulary: int) -> Work:
        def make() -> Work:
            window = self._window(arena, tokens, bucket)

            def work() -> None:
                window.whole(None)
                window.feed_back(vocabulary)

            return self._recorder.record(work, self._buffers.state)

        return arena.recorded(("fed back", tokens, bucket, vocabulary), make)

    def _window(self, arena: Arena, tokens: int, bucket: int) -> Window:
        return Window(self._decoder, self._buffers, arena, tokens, bucket)


class _Stretches:
    """A window's recordings, made by its second pass: a short prompt's size may never come again, and a recording
    takes as long as some passes. Each is made when the pass comes to it, and has something to run over."""

    def __init__(self, window: Window, recorder: Recorder) -> None:
        self.window = window
        self.met = False  # the first pass is over
        self._launches: list[Work | None] = [None] * (len(window.rows) + 1)
        self._boxes = [recorder.mailbox(row) for row in window.routing]
        shapes = [row.index.shape for row in window.rows]
        self._chosen = [
            RoutingRow(box.host, *shape).index for box, shape in zip(self._boxes, shapes, strict=True)
        ]

    def launch(self, number: int, recorder: Recorder, buffers: Buffers) -> Work:
        launch = self._launches[number]
        if launch is None:
            launch = partial(self.window.stretch, number)
            if self.met:
                launch = self._launches[number] = recorder.record(launch, buffers.state)
        return launch

    def sent(self, number: int, clock: PassClock) -> torch.Tensor:
        """The router's choice in a layer, (T, k) int64 on the host, until it is sent again."""
        box = self._boxes[number]
        box.send()
        with clock.measure("wait_for_device"):
            box.wait()
        return self._chosen[number]


@dataclass(frozen=True)
class _Whole:
    """A recorded pass, and what its routers chose in all layers."""

    window: Window
    launch: Work
    experts: DeviceExperts | None
    routing: Mailbox


class _Watch:
    """Tells the timeline when the device ran which stretch: what lies between them is experts, or nothing."""

    def __init__(self, stopwatch: Stopwatch, clock: PassClock) -> None:
        self._stopwatch = stopwatch
        self._clock = clock
        self._begin = clock.now()
        stopwatch.lap()

    def time(self, launch: Work) -> None:
        self._stopwatch.lap()
        launch()
        self._stopwatch.lap()

    def tell(self) -> None:
        with self._clock.measure("wait_for_device"):
            _, *laps = self._stopwatch.read()
        for number, (begin, end) in enumerate(zip(laps[::2], laps[1::2], strict=True)):
            self._clock.tape(TRUNK_ON_DEVICE, f"stretch {number}", self._begin + begin, end - begin)


@torch.inference_mode()
def graphed_trunk(
    model: Any, lean: LeanTrunk, recorder: Recorder, clock: PassClock, config: GraphConfig
) -> GraphedTrunk | None:
    """``lean``'s pass as recordings on ``recorder``'s device, its experts callable as in ``lean_trunk``.

    None, and a line in the log, where they cannot be made, or say something else than ``lean`` does.
    """
    try:
        decoder = read_decoder(model, lean)
        if decoder is None:
            return None
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        trunk = GraphedTrunk(decoder, lean, limit, recorder, clock, config)
        off = _deviation(trunk, lean, len(decoder.embedding))
    except RuntimeError as error:  # out of memory, or an operation that this device lacks
        log.warning("no recorded trunk, tokens come slower: %s", str(error).splitlines()[0])
        return None
    clock.path.clear()
    if off > tolerance(model.dtype):
        log.warning("%s: no recorded trunk, it is %.1e off", model.config.model_type, off)
        return None
    return trunk if recorder.captures else None


def _deviation(trunk: GraphedTrunk, lean: LeanTrunk, vocabulary: int) -> float:
    """Of the recordings, which the second time makes."""
    tokens = torch.arange(_CHECKED[-1][1]) * 7919 % vocabulary

    def logits(forward: Any) -> torch.Tensor:
        cache = forward.new_cache()
        return torch.cat([forward(tokens[a:b], cache, b - a).cpu() for a, b in _CHECKED])

    logits(trunk)
    return deviation(logits(trunk), logits(lean))
