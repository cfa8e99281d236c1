"""The engine. ``step`` is the product: draft, verify, accept, observe, plan."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Generator, Iterator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moespac.config import EngineConfig, SamplingConfig
from moespac.engine.room import Room
from moespac.engine.sequence import Sequence
from moespac.engine.summary import Meter, Summary, versions
from moespac.engine.text import TextStream
from moespac.errors import ConfigError
from moespac.experts.runtime import ExpertRuntime
from moespac.model.trunk import Trunk
from moespac.policy.windows import WindowCosts
from moespac.speculate.drafters import Draft, Drafter
from moespac.speculate.governor import FixedWindow, Governor
from moespac.speculate.logprobs import TokenLogprob, token_logprobs
from moespac.speculate.sampling import probabilities
from moespac.speculate.verify import Verdict, verify_greedy, verify_sampled
from moespac.timeline import Record
from moespac.types import ModelShape, Window

log = logging.getLogger(__name__)


class Engine:
    """A MoE model whose experts live in tiers. Not thread-safe: one request at a time.

    ``model`` is the transformers model itself, and its stock ``generate`` works over the same experts; ``trunk``
    is its forward pass as the engine runs it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trunk: Trunk,
        tokenizer: PreTrainedTokenizerBase | None,
        runtime: ExpertRuntime,
        drafter: Drafter,
        config: EngineConfig,
        profile_file: Path | None = None,
    ) -> None:
        """``profile_file``: where ``close`` keeps what the policy has learned about the model's routing."""
        self.model = model
        self.trunk = trunk
        self.tokenizer = tokenizer
        self.runtime = runtime
        self.drafter = drafter
        self.config = config
        self._profile_file = profile_file
        self._room = Room(runtime, config.device.shrink_share)
        self._governor: Governor | FixedWindow
        if config.window == "auto":
            governing = config.governor
            self._governor = Governor(governing)
            runtime.windows = WindowCosts(
                runtime.store.shape, runtime.policy.costs, governing.most + 1, governing.mean_passes
            )
        else:
            self._governor = FixedWindow(config.window)
        self._latest: weakref.ref[Sequence] | None = None  # whose turn it was last
        self._said = False  # that this model cannot be speculated on: once is enough

    @property
    def shape(self) -> ModelShape:
        return self.runtime.store.shape

    # ---- one step ------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self, sequence: Sequence) -> StepResult:
        """Run one pass of the target over the last token and a draft; returns the tokens it yields."""
        for part in sequence.leading_windows(self.config.prefill_chunk):
            self._forward(sequence, part)
            sequence.rewind(part, accepted=0)
            self.runtime.end_pass(accepted=0)
        self._take_turn(sequence)
        k = self._choose(sequence)
        start = self.runtime.clock.now()
        draft = self._draft(sequence, k)
        drafted = self.runtime.clock.now()
        window = sequence.window(draft.tokens)
        if draft.tokens or self.runtime.policy.counts_on_draft:
            self.runtime.plan(window)  # the drafted tokens are a sensor: they say which experts come
        logits = self._forward(sequence, window)
        with self.runtime.clock.measure("verify"):
            verdict = _verify(sequence, draft, logits)
        verified = self.runtime.clock.now()
        sequence.rewind(window, verdict.accepted)
        self.runtime.end_pass(verdict.accepted)
        if not window.prefill:
            spent = drafted - start, verified - drafted
            self._governor.observe(window.drafted, verdict.accepted, *spent, self.runtime.look_back())
        tokens = sequence.accept(verdict.tokens)
        if sequence.finish_reason is None:
            self.runtime.plan(sequence.window([]))  # transfers hide behind the next draft
        return StepResult(tokens, window.drafted, verdict.accepted, _logprobs(sequence, tokens, logits))

    def _take_turn(self, sequence: Sequence) -> None:
        """What was seen of another text says nothing about this one's next tokens."""
        if (self._latest is None or self._latest() is not sequence) and self.runtime.windows is not None:
            self.runtime.windows.reset()
        self._latest = weakref.ref(sequence)  # its cache is free as soon as its caller lets it go

    def _choose(self, sequence: Sequence) -> int:
        """K. A drafter that has not drafted for a while looks back first: what it takes is not of this draft."""
        if not sequence.prefilled or sequence.room <= 0:
            return 0
        k = min(self._governor.choose(), sequence.room)
        if self._governor.looks_back(k, sequence.undrafted):
            unseen = sequence.unseen(self.config.governor.look_back_tokens)
            with self.runtime.clock.measure("draft"):
                seen = self._room.make(lambda: sequence.drafter.look_back(sequence.tokens, unseen))
            self._governor.saw_drafts(seen)
            sequence.undrafted = 0
        sequence.undrafted = 0 if k else sequence.undrafted + 1
        return k

    def _draft(self, sequence: Sequence, k: int) -> Draft:
        if not k:
            return Draft()
        with self.runtime.clock.measure("draft"):
            return self._room.make(lambda: sequence.drafter.propose(sequence.tokens, k))

    def _forward(self, sequence: Sequence, window: Window) -> torch.Tensor:
        """One pass over ``window``; logits (drafted + 1, vocabulary) of its last positions, where the trunk is."""
        return self._room.make(lambda: self._pass(sequence, window))

    def _pass(self, sequence: Sequence, window: Window) -> torch.Tensor:
        if sequence.lost:
            self._cache_again(sequence)
        sequence.lost = not sequence.cache.survives  # until the pass is through
        logits = self._run(sequence, window)
        sequence.lost = False
        return logits

    def _cache_again(self, sequence: Sequence) -> None:
        """A pass failed and left the cache half grown: make it anew from the tokens it had."""
        sequence.cache = self.trunk.new_cache()
        for part in sequence.cached_windows(self.config.prefill_chunk):
            self._run(sequence, part)
            sequence.cache.rewind(0)
        if sequence.prefilled:
            sequence.cache.allow_rewind()

    def _run(self, sequence: Sequence, window: Window) -> torch.Tensor:
        self.runtime.begin_pass(window)
        with self.runtime.clock.measure("trunk"):
            return self.trunk(torch.from_numpy(window.tokens), sequence.cache, keep=window.drafted + 1)

    # ---- a request -----------------------------------------------------------------------------------

    def stream(
        self,
        prompt: str | Tokens[int],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        stop: Tokens[str] = (),
        top_logprobs: int | None = None,
    ) -> Stream:
        """Generate from a text or token ids; iterate over the pieces of text, then read ``.result``.

        top_logprobs: have ``Stream.advance`` give log-probabilities, with so many alternatives to each token.

        Raises ConfigError for an empty prompt, one that fills the context, or settings out of range.
        """
        sampling = SamplingConfig(temperature, top_k, top_p, min_p, seed)
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens {max_new_tokens}: must be at least 1")
        if stop and self.tokenizer is None:
            raise ConfigError("stop strings need a tokenizer, and this model has none; leave them out")
        tokens = self._tokens(prompt)
        sequence = Sequence(
            self._room.make(self.trunk.new_cache), tokens, max_new_tokens, self.context, self._eos(), sampling
        )
        sequence.drafter = self.drafter
        sequence.top_logprobs = top_logprobs
        return Stream(self, sequence, tuple(stop))

    def generate(self, prompt: str | Tokens[int], **settings: Any) -> Generation:
        """``stream`` to the end; takes the same arguments."""
        stream = self.stream(prompt, **settings)
        for _ in stream:
            pass
        return stream.result

    def chat_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        """The token ids of a conversation, in the model's chat template where it has one."""
        if self.tokenizer is None:
            raise ConfigError("chat needs a tokenizer, and this model has none; use generate with token ids")
        tokenizer: Any = self.tokenizer
        if tokenizer.chat_template is None:
            text = (
                "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant:"
            )
            return tokenizer.encode(text)
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return encoded["input_ids"]

    def record_timeline(self, record: Record | None) -> None:
        """From now on tell ``record`` who does what when, from whichever thread did it; None: nobody.

        Times are those of ``time.perf_counter``. ``moespac.timeline.Timeline`` keeps what it is told.
        """
        self.runtime.clock.tape.record = record

    def close(self) -> None:
        """Keep the learned profile, stop all threads, free the tiers. Safe to call twice."""
        if self._profile_file is not None:
            self.runtime.policy.save_profile(self._profile_file)
            self._profile_file = None
        self.drafter.close()
        self.runtime.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30

    def _say_if_it_cannot_speculate(self, sequence: Sequence) -> None:
        if (
            self.config.window
            and self.drafter.name != "none"
            and not sequence.cache.rewinds
            and not self._said
        ):
            log.warning(
                "%s keeps a recurrent state that rejected tokens cannot be taken out of: decoding without drafts",
                self.model.config.model_type,
            )
            self._said = True

    def _tokens(self, prompt: str | Tokens[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ConfigError("this model has no tokenizer; give the prompt as token ids")
            prompt = self.tokenizer.encode(prompt)
        tokens = [int(token) for token in prompt]
        vocabulary = self.model.config.get_text_config().vocab_size
        if not tokens:
            raise ConfigError("the prompt is empty; give at least one token")
        if min(tokens) < 0 or max(tokens) >= vocabulary:
            raise ConfigError(
                f"the prompt has token ids outside 0..{vocabulary - 1}; use the model's own tokenizer"
            )
        if len(tokens) >= self.context:
            raise ConfigError(
                f"the prompt has {len(tokens)} tokens and the context {self.context}; shorten it"
            )
        return tokens

    def _eos(self) -> frozenset[int]:
        eos = self.model.generation_config.eos_token_id
        return frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)


def _verify(sequence: Sequence, draft: Draft, logits: torch.Tensor) -> Verdict:
    if sequence.sampling.greedy:
        verdict = verify_greedy(draft.tokens, logits)  # of a device only a few token ids come over
        sequence.chances += [1.0] * len(verdict.tokens)
        return verdict
    target = probabilities(logits.cpu(), sequence.sampling)
    verdict = verify_sampled(draft.tokens, draft.probs, target, sequence.generator)
    sequence.chances += target[range(len(verdict.tokens)), verdict.tokens].tolist()
    return verdict


def _logprobs(sequence: Sequence, tokens: list[int], logits: torch.Tensor) -> list[TokenLogprob] | None:
    wanted = sequence.top_logprobs
    return None if wanted is None else token_logprobs(tokens, logits.cpu(), wanted)


@dataclass(frozen=True)
class StepResult:
    tokens: list[int]  # accepted drafts and the target's own token, cut at the end of text or the limit
    drafted: int
    accepted: int
    logprobs: list[TokenLogprob] | None = None  # of each token, where the sequence wants them


@dataclass(frozen=True)
class Piece:
    """What one step of a stream brought."""

    text: str  # whole characters; "" while a character or a stop string may still be completed
    tokens: list[int]  # up to the one that completed a stop string
    logprobs: list[TokenLogprob] | None
    drafted: int
    accepted: int


@dataclass(frozen=True)
class Generation:
    """A finished request."""

    text: str
    token_ids: list[int]  # new tokens
    finish_reason: str  # "stop", "length" or "context"
    summary: Summary


class Stream:
    """Pieces of text as they are generated; ``result`` is there once the iteration is over.

    Several streams may take turns step by step, through ``advance``, if each has a drafter of its own.
    """

    def __init__(self, engine: Engine, sequence: Sequence, stop: tuple[str, ...]) -> None:
        self._engine = engine
        self._sequence = sequence
        decoder: Any = engine.tokenizer or _Silent()
        self._text = TextStream(decoder, stop)
        self._pieces: list[str] = []
        self._meter: Meter | None = None
        self._result: Generation | None = None
        self._iterator = self._run()

    def __iter__(self) -> Iterator[str]:
        return self._iterator

    def __next__(self) -> str:
        return next(self._iterator)

    @property
    def done(self) -> bool:
        return self.finish_reason is not None

    @property
    def finish_reason(self) -> str | None:
        """Why it ended, ``Generation.finish_reason``; None while it goes on."""
        return self._sequence.finish_reason

    @property
    def drafter(self) -> Drafter:
        """The engine's; may be set before the first step. A drafter follows one sequence at a time."""
        return self._sequence.drafter

    @drafter.setter
    def drafter(self, drafter: Drafter) -> None:
        assert self._meter is None, "the drafter has begun"
        self._sequence.drafter = drafter

    @property
    def result(self) -> Generation:
        assert self._result is not None, "iterate to the end, or close, first"
        return self._result

    def advance(self) -> Piece:
        """One step of the engine; call it until ``done``, then ``close``."""
        engine, sequence = self._engine, self._sequence
        if self._meter is None:
            self._meter = Meter(engine.runtime)
            sequence.drafter.begin(sequence.sampling, sequence.generator)
            engine._governor.begin()
        prefill, before = not sequence.prefilled, self._text.kept
        step = engine.step(sequence)
        if prefill:
            self._meter.prefilled(len(step.tokens))
            engine._say_if_it_cannot_speculate(sequence)
        else:
            self._meter.passed(step.drafted, step.accepted)
        text = self._text.push(step.tokens)
        kept = self._text.kept - before
        if self._text.stopped:
            sequence.finish_reason = "stop"
            del sequence.tokens[sequence.prompt_tokens + self._text.kept :]
        elif self.done:
            text += self._text.flush()
        self._pieces.append(text)
        logprobs = None if step.logprobs is None else step.logprobs[:kept]
        return Piece(text, step.tokens[:kept], logprobs, step.drafted, step.accepted)

    def close(self) -> None:
        """End the request, early or not; ``result`` then holds what there is. Safe to call twice."""
        self._iterator.close()
        self._end()

    def _run(self) -> Generator[str, None, None]:
        try:
            while not self.done:
                if piece := self.advance().text:
                    yield piece
        finally:
            self._end()

    def _end(self) -> None:
        if self._result is None:
            self._engine.runtime.abandon_pass()
            self._result = self._finish(self._meter or Meter(self._engine.runtime))

    def _finish(self, meter: Meter) -> Generation:
        engine, sequence = self._engine, self._sequence
        text, tokens = "".join(self._pieces), sequence.new_tokens
        reason = sequence.finish_reason or "interrupted"
        summary = Summary(
            text=text,
            token_ids=tokens,
            finish_reason=reason,
            prompt_tokens=sequence.prompt_tokens,
            policy=engine.runtime.policy.name,
            drafter=sequence.drafter.name,
            window=engine.config.window if sequence.cache.rewinds else 0,
            exactness=exactness(engine, sequence.sampling),
            versions=versions(),
            **meter.figures(len(tokens)),
        )
        return Generation(text, tokens, reason, summary)


class _Silent:
    """Stands in for the tokenizer of a model that has none: tokens come, text does not."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return ""


def exactness(engine: Engine, sampling: SamplingConfig) -> str:
    """What the output of this run promises, in words."""
    error = engine.runtime.store.error
    dtype = str(engine.model.dtype).removeprefix("torch.")
    if error > 0:
        return f"exact for the packed experts, which differ from the original by {error:.1%} (see `moespac eval`)"
    if not sampling.greedy:
        return f"sampling follows the model's own distribution (in {dtype})"
    if engine.model.dtype == torch.float32:
        return "greedy tokens equal the model's own (float32)"
    return f"greedy in {dtype}: routing and weights unchanged, but near-ties may fall otherwise than token by token"
