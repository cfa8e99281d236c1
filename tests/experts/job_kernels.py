"""Jobs computed in torch, one after the other: slow, and like the kernels never asking what a tensor says."""

from __future__ import annotations

import torch
from torch import nn

from moespac.experts.compute import ExpertMath
from moespac.experts.format import RecordLayout


class TorchJobKernels:
    def __init__(self, prototype: nn.Module, layout: RecordLayout) -> None:
        self._math = ExpertMath(prototype, layout)
        self.hidden, self.width = next(t.shape for t in layout.tensors if t.name == "down_proj")

    def run(
        self,
        x: torch.Tensor,
        top_k: int,
        arena: torch.Tensor,
        jobs: torch.Tensor,
        inner: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        inner.fill_(torch.nan)
        padded = torch.cat([out.fill_(torch.nan), out.new_empty(1, self.hidden)])  # a last row for nobody
        for job in jobs.long():
            record = arena.index_select(0, job[:1])[0]
            rows = torch.where(job[1:] < 0, out.shape[0], job[1:])
            tokens = (job[1:].clamp(min=0)) // top_k
            padded.index_copy_(0, rows, self._math(x.index_select(0, tokens), record, None).float())
        out.copy_(padded[:-1])

    def join(self, device_rows: torch.Tensor, weights: torch.Tensor, joined: torch.Tensor) -> None:
        rows = device_rows.view(*weights.shape, self.hidden)
        joined.copy_((rows * weights.unsqueeze(-1)).sum(dim=1))
