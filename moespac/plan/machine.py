"""The machine that is planned for: this one, measured once, or one that has a profile."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import platformdirs

from moespac import host_memory
from moespac.atomic import write_atomically
from moespac.config import MeasureConfig, SimulationConfig
from moespac.errors import ConfigError
from moespac.plan.advise import Machine
from moespac.sim.hardware import HardwareProfile, find_profile

log = logging.getLogger(__name__)


def named_machine(source: str) -> Machine:
    """A shipped profile, or a file of `moespac profile`, with its memory nearly free. Raises ConfigError."""
    hardware, share = find_profile(source), SimulationConfig().host_share
    return Machine(hardware, int(hardware.host_memory * share), int(hardware.accelerator_memory * share))


def this_machine(directory: Path, anew: bool, progress: Callable[[int, int], None]) -> Machine:
    """With what is free now. Measured quickly on ``directory``'s disk when no profile is kept, or when ``anew``.

    Raises ConfigError when it cannot be measured.
    """
    file = platformdirs.user_cache_path("moespac") / "hardware.json"
    hardware = None if anew else _kept(file)
    if hardware is None:
        hardware = _measure(directory, progress)
        _keep(file, hardware)
    return Machine(hardware, _free_of_host(), _free_of_accelerator(hardware))


def _kept(file: Path) -> HardwareProfile | None:
    try:
        return HardwareProfile.from_json(json.loads(file.read_bytes()))
    except (OSError, ValueError, ConfigError):
        return None  # not there, or of another version: measured anew


def _measure(directory: Path, progress: Callable[[int, int], None]) -> HardwareProfile:
    from moespac.bench.machine import measure_machine, to_profile

    config = MeasureConfig.quick()
    place = directory if os.access(directory, os.W_OK) else Path()
    return to_profile("this machine", measure_machine(place, config, progress), config)


def _keep(file: Path, hardware: HardwareProfile) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(hardware.to_json()).encode())
    except OSError as error:
        log.info("the profile of this machine is not kept (%s)", error)


def _free_of_host() -> int:
    left_to_others = (1 - SimulationConfig().host_share) * host_memory.total_bytes()
    return max(0, int(host_memory.free_bytes() - left_to_others))


def _free_of_accelerator(hardware: HardwareProfile) -> int:
    if not hardware.has_accelerator:
        return 0
    import torch

    free, _ = torch.cuda.mem_get_info()
    return int(free)
