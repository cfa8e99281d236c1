"""EXECUTE the experts of a layer that lie on an accelerator, straight from their records."""

from __future__ import annotations

import logging

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moespac.config import GroupedConfig
from moespac.experts.compute import ExpertMath, reason_for_torch
from moespac.experts.format import RecordLayout
from moespac.experts.grouped.check import disagreement
from moespac.experts.grouped.constants import MATRIX_TOKENS, VECTOR_TOKENS
from moespac.experts.grouped.gates import apply_gate
from moespac.experts.grouped.jobs import make_jobs
from moespac.experts.grouped.launch import Launcher, interpreted
from moespac.experts.grouped.layer_rows import LayerRows, RowBuffers
from moespac.experts.grouped.staging import Staging
from moespac.experts.kernels.gates import match_gate
from moespac.experts.kernels.library import Gate

log = logging.getLogger(__name__)


class GroupedExperts:
    """Computes experts of one model from packed or float records: two launches for all of a layer, one to join.

    Windows (up to ``window_tokens`` tokens): products, sums and decoded int8 and int4 weights in float32. What
    differs from float64 arithmetic on the decoded weights is float32's rounding. A row's output depends on its
    token and its expert alone, bit by bit: not on the call's other experts, the other tokens, or their number.
    Longer passes (prompts) take the tensor cores: products of numbers in x's type, the inner row and int4 weights
    rounded to it, float32 sums. There too a row depends on its own token and expert alone; but its last bits are
    not those that it has in a window.
    """

    def __init__(
        self,
        prototype: nn.Module,
        layout: RecordLayout,
        gate: Gate,
        device: torch.device,
        dtype: torch.dtype,
        config: GroupedConfig,
    ) -> None:
        """Raises ImportError where Triton is missing."""
        self._launcher = Launcher(layout, gate, dtype)
        self._math = ExpertMath(prototype, layout)
        self._config = config
        self._record_bytes = layout.nbytes
        hidden, width = self._launcher.hidden, self._launcher.width
        matrices = 3 if gate.has_gate else 2
        self._heavy = config.torch_multiplications / (matrices * hidden * width)  # tokens of one expert
        self._buffers = RowBuffers(device, hidden, width, config.window_tokens)
        self._jobs = Staging(device, config.job_bytes)

    @staticmethod
    def build(
        prototype: nn.Module,
        layout: RecordLayout,
        device: torch.device,
        dtype: torch.dtype,
        config: GroupedConfig | None = None,
    ) -> GroupedExperts | None:
        """Kernels for experts like ``prototype`` (transformers' module, no weights needed) in ``layout``.

        ``dtype`` is the trunk's. All variants are compiled here and tried against ``ExpertMath``. None where the
        device, family or format is not served, with the reason in the log: ``ExpertMath`` does it then.
        """
        config = config or GroupedConfig()
        reason = _unserved(prototype, layout, device)
        gate = None if reason else match_gate(prototype, apply_gate)
        if gate is None:
            reason = reason or "the kernels do not know their gate"
            log.info("experts on the accelerator run in torch: %s", reason)
            return None
        try:
            grouped = GroupedExperts(prototype, layout, gate, device, dtype, config)
            reason = disagreement(grouped, ExpertMath(prototype, layout), layout, device, dtype, config)
        except Exception as error:  # no Triton, no C compiler for its stubs, a card that it does not know ...
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = f"the kernels cannot be used here ({lines[0]})"
        if reason is not None:
            log.warning("experts on the accelerator run in torch, several times slower: %s", reason)
            return None
        return grouped

    @property
    def job_kernels(self) -> Launcher:
        """For jobs that are on the device already."""
        return self._launcher

    def run(
        self,
        x: torch.Tensor,
        top_k: int,
        arena: torch.Tensor,
        slots: NDArray[np.int64],
        rows: NDArray[np.int64],
        begins: NDArray[np.int64],
        counts: NDArray[np.int64],
        out: torch.Tensor,
    ) -> None:
        """Job j: the expert whose record is ``arena[slots[j]]``, for ``rows[begins[j]:][:counts[j]]`` of ``out``.

        As ``HostKernel.run``, but x (T, hidden) is of the trunk's type, x, arena and out lie on the device, and the
        work is queued in the current stream: nothing waits for it here.
        """
        assert x.is_contiguous() and out.is_contiguous() and out.dtype == torch.float32
        assert arena.shape[1] == self._record_bytes and arena.is_contiguous()
        assert out.shape == (x.shape[0] * top_k, self._launcher.hidden)
        most = int(counts.max(initial=0))
        if most > self._heavy:
            in_torch = counts > self._heavy
            for slot, begin, count in zip(slots[in_torch], begins[in_torch], counts[in_torch], strict=True):
                mine = torch.from_numpy(rows[begin : begin + count]).to(x.device)
                out[mine] = self._math(x[mine // top_k], arena[slot], None).float()
            slots, begins, counts = slots[~in_torch], begins[~in_torch], counts[~in_torch]
            most = int(counts.max(initial=0))
        if not most:
            return
        made = make_jobs(slots, rows, begins, counts, self._tokens_of_a_job(x.shape[0], most))
        jobs = self._send(made)
        self._launcher.run(x, top_k, arena, jobs, self._buffers.inner(x.shape[0], top_k), out)

    def layer(self, tokens: int, top_k: int) -> LayerRows:
        """Where the rows of a layer's pass go: ``device`` is the ``out`` of ``run``, ``host`` the host kernel's.

        They are the latest layer's: the next one's ``device`` rows may be the same memory, written in stream order.
        """
        return self._buffers.layer(tokens, top_k)

    def join(
        self,
        layer_rows: LayerRows,
        weights: torch.Tensor,
        like: torch.Tensor,
        host_rows: NDArray[np.int64],
        nowhere: NDArray[np.int64],
        into: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """-> as ``like`` (T, hidden): a token's rows times its ``weights`` (T, k), summed in the order of k.

        ``host_rows`` were written in ``layer_rows.host``, those in ``nowhere`` by nobody, the others in ``device``.
        Which is which changes no bit of the result. In ``into``, if that is given, contiguous and like ``like``.
        """
        brought, source = layer_rows.bring_over(host_rows, nowhere)
        fits = into is not None and into.dtype == like.dtype and into.is_contiguous()
        joined = into if into is not None and fits else torch.empty_like(like)
        self._launcher.join(layer_rows.device, weights.contiguous(), joined, brought, source)
        return joined

    def bytes_read(self, experts: int) -> int:
        """Bytes of device memory that computing so many experts once has to read."""
        return experts * self._record_bytes

    def _tokens_of_a_job(self, tokens: int, most: int) -> int:
        """``most`` tokens that one expert has."""
        if tokens > self._config.window_tokens:
            return MATRIX_TOKENS
        return next((size for size in VECTOR_TOKENS if most <= size), VECTOR_TOKENS[-1])

    def _send(self, jobs: NDArray[np.int32]) -> torch.Tensor:
        staged = self._jobs.claim(jobs.nbytes)
        staged.host[: jobs.nbytes].view(torch.int32).numpy()[:] = jobs.reshape(-1)
        return staged.send(jobs.nbytes).view(torch.int32).view(jobs.shape)


def _unserved(prototype: nn.Module, layout: RecordLayout, device: torch.device) -> str | None:
    """Why the kernels cannot run these experts, or None."""
    if device.type != "cuda" and not interpreted():
        return "it is simulated in this process"
    return reason_for_torch(prototype, layout)
