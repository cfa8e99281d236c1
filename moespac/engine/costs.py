"""What experts cost on this machine: known from an earlier run, or measured now and kept."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from pathlib import Path
from typing import Any

import platformdirs
import torch

import moespac
from moespac.atomic import write_atomically
from moespac.config import CalibrationConfig
from moespac.errors import MoespacError
from moespac.experts.calibrate import Workbench
from moespac.experts.out_of_memory import is_out_of_memory
from moespac.policy.cost import MeasuredCosts
from moespac.processor import describe_processor

log = logging.getLogger(__name__)


def known_costs(bench: Workbench, fingerprint: str, config: CalibrationConfig) -> MeasuredCosts | None:
    """Of the model that ``fingerprint`` names. None where they cannot be measured: decoding will teach them, or
    tell what is wrong."""
    key = _key(bench, fingerprint)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    file = platformdirs.user_cache_path("moespac") / "costs" / f"{name}.json"
    known = _read(file, key)
    if known is not None:
        return known
    try:
        measured = bench.measure(config)
    except Exception as error:
        if not isinstance(error, MoespacError) and not is_out_of_memory(error):
            raise
        log.info("costs are not measured: %s", error)
        return None
    _write(file, key, measured)
    return measured


def _key(bench: Workbench, fingerprint: str) -> dict[str, Any]:
    """Whatever changes a cost when it changes."""
    computers = bench.computers
    assert computers.accelerator is not None
    return {
        "accelerator": _device(computers.accelerator.device),
        "accelerator_slots": min(len(computers.accelerator.arena), CalibrationConfig.experts_most),
        "page_locked": computers.accelerator.page_locked,
        "processor": describe_processor(),
        "threads": computers.host_threads,
        "kernel": computers.kernel.isa if computers.kernel else "torch",
        "model": fingerprint,
        "layout": bench.store.layout.to_json(),
        "direct_reads": bench.store.direct,
        "dtype": str(bench.dtype),
        "hidden": bench.hidden,
        "versions": [moespac.__version__, torch.__version__],
    }


def _device(device: torch.device) -> list[str]:
    if device.type != "cuda":
        return [device.type]
    properties = torch.cuda.get_device_properties(device)
    return [properties.name, str(properties.total_memory), _driver()]


def _driver() -> str:
    """Version of the kernel's module, where there is a file that says it."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return str(torch.version.cuda)


def _read(file: Path, key: dict[str, Any]) -> MeasuredCosts | None:
    """None where there is nothing that can be used."""
    try:
        data = json.loads(file.read_bytes())
        if data["key"] != json.loads(json.dumps(key)):
            return None
        curves = [{int(n): float(s) for n, s in data[name].items()} for name in ("host", "accelerator")]
        costs = MeasuredCosts(curves[0], curves[1], float(data["link"]), float(data["storage"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    seconds = [*costs.host.values(), *costs.accelerator.values(), costs.link, costs.storage]
    usable = bool(costs.host and costs.accelerator) and all(math.isfinite(s) and s > 0 for s in seconds)
    return costs if usable and min(*costs.host, *costs.accelerator) >= 1 else None


def _write(file: Path, key: dict[str, Any], costs: MeasuredCosts) -> None:
    data = {
        "key": key,
        "host": costs.host,
        "accelerator": costs.accelerator,
        "link": costs.link,
        "storage": costs.storage,
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(data, indent=1).encode())
    except OSError as error:
        log.info("measured costs are not kept: %s", error)
