"""An accelerator for a device: the card's own, or the CPU's stand-in."""

from __future__ import annotations

import logging

import torch

from moespac.config import EngineConfig
from moespac.errors import ConfigError
from moespac.experts.accelerator import Accelerator
from moespac.experts.cuda import CudaAccelerator, TorchDriver
from moespac.experts.cuda.arena import open_arena
from moespac.experts.cuda.page_lock import CudaRegistrar, PageLock
from moespac.experts.in_process import InProcessAccelerator
from moespac.experts.workers import Bell
from moespac.timeline import Tape

log = logging.getLogger(__name__)


def open_accelerator(
    device: torch.device,
    slots: int,
    host: torch.Tensor,
    config: EngineConfig,
    bell: Bell,
    tape: Tape,
) -> Accelerator:
    """With ``slots`` for records like those of ``host``, the host tier's arena (slots, record_bytes).

    Raises ConfigError when the device, which has room for them by its own account, refuses all the same.
    """
    record_bytes, asynchronous = host.shape[1], config.memory.asynchronous
    if device.type != "cuda":
        return InProcessAccelerator(slots, record_bytes, bell, asynchronous, tape)
    try:
        arena = open_arena(slots, record_bytes, device, config.device)
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"--accelerator-memory {config.memory.accelerator_memory}: the device refused "
            f"{slots * record_bytes / 1e9:.2f} GB in one piece; close other programs that use it, or give less"
        ) from None
    lock = PageLock(host, CudaRegistrar())
    lock.report()
    driver = TorchDriver(device)
    return CudaAccelerator(driver, arena, lock, bell, asynchronous, config.device.copies_ahead, tape)
