from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from moespac.config import SensorConfig
from moespac.policy import profile
from moespac.policy.sensors import DemandSensor
from moespac.types import ModelShape, Observation, Window
from tests.policy.small import SHAPE, routing


def _taught() -> DemandSensor:
    sensor, rng = DemandSensor(SHAPE, SensorConfig()), np.random.default_rng(5)
    sensor.observe(Observation(Window(rng.integers(0, 20, 300)), routing(300, rng), 0))
    for _ in range(SensorConfig().context.block):
        window = Window(rng.integers(0, 20, 5))
        sensor.expected(window)
        sensor.observe(Observation(window, routing(5, rng), 0))
    return sensor


def _fresh() -> DemandSensor:
    return DemandSensor(SHAPE, SensorConfig())


def test_a_profile_brings_back_what_was_learned(tmp_path: Path) -> None:
    taught, fresh = _taught(), _fresh()
    profile.save(tmp_path / "new" / "p.npz", taught, "model a")
    assert profile.load(tmp_path / "new" / "p.npz", fresh, "model a")
    np.testing.assert_array_equal(fresh.long_run, taught.long_run)
    assert sorted(fresh.table.tokens) == sorted(taught.table.tokens)
    stored = dict(zip(taught.table.tokens.tolist(), taught.table.frequencies, strict=True))
    for token, row in zip(fresh.table.tokens.tolist(), fresh.table.frequencies, strict=True):
        np.testing.assert_array_equal(row, stored[token])
    np.testing.assert_array_equal(fresh.pairs.tokens, taught.pairs.tokens)
    np.testing.assert_array_equal(fresh.pairs.routed, taught.pairs.routed)
    for name, array in taught.context.state().items():
        assert array.any(), "nothing was learned that could get lost"
        np.testing.assert_array_equal(fresh.context.state()[name], array)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["p.npz"], "nothing else is left behind"


def test_a_smaller_table_keeps_the_most_seen(tmp_path: Path) -> None:
    profile.save(tmp_path / "p.npz", _taught(), "")
    small = DemandSensor(SHAPE, SensorConfig(table_bytes=4 * SHAPE.total * 4))
    assert profile.load(tmp_path / "p.npz", small, "")
    assert len(small.table) == 4
    assert small.table.sightings.min() >= np.sort(_taught().table.sightings)[-4]


def test_a_missing_profile_is_no_news(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not profile.load(tmp_path / "none.npz", _fresh(), "")
    assert not caplog.records


@pytest.mark.parametrize(
    "harm", ["empty", "text", "cut", "flipped", "other model", "other shape", "nan", "bad pair", "a folder"]
)
def test_a_profile_that_cannot_be_used_is_a_warning(
    tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    file, sensor = tmp_path / "p.npz", _taught()
    if harm == "nan":
        sensor.long_run[3] = np.nan
    if harm == "bad pair":
        sensor.pairs.learn(np.array([1]), np.full((1, 6), SHAPE.total))
    if harm == "other shape":
        sensor = DemandSensor(ModelShape(2, 8, 2, 1), SensorConfig())
    profile.save(file, sensor, "other" if harm == "other model" else "")
    content = bytearray(file.read_bytes())
    if harm == "flipped":
        content[content.index(sensor.long_run.tobytes()) + 5] ^= 0x01
    damaged = {"empty": b"", "text": b"hello", "cut": content[: len(content) // 2]}.get(harm, content)
    file.write_bytes(damaged)
    if harm == "a folder":
        file.unlink()
        file.mkdir()

    fresh = _fresh()
    with caplog.at_level(logging.WARNING):
        assert not profile.load(file, fresh, "")
    assert "ignored" in caplog.text
    np.testing.assert_array_equal(fresh.long_run, _fresh().long_run)
    assert len(fresh.table) == len(fresh.pairs.tokens) == 0
