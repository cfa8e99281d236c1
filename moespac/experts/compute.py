"""EXECUTE one expert's feed-forward network, on whatever device its record lies."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moespac.experts.format import RecordLayout


def reason_for_torch(prototype: nn.Module, layout: RecordLayout) -> str | None:
    """Why nothing but ``ExpertMath`` can run experts like ``prototype`` in ``layout``, or None."""
    if getattr(prototype, "has_post_expert_norm", False):
        return "they normalise their outputs"
    if any(tensor.transposed for tensor in layout.tensors):
        return "the checkpoint stores them transposed; `moespac pack` does not"
    return None


class ExpertMath:
    """What all experts of a model do, for any family of transformers' experts interface.

    ``prototype`` is transformers' own experts module without weights; its flags and its gate (SwiGLU, the
    clamped gate of gpt_oss, a plain activation ...) are used as they are, so the mathematics is the family's.
    """

    def __init__(self, prototype: nn.Module, layout: RecordLayout) -> None:
        self._prototype: Any = prototype
        self._layout = layout
        self._up_name = "gate_up_proj" if prototype.has_gate else "up_proj"

    def __call__(self, x: torch.Tensor, record: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
        """x (M, hidden), record (record_bytes,) uint8 on x's device -> (M, hidden), before routing weights."""
        weights = self._layout.weights(record, x.dtype)
        up = F.linear(x, weights[self._up_name], weights.get(f"{self._up_name}_bias"))  # (M, 2I) or (M, I)
        inner = self._prototype._apply_gate(up) if self._prototype.has_gate else self._prototype.act_fn(up)
        out = F.linear(inner, weights["down_proj"], weights.get("down_proj_bias"))  # (M, hidden)
        return out if norm is None else norm(out)
