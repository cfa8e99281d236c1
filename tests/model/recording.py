"""A recorder that replays on the CPU what a CUDA graph would replay: operations, at the addresses they had.

Whatever Python knew while recording is baked in, results land where they did then, and what would make the host
wait for the device, or give a result whose size depends on it, fails as it does in a capture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from moespac.model.recorder import InProcess, Work

_REFUSED = {
    "item",
    "_local_scalar_dense",
    "is_nonzero",
    "nonzero",
    "_unique2",
    "bincount",
    "masked_select",
    "equal",
}


class NotCapturable(RuntimeError):
    """An operation that a CUDA graph cannot have."""


class OperationRecorder(InProcess):
    """Counts what it recorded; ``failing``: nothing can be recorded."""

    def __init__(self, failing: bool = False) -> None:
        super().__init__()
        self.failing = failing
        self.recorded = 0

    def record(self, work: Work, state: Sequence[torch.Tensor] = ()) -> Work:
        super().record(work, state)
        if self.failing:
            raise NotCapturable("operation not permitted when stream is capturing")
        before = [tensor.clone() for tensor in state]
        tape = _Tape()
        with tape:
            work()
        for tensor, kept in zip(state, before, strict=True):
            tensor.copy_(kept)
        for result in tape.results():  # a capture runs nothing: what it would have given is not there yet
            result.fill_(torch.nan if result.is_floating_point() else 1 << 6)
        self.recorded += 1
        return tape.replay


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._steps: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _REFUSED:
            raise NotCapturable(f"{name} waits for the device")
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        taken = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        fresh = [t for t in _tensors(out) if t.untyped_storage().data_ptr() not in taken]
        self._steps.append((func, args, kwargs, fresh))
        return out

    def results(self) -> list[torch.Tensor]:
        return [tensor for *_, fresh in self._steps for tensor in fresh if tensor.numel()]

    @torch.inference_mode()
    def replay(self) -> None:
        for func, args, kwargs, fresh in self._steps:
            out = func(*args, **kwargs)
            if fresh:
                again = [t for t in _tensors(out)][-len(fresh) :]
                for target, result in zip(fresh, again, strict=True):
                    target.copy_(result)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]
