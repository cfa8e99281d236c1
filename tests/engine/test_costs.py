"""Costs are measured once a machine and model, and the policy starts from them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import platformdirs
import pytest

import moespac
from moespac.engine import costs
from moespac.errors import StorageError
from moespac.experts.calibrate import Workbench
from moespac.experts.open_accelerator import open_accelerator
from moespac.policy.cost import CostModel
from tests.engine.cuda import cuda_in_place_of_a_card
from tests.families import save_checkpoint


@pytest.fixture(autouse=True)
def _card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in in process is not measured; one for CUDA is."""
    with cuda_in_place_of_a_card(monkeypatch):
        yield


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return platformdirs.user_cache_path("moespac") / "costs"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Workbench]:
    """Who was measured."""
    measure, seen = Workbench.measure, []

    def counted(self, config):
        seen.append(self)
        return measure(self, config)

    monkeypatch.setattr(Workbench, "measure", counted)
    return seen


def load(path: Path, accelerator: str = "50%") -> CostModel:
    with moespac.load(
        path, draft="none", host_memory="50%", accelerator_memory=accelerator, profile=None
    ) as engine:
        tiers = engine.runtime.memory.tiers
        assert not any(tier.ready.any() or tier.peak_bytes for tier in tiers), "the tiers start empty"
        assert engine.runtime.memory.bytes_read == {"storage": 0, "link": 0}
        return engine.runtime.policy.costs


def test_the_second_load_knows_what_the_first_measured(cache: Path, checkpoint: Path, measured: list) -> None:
    first = load(checkpoint)
    assert len(measured) == 1
    (file,) = cache.glob("*.json")
    kept = json.loads(file.read_bytes())
    second = load(checkpoint)
    assert len(measured) == 1, "it is kept"
    for model in (first, second):
        assert model.host_expert(np.array([1]))[0] == pytest.approx(kept["host"]["1"])
        assert model.accelerator_expert(np.array([16]))[0] >= kept["accelerator"]["16"] * 0.999
        assert (model.link, model.storage) == (kept["link"], kept["storage"])


@pytest.mark.parametrize("what", ["_driver", "describe_processor", "_device"])
def test_another_machine_is_measured_again(
    cache: Path, checkpoint: Path, measured: list, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(checkpoint)
    if what == "_driver":  # part of the device, where that is a card
        monkeypatch.setattr(costs, "_device", lambda device: ["card", costs._driver()])
        load(checkpoint)
        assert len(measured) == 2
        monkeypatch.setattr(costs, "_driver", lambda: "999.1")
    else:
        monkeypatch.setattr(costs, what, lambda *_: ["another"])
    before = len(measured)
    load(checkpoint)
    assert len(measured) == before + 1


def test_other_records_and_threads_are_measured_again(
    cache: Path, checkpoint: Path, measured: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moespac.experts.pack import pack

    pack(checkpoint, tmp_path / "int8", "int8", progress=False)
    load(checkpoint)
    load(tmp_path / "int8")
    assert len(measured) == 2
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    monkeypatch.setattr(
        costs, "describe_processor", lambda: ["the kernel may be torch, which has one worker"]
    )
    load(checkpoint)
    assert len(measured) == 3


@pytest.mark.parametrize("damage", ["", "{}", "[1]", "nan", "host", "key"])
def test_what_cannot_be_used_is_measured_again(
    cache: Path, checkpoint: Path, measured: list, damage: str
) -> None:
    load(checkpoint)
    (file,) = cache.glob("*.json")
    data = json.loads(file.read_bytes())
    if damage == "nan":
        file.write_text(json.dumps(data | {"link": float("nan")}))
    elif damage == "host":
        file.write_text(json.dumps(data | {"host": {}}))
    elif damage == "key":
        file.write_text(json.dumps(data | {"key": {}}))
    else:
        file.write_text(damage)
    load(checkpoint)
    assert len(measured) == 2


def test_without_an_accelerator_nothing_is_measured(cache: Path, checkpoint: Path, measured: list) -> None:
    load(checkpoint, accelerator="none")
    assert not measured and not cache.exists()


def test_a_stand_in_for_a_card_is_not_measured(
    cache: Path, checkpoint: Path, measured: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moespac.engine.build.open_accelerator", open_accelerator)
    load(checkpoint)
    assert not measured and not cache.exists()


def test_a_disk_that_fails_is_found_by_decoding(
    cache: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self, config):
        raise StorageError("reading expert 0 failed")

    monkeypatch.setattr(Workbench, "measure", failing)
    load(checkpoint)
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_no_failure(
    tmp_path: Path, checkpoint: Path, measured: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    load(checkpoint)
    assert len(measured) == 1
