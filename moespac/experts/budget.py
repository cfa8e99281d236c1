"""From what a user says ("25%", "2GiB") to how many experts a tier holds."""

from __future__ import annotations

import math
import re

import torch

from moespac import host_memory
from moespac.errors import ConfigError
from moespac.types import ModelShape

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(%|[a-zA-Z]*)\s*")


def slots_for(budget: str, shape: ModelShape, available_bytes: int, flag: str) -> int:
    """How many records ``budget`` holds, at most all of them.

    ``budget`` is bytes with an optional unit, a percentage of all experts, or "auto": what fits in
    ``available_bytes``. Raises ConfigError, naming ``flag``, for what cannot be read or holds no expert.
    """
    if budget == "auto":
        slots = available_bytes // shape.record_bytes
    else:
        match = _QUANTITY.fullmatch(budget)
        unit = match.group(2).lower() if match else None
        if match is None or (unit != "%" and unit not in _UNITS):
            raise ConfigError(
                f'{flag} {budget}: not an amount of memory; write "25%", "2GiB", "500MB" or "auto"'
            )
        amount = float(match.group(1))
        if unit == "%":
            slots = math.floor(shape.total * amount / 100 + 1e-9)
        else:
            slots = int(amount * _UNITS[unit]) // shape.record_bytes
    if slots < 1:
        least = math.ceil(shape.record_bytes / 2**10)
        percent = math.ceil(1e4 / shape.total) / 100
        raise ConfigError(
            f"{flag} {budget}: holds no expert; the least is one expert, {least}KiB or {percent}% of all experts"
        )
    return min(slots, shape.total)


def is_none(budget: str) -> bool:
    """Whether ``budget`` asks for no tier at all."""
    match = _QUANTITY.fullmatch(budget)
    return budget == "none" or (match is not None and float(match.group(1)) == 0)


def available_host_bytes(share: float) -> int:
    return int(host_memory.free_bytes() * share)


def available_device_bytes(device: torch.device, share: float) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * share)
