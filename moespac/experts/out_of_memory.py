"""Whether an error says that the device's memory is used up."""

from __future__ import annotations

import torch

# Libraries under torch allocate for themselves, and their errors are plain RuntimeErrors.
_SIGNS = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory", "CUDA driver error: out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
