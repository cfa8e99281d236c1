"""A routing trace in memory: flat arrays over all tokens, cut into passes, cut into sequences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moespac.types import Ids, ModelShape, Observation, Window

MOST_EXPERTS = 2**16 - 1  # in a layer: the highest uint16 stands for "not routed"


class DecodedTokens(NamedTuple):
    """The tokens of a sequence that were decoded and kept, in order."""

    tokens: Ids  # (n,)
    routing: NDArray[np.int64]  # (n, layers, k); -1: not routed


@dataclass(frozen=True, eq=False)
class Trace:
    """Everything the passes of some sequences showed. N window tokens in P passes of S sequences."""

    experts: int  # in each layer
    tokens: NDArray[np.int32]  # (N,) token ids
    routing: NDArray[np.unsignedinteger]  # (N, layers, k) expert; the type's highest number: not routed
    weights: NDArray[np.float16] | None  # (N, layers, k) the router's; None where they were not recorded
    pass_offsets: Ids  # (P + 1,) where the tokens of each pass begin
    drafted: NDArray[np.int32]  # (P,) tokens at the end of the pass that were drafts ...
    accepted: NDArray[np.int32]  # (P,) ... and how many of these were accepted
    prefill: NDArray[np.bool_]  # (P,) whether the pass ran (a part of) the prompt
    sequence_offsets: Ids  # (S + 1,) where the passes of each sequence begin
    categories: tuple[str, ...]  # (S,) what kind of text each sequence is; "": unknown
    source: str  # where the routing comes from

    @property
    def shape(self) -> ModelShape:
        """The model's. How large its experts are a trace does not know: 1 byte stands for it."""
        return ModelShape(self.routing.shape[1], self.experts, self.routing.shape[2], record_bytes=1)

    @property
    def sequences(self) -> int:
        return len(self.categories)

    @property
    def speculative(self) -> bool:
        """Whether drafts and their acceptance are real; if not, whoever replays the trace has to assume them."""
        return bool(self.drafted.any())

    def passes(self, sequence: int) -> Iterator[Observation]:
        """Each pass of ``sequence``, as the policy was shown it."""
        for index in range(*self.sequence_offsets[sequence : sequence + 2].tolist()):
            part = slice(*self.pass_offsets[index : index + 2].tolist())
            window = Window(
                self.tokens[part].astype(np.int64), int(self.drafted[index]), bool(self.prefill[index])
            )
            weights = None if self.weights is None else by_layer(self.weights[part]).astype(np.float32)
            yield Observation(window, by_layer(self._experts(part)), int(self.accepted[index]), weights)

    def decode_tokens(self, sequence: int) -> DecodedTokens:
        """The sequence token by token, however it was drafted: no prompt, no rejected drafts."""
        first_pass, end_pass = self.sequence_offsets[sequence : sequence + 2]
        part = slice(self.pass_offsets[first_pass], self.pass_offsets[end_pass])
        kept = self._decoded[part]
        return DecodedTokens(self.tokens[part][kept].astype(np.int64), self._experts(part)[kept])

    def _experts(self, part: slice) -> NDArray[np.int64]:
        """(n, layers, k) int64, -1 where a layer did not route the token."""
        routing = self.routing[part]
        return np.where(routing == not_routed(routing.dtype), -1, routing.astype(np.int64))

    @cached_property
    def _decoded(self) -> NDArray[np.bool_]:
        """(N,) whether each token was decoded and kept."""
        sizes = np.diff(self.pass_offsets)
        kept = np.where(self.prefill, 0, sizes - self.drafted + self.accepted)
        position = np.arange(len(self.tokens)) - np.repeat(self.pass_offsets[:-1], sizes)
        return position < np.repeat(kept, sizes)


def by_layer(values: NDArray) -> NDArray:
    """(T, layers, k), as stored, <-> (layers, T, k), as the policy sees it."""
    return values.swapaxes(0, 1)


def compact(routing: NDArray[np.integer], experts: int) -> NDArray[np.unsignedinteger]:
    """``routing``, -1 where not routed, in the narrowest type that the format knows."""
    dtype = np.dtype(np.uint8 if experts <= np.iinfo(np.uint8).max else np.uint16)
    return np.where(routing < 0, not_routed(dtype), routing).astype(dtype)


def not_routed(dtype: np.dtype) -> int:
    """The number that stands for "no expert"."""
    return int(np.iinfo(dtype).max)


def check(trace: Trace) -> None:
    """Raises ValueError, with the reason, for arrays that do not make a trace."""
    passes, tokens = len(trace.drafted), len(trace.tokens)
    _check_arrays(trace, passes, tokens)
    _check_offsets("pass_offsets", trace.pass_offsets, tokens)
    _check_offsets("sequence_offsets", trace.sequence_offsets, passes)
    sizes = np.diff(trace.pass_offsets)
    if (sizes == 0).any():
        raise ValueError("a pass has no tokens")
    if (trace.accepted < 0).any() or (trace.accepted > trace.drafted).any() or (trace.drafted >= sizes).any():
        raise ValueError("a pass does not hold 0 <= accepted <= drafted < tokens")
    if trace.drafted[trace.prefill].any():
        raise ValueError("a prefill has drafts")
    routed = trace.routing != not_routed(trace.routing.dtype)
    if (trace.routing[routed] >= trace.experts).any():
        raise ValueError(f"it routes to experts beyond its {trace.experts}")
    if trace.weights is not None and not np.isfinite(trace.weights).all():
        raise ValueError("weights are not finite")


def _check_arrays(trace: Trace, passes: int, tokens: int) -> None:
    if not 1 <= trace.experts <= MOST_EXPERTS:
        raise ValueError(f"it has {trace.experts} experts a layer, not 1 to {MOST_EXPERTS}")
    narrowest = compact(np.empty(0, np.int64), trace.experts).dtype
    _check_array("routing", trace.routing, narrowest, (tokens, *trace.routing.shape[1:3]))
    if (
        trace.routing.ndim != 3
        or not 1 <= trace.routing.shape[2] <= trace.experts
        or not trace.routing.shape[1]
    ):
        raise ValueError(f"routing has shape {trace.routing.shape}, not (tokens, layers, k)")
    if trace.weights is not None:
        _check_array("weights", trace.weights, np.float16, trace.routing.shape)
    _check_array("tokens", trace.tokens, np.int32, (tokens,))
    _check_array("pass_offsets", trace.pass_offsets, np.int64, (passes + 1,))
    _check_array("drafted", trace.drafted, np.int32, (passes,))
    _check_array("accepted", trace.accepted, np.int32, (passes,))
    _check_array("prefill", trace.prefill, np.bool_, (passes,))
    _check_array("sequence_offsets", trace.sequence_offsets, np.int64, (len(trace.categories) + 1,))


def _check_array(name: str, array: NDArray, dtype: type | np.dtype, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape:
        found, wanted = f"{array.dtype} {array.shape}", f"{np.dtype(dtype)} {shape}"
        raise ValueError(f"{name} is {found}, not {wanted}")


def _check_offsets(name: str, offsets: Ids, end: int) -> None:
    if offsets[0] != 0 or offsets[-1] != end or (np.diff(offsets) < 0).any():
        raise ValueError(f"{name} do not rise from 0 to {end}")
