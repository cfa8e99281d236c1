"""What a published throughput says about the one constant that was not published: the CPU's memory bandwidth."""

from __future__ import annotations

from moespac.errors import ConfigError
from moespac.sim.hardware import HardwareProfile
from moespac.sim.shapes import SimModel


def fit_host_bandwidth(
    profile: HardwareProfile, model: SimModel, tokens_per_second: float, resident: float
) -> float:
    """The ``host_bandwidth`` (bytes/s) at which llama.cpp decodes ``tokens_per_second`` without speculation.

    llama.cpp keeps the experts of whole layers on the accelerator, as many as the share ``resident`` (0..1) of all
    experts fills, and the CPU computes the others'; nothing overlaps. So a token's time less trunk, accelerator
    and overheads is the CPU reading top-k experts in each of the other layers. Raises ConfigError when these
    alone take longer than a token.
    """
    on_accelerator = int(resident * model.layers)
    on_host = (model.layers - on_accelerator) * model.top_k
    known = (
        profile.trunk_seconds(model, tokens=1, on_accelerator=True)
        + on_accelerator * model.top_k * profile.expert_accelerator_seconds(model, tokens=1)
        + on_host * profile.host_expert_overhead
    )
    left = 1 / tokens_per_second - known
    if left <= 0 or on_host == 0:
        raise ConfigError(
            f"{tokens_per_second:g} tokens/s leave {profile.name}'s CPU no time for {on_host} experts;"
            " give a lower figure, or correct the profile"
        )
    return on_host * model.expert_bytes / left
