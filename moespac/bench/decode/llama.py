"""llama.cpp as a contender, through the low-level interface of llama-cpp-python.

The high-level one copies logits and samples in Python; here a token costs little more than ``llama_decode`` itself.
Drafts follow llama.cpp's own speculative decoding (most tokens, least probability) and llama-cpp-python's prompt
lookup, each with its defaults; a draft is verified in one batch, and rejected tokens leave the cache.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from moespac.bench.decode.contenders import Contender
from moespac.bench.decode.task import Decoded, Decoder, Task
from moespac.bench.decode.usage import read_from_disk
from moespac.errors import ModelError

Propose = Callable[[list[int], int], list[int]]  # of all tokens so far and the most that are of use, a draft


class LlamaContext:
    """One model and its cache of one sequence."""

    def __init__(self, file: str, context: int, threads: int, in_memory: bool, gpu_layers: int = 0) -> None:
        """``in_memory``: read the file, in the layout that llama.cpp computes fastest; else map it. ``gpu_layers``:
        so many of the last layers are on the GPU."""
        llama_cpp.llama_backend_init()
        wishes = llama_cpp.llama_model_default_params()
        wishes.n_gpu_layers = gpu_layers
        wishes.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE if in_memory else llama_cpp.LLAMA_LOAD_MODE_MMAP
        wishes.use_extra_bufts = in_memory  # a copy in another layout is not the mapped file
        self._model = llama_cpp.llama_model_load_from_file(file.encode(), wishes)
        if not self._model:
            raise ModelError(f"{file}: llama.cpp cannot load it")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = context
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise ModelError(f"{file}: llama.cpp cannot make a context of {context} tokens")
        self._batch = llama_cpp.llama_batch_init(context, 0, 1)
        self.cached: list[int] = []

    def forward(self, tokens: Sequence[int], outputs: int) -> NDArray[np.float32]:
        """Run ``tokens`` behind what is cached; logits (outputs, vocabulary) of the last ones."""
        batch, first = self._batch, len(tokens) - outputs
        batch.n_tokens = len(tokens)
        for at, token in enumerate(tokens):
            batch.token[at], batch.pos[at] = token, len(self.cached) + at
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
            batch.logits[at] = at >= first
        code = llama_cpp.llama_decode(self._context, batch)
        if code:
            raise ModelError(f"llama_decode failed with code {code}")
        self.cached.extend(tokens)
        return np.stack([self._logits(at) for at in range(first, len(tokens))])

    def keep(self, tokens: int) -> None:
        """Forget all cached tokens but the first so many."""
        if tokens < len(self.cached):
            memory = llama_cpp.llama_get_memory(self._context)
            if not llama_cpp.llama_memory_seq_rm(memory, 0, tokens, -1):
                raise ModelError("llama.cpp cannot take tokens out of this model's cache")
            del self.cached[tokens:]

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def _logits(self, at: int) -> NDArray[np.float32]:
        row = llama_cpp.llama_get_logits_ith(self._context, at)
        return np.ctypeslib.as_array(
            ctypes.cast(row, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,)
        ).copy()


class LlamaDecoder(Decoder):
    """Greedy decoding, with or without drafts."""

    def __init__(self, contender: Contender, task: Task) -> None:
        longest = max(len(prompt) for prompt in [*task.prompts, task.warmup])
        context = longest + max(task.tokens, task.config.warmup_tokens) + 1 + task.config.llama_draft_most
        in_memory = contender.system == "llama.cpp-ram"
        self._target = LlamaContext(task.gguf, context, task.threads, in_memory)
        self._draft_model: LlamaContext | None = None
        self._propose: Propose = lambda tokens, most: []
        if contender.draft == "draft":
            self._draft_model = LlamaContext(task.draft_gguf, context, task.threads, in_memory=True)
            self._propose = ModelDraft(
                self._draft_model, task.config.llama_draft_most, task.config.llama_draft_probability
            )
        elif contender.draft == "lookup":
            self._propose = lookup_draft(task.config.lookup_ngram, task.config.lookup_tokens)

    def decode(self, prompt: Sequence[int], tokens: int, deadline: float) -> Decoded:
        target, sequence = self._target, list(prompt)
        start = time.perf_counter()
        target.keep(0)
        sequence.append(int(target.forward(sequence, 1).argmax()))
        first, read = time.perf_counter(), read_from_disk()
        passes = drafted = accepted = 0
        end = len(prompt) + 1 + tokens
        while len(sequence) < end and (passes < 2 or time.perf_counter() < deadline):
            draft = self._propose(sequence, end - len(sequence) - 1)
            best = target.forward([sequence[-1], *draft], len(draft) + 1).argmax(axis=1).tolist()
            agreed = agreement(draft, best)
            target.keep(len(sequence) + agreed)
            sequence.extend(best[: agreed + 1])
            passes, drafted, accepted = passes + 1, drafted + len(draft), accepted + agreed
        return Decoded(
            token_ids=sequence[len(prompt) :],
            first_seconds=first - start,
            seconds=time.perf_counter() - first,
            read_bytes=read_from_disk() - read,
            passes=passes,
            drafted=drafted,
            accepted=accepted,
        )

    def close(self) -> None:
        if self._draft_model is not None:
            self._draft_model.close()
        self._target.close()


class ModelDraft:
    """Drafts of a draft model, ended where it is not sure."""

    def __init__(self, model: LlamaContext, most: int, least_probability: float) -> None:
        self._model = model
        self._most = most
        self._least = least_probability

    def __call__(self, tokens: list[int], most: int) -> list[int]:
        model, draft = self._model, []
        model.keep(min(agreement(tokens, model.cached), len(tokens) - 1))
        new = tokens[len(model.cached) :]
        for _ in range(min(self._most, most)):
            logits = model.forward(new, 1)[0]
            token = int(logits.argmax())
            if 1 / np.exp(logits - logits[token]).sum() < self._least:
                break
            draft.append(token)
            new = [token]
        return draft


def lookup_draft(ngram: int, tokens: int) -> Propose:
    """llama-cpp-python's own prompt lookup."""
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    look_up = LlamaPromptLookupDecoding(ngram, tokens)

    def propose(sequence: list[int], most: int) -> list[int]:
        return look_up(np.array(sequence, np.intc))[:most].tolist()

    return propose


def agreement(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return at
    return min(len(one), len(other))
