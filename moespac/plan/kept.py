"""The profile of this machine that is kept between runs, as long as nothing has changed that it depends on."""

from __future__ import annotations

import json
import logging
import os
from datetime import datetime
from typing import Any

import platformdirs
import torch

import moespac
from moespac import host_memory
from moespac.atomic import write_atomically
from moespac.errors import ConfigError
from moespac.experts.kernels.compile import library_name
from moespac.experts.kernels.library import chosen_isa, load_library
from moespac.processor import describe_processor
from moespac.sim.hardware import HardwareProfile

log = logging.getLogger(__name__)

_FILE = "hardware.json"


def read_kept() -> tuple[HardwareProfile, str] | None:
    """With the day it was measured on. None where there is none, or one of another machine or other software."""
    file = platformdirs.user_cache_path("moespac") / _FILE
    try:
        data = json.loads(file.read_bytes())
        if data["key"] != _key():
            return None
        return HardwareProfile.from_json(
            data["profile"]
        ), f"{datetime.fromtimestamp(file.stat().st_mtime):%Y-%m-%d}"
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return None


def keep(hardware: HardwareProfile) -> None:
    file = platformdirs.user_cache_path("moespac") / _FILE
    data = {"key": _key(), "profile": hardware.to_json()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(data).encode())
    except OSError as error:
        log.info("the profile of this machine is not kept (%s)", error)


def _key() -> dict[str, Any]:
    """Whatever changes the profile when it changes; the disk apart, which a directory is on."""
    library = load_library()
    isa = chosen_isa(library) if library else None
    return {
        "processor": describe_processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "kernel": [isa.decode(), library_name()] if isa else ["torch"],
        "memory": host_memory.total_bytes(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "versions": [moespac.__version__, torch.__version__],
    }
