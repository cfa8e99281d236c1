"""The machine that is planned for: this one, measured once, or one that has a profile."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil

from moespac import host_memory
from moespac.config import MeasureConfig, PlanConfig
from moespac.errors import ConfigError
from moespac.experts.budget import parse_bytes
from moespac.plan.advise import Machine
from moespac.plan.kept import keep, read_kept
from moespac.sim.hardware import HardwareProfile, find_profile

log = logging.getLogger(__name__)


def named_machine(source: str) -> Machine:
    """A shipped profile, or a file of `moespac profile`, with its memory nearly free. Raises ConfigError."""
    hardware, config = find_profile(source), PlanConfig()
    return Machine(
        hardware,
        int(hardware.host_memory * config.host_free),
        int(hardware.accelerator_memory * config.accelerator_free),
        f"assumed: {config.host_free:.0%} of {_gb(hardware.host_memory)}",
        f"assumed: {config.accelerator_free:.0%} of {_gb(hardware.accelerator_memory)}",
    )


def this_machine(directory: Path, anew: bool, progress: Callable[[int, int], None]) -> Machine:
    """With what is free now. Measured quickly on ``directory``'s disk when no profile is kept, or when ``anew``.

    Raises ConfigError when it cannot be measured.
    """
    kept = None if anew else read_kept()
    if kept is not None:
        hardware, measured = kept
    else:
        hardware, measured = _measure_and_keep(directory, progress), ""
    left_to_others = 1 - PlanConfig().host_free
    return Machine(
        hardware,
        max(0, int(host_memory.free_bytes() - left_to_others * host_memory.total_bytes())),
        _free_of_accelerator(hardware),
        f"now, less {left_to_others:.0%} of all for others",
        "now",
        measured,
    )


def with_free(machine: Machine, host: str | None, accelerator: str | None, host_most: int | None) -> Machine:
    """``machine`` with these amounts ("20GiB") free instead, where they are given.

    ``host_most``: bytes of host memory that there are; None: of a machine that is not here, which may have more
    than its profile says. A card has what it has. Raises ConfigError for more than that.
    """
    name, card = machine.hardware.name, machine.hardware.accelerator_memory
    if host is not None:
        nbytes = parse_bytes(host, "--host-free")
        if host_most is not None and nbytes > host_most:
            raise ConfigError(f"--host-free {host}: {name} has {_gb(host_most)}; give at most that")
        profile = machine.hardware.host_memory
        more = f", more than its profile's {_gb(profile)}" if host_most is None and nbytes > profile else ""
        machine = replace(machine, host_bytes=nbytes, host_source=f"as given{more}")
    if accelerator is not None:
        nbytes = parse_bytes(accelerator, "--accelerator-free")
        if not card:
            raise ConfigError(f"--accelerator-free {accelerator}: {name} has no accelerator; leave it out")
        if nbytes > card:
            raise ConfigError(
                f"--accelerator-free {accelerator}: {name} has {_gb(card)}; give at most that, or plan for a "
                "machine with a larger card (--hardware)"
            )
        machine = replace(machine, accelerator_bytes=nbytes, accelerator_source="as given")
    return machine


def _measure_and_keep(directory: Path, progress: Callable[[int, int], None]) -> HardwareProfile:
    """Kept only if the machine had nothing else to do: else its speed was measured too low."""
    config = MeasureConfig.quick()
    busy = psutil.cpu_percent(config.busy_seconds) / 100
    hardware = _measure(directory, progress)
    if busy <= config.busy_share:
        keep(hardware)
    else:
        log.warning(
            "other programs took %.0f%% of the processor: this machine was measured too slow, and will be measured "
            "again next time",
            100 * busy,
        )
    return hardware


def _measure(directory: Path, progress: Callable[[int, int], None]) -> HardwareProfile:
    from moespac.bench.machine import measure_machine, to_profile

    config = MeasureConfig.quick()
    place = directory if os.access(directory, os.W_OK) else Path()
    return to_profile("this machine", measure_machine(place, config, progress), config)


def _free_of_accelerator(hardware: HardwareProfile) -> int:
    if not hardware.has_accelerator:
        return 0
    import torch

    free, _ = torch.cuda.mem_get_info()
    return int(free)


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3g} GB"
