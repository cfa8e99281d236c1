"""The disk that experts are read from: past the page cache, and how fast."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from moespac.cli.tables import size
from moespac.config import DoctorConfig, MeasureConfig
from moespac.doctor.finding import Finding, Place, bad, ok, warn
from moespac.errors import ConfigError


def check_storage(place: Place) -> Iterator[Finding]:
    from moespac.bench.storage_probe import measure_storage

    directory, config = place.directory, MeasureConfig.quick()
    if not directory.is_dir():
        yield bad(
            "storage", f"{directory}: no such directory", "name the directory that models are in: --directory"
        )
        return
    if not os.access(directory, os.W_OK):
        yield warn(
            "storage",
            f"{directory}: cannot be written, so its speed is not measured",
            "name another place on its disk: --directory",
        )
        return
    free = shutil.disk_usage(directory).free
    if free < 4 * config.storage_bytes:
        yield warn(
            "storage", f"{directory}: {size(free)} free", "make room: packs need as much as their model"
        )
        return
    try:
        speed = measure_storage(directory, config, lambda: None)
    except ConfigError as error:
        yield warn("storage", str(error), "name another place: --directory")
        return
    rate = max(speed.rates.values())
    what = f"{directory}: random reads {rate / 1e9:.2f} GB/s; {size(free)} free"
    if rate < DoctorConfig.slow_storage:
        yield warn(
            "storage", what, "keep models on an NVMe disk, or give experts all the host memory they need"
        )
    else:
        yield ok("storage", what)
    if speed.direct:
        yield ok("direct reads", f"{directory}: O_DIRECT works")
    else:
        yield warn(
            "direct reads",
            f"{directory}: the file system refuses O_DIRECT, so reads go through the page cache",
            "move packs to a local ext4 or xfs disk",
        )


def check_cache(place: Place) -> Iterator[Finding]:
    """Where what is learned about a model is kept between runs."""
    directory = platformdirs.user_cache_path("moespac")
    if _can_be_written(directory):
        yield ok("cache", str(directory))
    else:
        yield warn(
            "cache",
            f"{directory}: cannot be written, so nothing learned is kept",
            "set XDG_CACHE_HOME to a place that can",
        )


def _can_be_written(directory: Path) -> bool:
    there = next((each for each in (directory, *directory.parents) if each.exists()), None)
    return there is not None and there.is_dir() and os.access(there, os.W_OK)
