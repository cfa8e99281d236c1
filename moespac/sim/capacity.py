"""How many experts the tiers of a machine hold."""

from __future__ import annotations

import math

from moespac.config import SimulationConfig
from moespac.errors import ConfigError
from moespac.sim.hardware import HardwareProfile
from moespac.sim.shapes import SimModel
from moespac.types import Capacity


def capacity_of(
    hardware: HardwareProfile,
    model: SimModel,
    cache: float,
    host: float | None = None,
    config: SimulationConfig | None = None,
) -> Capacity:
    """The slots of each tier when the fastest holds the share ``cache`` (0..1) of all experts.

    That is the accelerator where there is one, else host memory. Behind an accelerator host memory holds the share
    ``host``, by default what fits. Raises ConfigError for a share that holds no expert.
    """
    fastest = _slots(cache, model)
    if not hardware.has_accelerator:
        return Capacity(host=fastest)
    if host is not None:
        return Capacity(_slots(host, model), fastest)
    fitting = int(hardware.host_memory * (config or SimulationConfig()).host_share) // model.expert_bytes
    return Capacity(min(fitting, model.layers * model.experts), fastest)


def excess_bytes(hardware: HardwareProfile, model: SimModel, capacity: Capacity) -> int:
    """By how much the fastest tier's memory is too small for its experts and everything that lies beside them."""
    if capacity.accelerator:
        needed, memory = capacity.accelerator * model.expert_bytes, hardware.accelerator_memory
    else:
        needed, memory = capacity.host * model.expert_bytes, hardware.host_memory
    return max(needed + model.resident_bytes - memory, 0)


def _slots(share: float, model: SimModel) -> int:
    total = model.layers * model.experts
    slots = math.floor(total * share + 1e-9)
    if slots < 1:
        raise ConfigError(
            f"{share:.3%} of {model.name}'s {total} experts is none; give at least {math.ceil(1e4 / total) / 100}%"
        )
    return slots
