"""REPLAY: a text whose routing and acceptance are given, run by a model whose weights know nothing of it.

Three stand-ins in an otherwise unchanged engine: the drafter proposes the text's own tokens, and wrong ones where a
seeded draw for the position says so; the trunk is told the routing of the window's tokens before a pass, and its
logits afterwards say what the text says; and a router in each layer computes what it always did, then answers with
the routing that it was told. Verification, acceptance, caches, policies and transfers are the engine's own. The
draws, and what stands in for wrong drafts, are the simulator's (``sim.texts.DrawnText``): every policy sees the
same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moespac.config import SamplingConfig, SimulationConfig
from moespac.experts.runtime import ExpertRuntime
from moespac.model.trunk import Trunk
from moespac.policy.base import Sensor
from moespac.sim.guesses import guess
from moespac.sim.texts import DrawnText
from moespac.speculate.drafters import Draft, Drafter
from moespac.trace.schema import Trace, compact
from moespac.types import Observation

_CERTAIN = 1e9  # a logit beyond all others


@dataclass(frozen=True)
class ReplayedPass:
    """One pass of the target, as it is to come out."""

    seen: Observation
    drafts: list[int]
    says: list[int]  # the target's token after each of the last drafted + 1 tokens


class Replay:
    """The text that is being decoded. ``begin`` comes before each."""

    def __init__(self, trace: Trace, acceptance: float, prompt: int, vocabulary: int, seed: int) -> None:
        """``trace`` of ``decoded_only``; ``prompt``: so many tokens of each text are its prompt."""
        self.experts = trace.experts
        self._trace = trace
        self._acceptance = acceptance
        self._prompt_tokens = prompt
        self._vocabulary = vocabulary
        self._seed = seed
        self._pending: ReplayedPass | None = None  # was drafted for and has not run
        self._text: DrawnText | None = None

    def begin(self, sequence: int) -> list[int]:
        """The prompt of this sequence, whose turn it is now."""
        rng = np.random.default_rng([self._seed, sequence])
        self._text = DrawnText(self._trace, sequence, None, self._acceptance, self._prompt_tokens, rng)
        self._pending = None
        prompt = self._text.upcoming()
        assert prompt is not None and prompt.prefill, "a replayed text has a prompt"
        return prompt.tokens.tolist()

    def draft(self, most: int) -> ReplayedPass:
        """The pass to come, with at most so many drafts."""
        assert self._text is not None and self._pending is None
        seen = self._text.read(most)
        coming = self._text.upcoming()
        following = 0 if coming is None else int(coming.tokens[0])
        drafted = seen.window.drafted
        drafts = seen.window.tokens[len(seen.window.tokens) - drafted :].tolist()
        if seen.accepted < drafted and drafts[seen.accepted] == following:
            drafts[seen.accepted] = (
                following + 1
            ) % self._vocabulary  # what stands in may be right by chance
        says = [*drafts[: seen.accepted], *[following] * (drafted + 1 - seen.accepted)]
        self._pending = ReplayedPass(seen, drafts, says)
        return self._pending

    def look_back(self, tokens: int) -> list[float]:
        """As ``Text.look_back``."""
        assert self._text is not None
        return self._text.look_back(tokens)

    def take_pass(self) -> ReplayedPass:
        """The pass that runs now: the one that was drafted for, or one without drafts."""
        taken = self._pending or self.draft(0)
        self._pending = None
        return taken


class ReplayDrafter:
    """Implements ``Drafter``: proposes the replayed drafts, in the time that ``timed`` takes for its own."""

    def __init__(self, replay: Replay, timed: Drafter, runtime: ExpertRuntime, seed: int) -> None:
        self.name = f"replayed, {timed.name}"
        self._replay = replay
        self._timed = timed
        self._runtime = runtime
        self._rng = np.random.default_rng(seed)

    def begin(self, sampling: SamplingConfig, generator: torch.Generator) -> None:
        self._timed.begin(sampling, generator)

    def propose(self, tokens: list[int], k: int) -> Draft:
        self._timed.propose(tokens, k)
        drafted = self._replay.draft(k)
        policy = self._runtime.policy
        if Sensor.DRAFT_ROUTING in policy.sensors:  # as right as the simulator has it
            accuracy = SimulationConfig().draft_routing_accuracy
            policy.foresee_window(guess(drafted.seen.routing, self._replay.experts, accuracy, self._rng))
        return Draft(drafted.drafts)

    def look_back(self, tokens: list[int], chances: list[float]) -> list[float]:
        self._timed.look_back(tokens, chances)
        return self._replay.look_back(len(chances))

    def reset(self) -> None:
        self._timed.reset()

    def close(self) -> None:
        self._timed.close()


class Routes:
    """What the routers of all layers are to answer, on the device: (layers, tokens, k)."""

    def __init__(self, layers: int, tokens: int, top_k: int, device: torch.device) -> None:
        """``tokens``: in the largest pass. Before the first ``tell`` every token goes to experts 0 to k - 1."""
        self.index = torch.arange(top_k, device=device).repeat(layers, tokens, 1)

    def tell(self, routing: NDArray[np.int64]) -> None:
        """``routing`` (layers, T, k) of the pass to come."""
        self.index[:, : routing.shape[1]].copy_(torch.from_numpy(np.ascontiguousarray(routing)))
        if self.index.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the trunk may run on another stream


class ReplayedRouter(nn.Module):
    """Computes what the layer's ``router`` does, and answers with the routing that it was told.

    It has no weight of its own name, so that nobody takes it for the plain router and computes around it.
    """

    def __init__(self, router: nn.Module, routes: torch.Tensor) -> None:
        """``routes``: this layer's (tokens, k) of ``Routes.index``."""
        super().__init__()
        self.router = router
        self._routes = routes

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, weights, _ = self.router(hidden_states)
        return logits, weights, self._routes[: len(weights)]


class ReplayTrunk:
    """Implements ``Trunk``: the real one, told the routing before a pass, its logits overruled after it."""

    def __init__(self, trunk: Trunk, routes: Routes, replay: Replay) -> None:
        self._trunk = trunk
        self._routes = routes
        self._replay = replay

    def new_cache(self) -> Any:
        return self._trunk.new_cache()

    def __call__(self, tokens: torch.Tensor, cache: Any, keep: int) -> torch.Tensor:
        taken = self._replay.take_pass()
        assert len(tokens) == taken.seen.routing.shape[1] and keep == len(taken.says)
        self._routes.tell(taken.seen.routing)
        logits = self._trunk(tokens, cache, keep)
        logits[range(keep), taken.says] = _CERTAIN
        return logits


def put_routers(modules: Sequence[nn.Module], network: nn.Module, routes: Routes) -> None:
    """A ``ReplayedRouter`` in place of the router beside each experts module. Before the trunk is opened."""
    blocks: dict[int, Any] = {
        id(child): module for module in network.modules() for child in module.children()
    }
    for layer, module in enumerate(modules):
        block = blocks[id(module)]
        block.gate = ReplayedRouter(block.gate, routes.index[layer])


def decoded_only(trace: Trace, layers: int, vocabulary: int) -> Trace:
    """The decoded tokens of each sequence, a pass each, in the first ``layers`` layers; ids wrapped to the
    vocabulary."""
    texts = [trace.decode_tokens(sequence) for sequence in range(trace.sequences)]
    lengths = [len(text.tokens) for text in texts]
    count = sum(lengths)
    return Trace(
        experts=trace.experts,
        tokens=(np.concatenate([text.tokens for text in texts]) % vocabulary).astype(np.int32),
        routing=compact(np.concatenate([text.routing[:, :layers] for text in texts]), trace.experts),
        weights=None,
        pass_offsets=np.arange(count + 1),
        drafted=np.zeros(count, np.int32),
        accepted=np.zeros(count, np.int32),
        prefill=np.zeros(count, np.bool_),
        sequence_offsets=np.cumsum([0, *lengths]),
        categories=trace.categories,
        source=trace.source,
    )
