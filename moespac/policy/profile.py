"""A profile: what the sensors learned of a model, kept in a file between runs."""

from __future__ import annotations

import io
import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from moespac.atomic import write_atomically
from moespac.policy.sensors import DemandSensor

_LOG = logging.getLogger(__name__)
_VERSION = 2
_CONTEXT = "context_"  # before the names of its arrays


def save(path: Path, sensor: DemandSensor, model: str) -> None:
    """Write atomically: whoever reads ``path`` finds the old profile or the new one, whole.

    ``model`` names the checkpoint (its fingerprint); together with the shape it guards against mix-ups.
    """
    arrays: dict[str, Any] = {
        "key": _key(sensor, model),
        "long_run": sensor.long_run,
        "seen_tokens": sensor.tokens,
        "tokens": sensor.table.tokens,
        "sightings": sensor.table.sightings,
        "frequencies": sensor.table.frequencies,
        "pair_tokens": sensor.pairs.tokens,
        "pair_routed": sensor.pairs.routed,
    }
    arrays |= {_CONTEXT + name: array for name, array in sensor.context.state().items()}
    content = io.BytesIO()
    np.savez(content, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())


def load(path: Path, sensor: DemandSensor, model: str) -> bool:
    """Teach ``sensor`` what ``path`` holds; returns whether it could be used.

    A profile is only a head start: a corrupt or foreign one is worth a warning, a missing one not even that.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            values = {name: stored[name] for name in stored.files}
        if str(values["key"]) != _key(sensor, model):
            raise ValueError(f"it was made for {values['key']}")
        _check(values, sensor)
        rate, tokens = values["long_run"].astype(np.float32), float(values["seen_tokens"])
        rows = (
            values["tokens"].astype(np.int64),
            values["sightings"].astype(np.float32),
            values["frequencies"],
        )
        pairs = values["pair_tokens"].astype(np.int64), values["pair_routed"].astype(np.int64)
        context = {name: values[_CONTEXT + name] for name in sensor.context.state()}
    except FileNotFoundError:
        return False  # the first run of this model
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        _LOG.warning("profile %s is ignored (%s); delete it to stop this message", path, error)
        return False
    sensor.restart(rate, tokens)
    sensor.table.restore(*rows)
    sensor.pairs.learn(*pairs)
    sensor.context.restore(context)
    return True


def _check(values: dict[str, np.ndarray], sensor: DemandSensor) -> None:
    width, routings = sensor.shape.total, sensor.shape.layers * sensor.shape.top_k
    rows, pairs = len(np.unique(values["tokens"])), len(values["pair_tokens"])
    shapes = {"long_run": (width,), "tokens": (rows,), "sightings": (rows,), "frequencies": (rows, width)}
    shapes |= {"pair_tokens": (pairs,), "pair_routed": (pairs, routings)}
    shapes |= {_CONTEXT + name: array.shape for name, array in sensor.context.state().items()}
    for name, shape in shapes.items():
        if values[name].shape != shape:
            raise ValueError(f"{name} has shape {values[name].shape}, not {shape}")
        if not np.isfinite(values[name]).all():
            raise ValueError(f"{name} holds impossible values")
    if min(values[name].min(initial=0) for name in ("sightings", "frequencies")) < 0:
        raise ValueError("its token table holds impossible values")
    if not ((values["pair_routed"] >= -1) & (values["pair_routed"] < width)).all():
        raise ValueError("its pairs went to experts that are not there")
    if not (values["long_run"] > 0).all() or not values["seen_tokens"] > 0:
        raise ValueError("its rates are not positive")


def _key(sensor: DemandSensor, model: str) -> str:
    shape = sensor.shape
    return f"moespac-profile-{_VERSION} {shape.layers}x{shape.experts} top {shape.top_k} {model}".rstrip()
