"""What a system's runtime adds to its decisions: one class for all that are built in the same way."""

from __future__ import annotations

from dataclasses import replace

from moespac.config import EagerConfig
from moespac.sim.hardware import HardwareProfile

# Of the paper's baselines those whose published code, or the library that they build on (Hugging Face's models),
# loops over a layer's experts in Python and issues each operation by itself. The others have compiled loops.
EAGER = frozenset({"accelerate", "mixtral-offloading", "moe-infinity", "sp-moe", "fate", "hybrimoe"})


def issued_from_python(hardware: HardwareProfile, config: EagerConfig) -> HardwareProfile:
    """The machine under a runtime that issues each operation on the accelerator from Python, nothing captured."""
    return replace(
        hardware,
        layer_overhead=hardware.layer_overhead + config.layer_calls * config.call_seconds,
        accelerator_launch=config.expert_calls * config.call_seconds,
    )
