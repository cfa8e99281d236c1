"""From what a user says ("25%", "2GiB") to how many experts a tier holds."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from moespac import host_memory
from moespac.config import DeviceConfig
from moespac.errors import ConfigError
from moespac.model.kv_size import KVCache
from moespac.types import ModelShape

log = logging.getLogger(__name__)

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


def parse_bytes(amount: str, flag: str, write: str = '"20GiB" or "500MB"') -> int:
    """Bytes of a number with an optional unit. Raises ConfigError: what ``flag`` is, what to ``write`` instead."""
    match = _QUANTITY.fullmatch(amount)
    unit = match.group(2).lower() if match else None
    if match is None or unit not in _UNITS or math.isinf(float(match.group(1)) * _UNITS[unit]):
        raise ConfigError(f"{flag} {amount}: not an amount of memory; write {write}")
    return int(float(match.group(1)) * _UNITS[unit])


def slots_for(budget: str, shape: ModelShape, available_bytes: int, flag: str) -> int:
    """How many records ``budget`` holds, at most all of them.

    ``budget`` is bytes with an optional unit, a percentage of all experts, or "auto": what fits in
    ``available_bytes``. Raises ConfigError, naming ``flag``, for what cannot be read or holds no expert.
    """
    if budget == "auto":
        slots = available_bytes // shape.record_bytes
    elif (match := _QUANTITY.fullmatch(budget)) and match.group(2) == "%":
        slots = math.floor(shape.total * min(float(match.group(1)), 100) / 100 + 1e-9)
    else:
        slots = parse_bytes(budget, flag, '"25%", "2GiB", "500MB" or "auto"') // shape.record_bytes
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


@dataclass(frozen=True)
class DeviceNeeds:
    """Bytes of a device's memory that must stay free of experts; trunk and drafter are there already."""

    kv_cache: int  # target's and drafter's, for the context asked for, while they grow
    graphs: int
    reserve: int

    @staticmethod
    def beside(caches: Iterable[KVCache], config: DeviceConfig) -> DeviceNeeds:
        """Of models with these KV caches, for a text of ordinary length."""
        grown = sum(cache.nbytes(config.context) * config.kv_growth for cache in caches)
        return DeviceNeeds(int(grown), config.graph_pool, config.reserve)

    @property
    def total(self) -> int:
        return self.kv_cache + self.graphs + self.reserve

    def room(self, free_bytes: int) -> int:
        """What experts may take of memory that is free beside trunk and drafter."""
        return max(free_bytes - self.total, 0)

    def __str__(self) -> str:
        kv_cache, graphs, reserve = map(_gb, (self.kv_cache, self.graphs, self.reserve))
        return f"{kv_cache} for KV caches, {graphs} for CUDA graphs and {reserve} in reserve"


def device_slots(budget: str, shape: ModelShape, free_bytes: int, needs: DeviceNeeds) -> int:
    """How many records a device holds beside everything else. ``free_bytes``: with trunk and drafter there.

    "auto" takes what is left, and the log says how much that is. Raises ConfigError for an amount that does not
    fit: who names one has counted on it, and is told what does fit.
    """
    room = needs.room(free_bytes)
    fit = room // shape.record_bytes
    why = f"{_gb(free_bytes)} are free beside the trunk and the drafter, less {needs}"
    if budget == "auto":
        if fit < 1:
            raise ConfigError(
                f"--accelerator-memory auto: no expert fits ({why}); give a shorter --accelerator-context, "
                "a smaller draft model, or experts in a smaller format"
            )
        slots = min(fit, shape.total)
        log.info("%d of %d experts fit the accelerator: %s", slots, shape.total, why)
        return slots
    slots = slots_for(budget, shape, room, "--accelerator-memory")
    if slots > fit:
        raise ConfigError(
            f"--accelerator-memory {budget}: {_gb(slots * shape.record_bytes)} do not fit ({why}); give at most "
            f"{room // 10**6}MB, or auto, or a shorter --accelerator-context"
        )
    return slots


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
