"""Measuring this machine: what is made of the measurements, and that nothing is left behind."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moespac.bench import storage_probe
from moespac.bench.beside_probe import Slowdowns, measure_slowdowns
from moespac.bench.compute_probe import ExpertProbe, expert_overhead, host_expert_seconds, memory_bandwidth
from moespac.bench.cuda_probe import CudaSpeed, measure_cuda
from moespac.bench.machine import Measurement, to_profile
from moespac.bench.overhead_probe import Overheads
from moespac.bench.storage_probe import StorageSpeed, fit_storage, measure_storage, storage_file
from moespac.cli import app
from moespac.config import MeasureConfig
from moespac.errors import ConfigError
from moespac.experts.movers import host_arena
from moespac.sim.hardware import find_profile
from moespac.sim.shapes import model_from_config

TINY = MeasureConfig(
    memory_bytes=1 << 20,
    storage_bytes=4 << 20,
    storage_seconds=0.01,
    block_bytes=(1 << 16, 1 << 18),
    depths=(1, 2),
    expert_hidden=64,
    expert_width=32,
    expert_tokens=(1, 4),
    records_bytes=1 << 18,
    beside_seconds=0.02,
    beside_turns=2,
    repeats=2,
    decode_tokens=3,
    overhead_width=1,
)
MEASURED = Measurement(
    memory={1: 10e9, 2: 16e9},
    storage=StorageSpeed({(1 << 20, 1): 0.5e9, (1 << 20, 4): 1e9}, direct=True),
    experts={"f32": {1: 1e-4, 4: 2e-4}, "bf16": {1: 3e-4, 4: 2e-4}},
    expert_overhead=2e-5,
    overheads=Overheads(layer=3e-4, decide=1e-4, cache=5e-5, ask=2e-4),
    slowdowns=Slowdowns(storage=0.25, experts=0.125),
    cuda=None,
)
CUDA = CudaSpeed("a GPU", 8 << 30, 4e11, 1e13, 2e-5, 2e10, 1e-5, 5e9)


def nothing() -> None:
    pass


def test_a_profile_is_what_was_measured() -> None:
    profile = to_profile("here", MEASURED, TINY)
    weights = 3 * 64 * 32
    assert profile.name == "here" and not profile.has_accelerator
    assert profile.host_bandwidth == 16e9
    assert profile.host_flops == pytest.approx(2 * 4 * weights / 2e-4)
    assert (profile.host_expert_overhead, profile.layer_overhead) == (2e-5, 3e-4)
    assert (profile.decide_overhead, profile.cache_overhead, profile.ask_overhead) == (1e-4, 5e-5, 2e-4)
    assert (profile.storage_slowdown, profile.expert_slowdown) == (0.25, 0.125)
    assert (profile.storage_bandwidth, profile.storage_depth) == (1e9, 4)
    assert all("measured on this machine" in text for text in profile.sources.values())
    assert {"host_memory", "storage_latency", "host_seconds_per_weight"} <= set(profile.sources)


def test_the_simulator_gets_back_the_seconds_of_the_expert_that_was_measured() -> None:
    dims = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 2, "num_experts_per_tok": 1}
    dims |= {"num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 10}
    profile = to_profile("here", MEASURED, TINY)
    for format, seconds in (
        ("f32", {1: 1e-4, 4: 2e-4}),
        ("bf16", {1: 3e-4, 4: 3e-4}),
    ):  # never faster with more
        model = model_from_config("m", dims, format)
        for tokens, expected in seconds.items():
            assert profile.expert_host_seconds(model, tokens) == pytest.approx(expected)


def test_a_gpu_becomes_the_accelerator() -> None:
    measured = Measurement(**{**vars(MEASURED), "cuda": CUDA})
    profile = to_profile("here", measured, TINY)
    assert (profile.accelerator_memory, profile.accelerator_bandwidth) == (8 << 30, 4e11)
    assert (profile.accelerator_flops, profile.accelerator_launch) == (1e13, 2e-5)
    assert (profile.link_bandwidth, profile.link_latency) == (2e10, 1e-5)
    assert "measured" in profile.sources["link_bandwidth"]


def test_storage_by_hand() -> None:
    """4 reads in flight reach 2 GB/s, 8 hardly more. One of 1 MB alone takes 2 ms, of which 0.5 ms are bytes."""
    rates = {(10**6, 1): 0.5e9, (10**6, 2): 1e9, (10**6, 4): 2e9, (10**6, 8): 2.1e9}
    model = fit_storage(rates, slack=1.1)
    assert (model.bandwidth, model.depth) == (2e9, 4)
    assert model.latency == pytest.approx(1.5e-3)
    assert fit_storage(rates, slack=1.01).depth == 8


def test_a_disk_that_is_fastest_alone_has_no_latency() -> None:
    model = fit_storage({(10**6, 1): 2e9, (10**6, 4): 1.9e9}, slack=1.1)
    assert (model.bandwidth, model.latency, model.depth) == (2e9, 0.0, 1)


def test_depth_is_that_of_the_median_block() -> None:
    rates = {(1, 1): 1.0, (2, 1): 1.0, (3, 1): 9.0, (1, 2): 3.0, (2, 2): 4.0, (3, 2): 5.0}
    assert (fit_storage(rates, slack=1.1).bandwidth, fit_storage(rates, slack=1.1).depth) == (4.0, 2)


@pytest.mark.parametrize("direct", [True, False])
def test_storage_is_read_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    if not direct:
        monkeypatch.setattr(storage_probe, "reopen_direct", lambda fd: None)
    advanced: list[int] = []
    speed = measure_storage(tmp_path, TINY, lambda: advanced.append(1))
    assert set(speed.rates) == {(block, depth) for block in TINY.block_bytes for depth in TINY.depths}
    assert all(rate > 0 for rate in speed.rates.values())
    assert direct or not speed.direct
    assert len(advanced) == 4
    assert not list(tmp_path.iterdir())


def test_a_read_lands_where_records_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All over an arena that has huge pages, however small the blocks and however few are read at once."""
    file = tmp_path / "blocks"
    file.write_bytes(b"\x01" * (1 << 16) * 4)
    arenas = []
    monkeypatch.setattr(
        storage_probe, "host_arena", lambda *shape: arenas.append(host_arena(*shape)) or arenas[-1]
    )
    descriptor = os.open(file, os.O_RDONLY)
    rate = storage_probe.read_rate(descriptor, 1 << 16, 4, depth=3, seconds=0.1)
    os.close(descriptor)
    (arena,) = arenas
    assert rate > 0 and 63 << 20 < arena.nbytes <= 64 << 20
    filled = arena[:, 0].sum().item()
    assert filled > 3 * 20  # each of the three threads went on to other slots


def test_nothing_stays_when_reading_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> float:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(storage_probe, "read_rate", fail)
    with pytest.raises(ConfigError, match="Input/output error"):
        measure_storage(tmp_path, TINY, nothing)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage_probe, "write_all", full)
    with pytest.raises(ConfigError, match=r"cannot hold 4 MiB .*No space left.* name another place"):
        measure_storage(tmp_path, TINY, nothing)


def test_experts_and_reads_cost_each_other_a_share(tmp_path: Path) -> None:
    with storage_file(tmp_path, TINY) as file:
        found = measure_slowdowns(file, TINY)
    assert 0 <= found.storage < 1 and 0 <= found.experts < 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("each", [1, 3])
def test_expert_records_take_turns(each: int) -> None:
    """More of them than a cache holds, all equal: the same answer from each."""
    probe = ExpertProbe(64, 32, "int8", nbytes=50_000, each=each)
    x = torch.ones(2, 64)
    first = probe.run(x).clone()
    assert first.shape == (2, 64) and first.abs().sum() > 0
    turns = [tuple(next(probe._turns)) for _ in range(20)]
    assert sorted({slot for turn in turns for slot in turn}) == list(range(probe._records.shape[0]))
    assert all(len(turn) == probe.together for turn in turns)
    assert 0 <= probe._records.shape[0] - -(-50_000 // 8192) < probe.together
    assert torch.equal(probe.run(x), first)


def test_host_speeds_are_positive() -> None:
    assert memory_bandwidth(2, TINY) > 0
    assert expert_overhead(TINY) > 0
    rounds: list[int] = []
    seconds = host_expert_seconds(("bf16", "int4"), TINY, lambda: rounds.append(1))
    assert len(rounds) == 3
    assert {(f, n) for f in seconds for n in seconds[f]} == {(f, n) for f in ("bf16", "int4") for n in (1, 4)}
    assert min(s for by_tokens in seconds.values() for s in by_tokens.values()) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_measured() -> None:
    speed = measure_cuda(TINY)
    assert speed is not None and speed.memory > 1 << 30
    assert 1e9 < speed.link_bandwidth < speed.bandwidth < 1e14


def test_the_command_writes_a_profile_that_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MeasureConfig, "quick", lambda: TINY)
    file, disk = tmp_path / "mine.json", tmp_path / "disk"
    disk.mkdir()
    result = CliRunner().invoke(app, ["profile", "--quick", "-o", str(file), "--directory", str(disk)])
    assert result.exit_code == 0, result.output
    assert "Random reads" in result.output and "overhead of a layer" in result.output
    profile = find_profile(str(file))
    assert profile.name == "mine" and profile.layer_overhead > 0
    assert set(profile.host_seconds_per_weight) == {"f32", "bf16", "int8", "int4"}
    assert str(tmp_path) not in json.dumps(profile.to_json())
    assert not list(disk.iterdir())


@pytest.mark.parametrize("option", ["--directory", "--output"])
def test_bad_places_are_one_line(tmp_path: Path, option: str) -> None:
    places = {"--output": str(tmp_path / "p.json"), "--directory": str(tmp_path)}
    places[option] = str(tmp_path / "missing" / "p")
    arguments = [word for place in places.items() for word in place]
    result = CliRunner().invoke(app, ["profile", "--quick", *arguments])
    assert result.exit_code == 2
    assert option in result.output and "Traceback" not in result.output
    assert not (tmp_path / "p.json").exists()
