"""Profiles: their figures, and the seconds that follow from them."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from moespac.errors import ConfigError
from moespac.sim.fit import fit_host_bandwidth
from moespac.sim.hardware import HardwareProfile, find_profile, profile_names
from moespac.sim.shapes import MODEL_NAMES, named_model

QWEN = named_model("qwen3-30b-a3b-f16")
MACHINE = HardwareProfile(
    name="round",
    host_memory=64 << 30,
    host_bandwidth=50e9,
    host_flops=100e9,
    host_expert_overhead=1e-6,
    layer_overhead=1e-4,
    storage_bandwidth=2e9,
    storage_latency=1e-3,
    storage_depth=4,
    accelerator_memory=24 << 30,
    accelerator_bandwidth=1e12,
    accelerator_flops=1e13,
    accelerator_launch=1e-5,
    link_bandwidth=20e9,
    link_latency=1e-5,
)
MEASURED = ("host_", "layer_", "accelerator_", "link_", "storage_")
HOST_ONLY = replace(MACHINE, accelerator_memory=0)


def test_an_expert_is_read_once_until_arithmetic_takes_longer() -> None:
    reading, computing = 9_437_184 / 50e9, 2 * 4_718_592 / 100e9  # the latter for each token
    assert MACHINE.expert_host_seconds(QWEN, 1) == pytest.approx(1e-6 + reading)
    assert MACHINE.expert_host_seconds(QWEN, 2) == pytest.approx(1e-6 + reading)
    assert MACHINE.expert_host_seconds(QWEN, 8) == pytest.approx(1e-6 + 8 * computing)
    assert MACHINE.expert_accelerator_seconds(QWEN, 1) == pytest.approx(1e-5 + 9_437_184 / 1e12)
    assert MACHINE.expert_accelerator_seconds(QWEN, 100) == pytest.approx(1e-5 + 100 * 2 * 4_718_592 / 1e13)


def test_a_measured_curve_is_preferred_and_goes_on_beyond_its_end() -> None:
    machine = replace(MACHINE, host_seconds_per_weight={"f16": ((1, 1e-10), (4, 2e-10), (8, 4e-10))})
    for tokens, per_weight in ((1, 1e-10), (2, 4e-10 / 3), (4, 2e-10), (6, 3e-10), (8, 4e-10), (12, 6e-10)):
        expected = 1e-6 + 4_718_592 * per_weight
        assert machine.expert_host_seconds(QWEN, tokens) == pytest.approx(expected), tokens
    other = named_model("qwen3-30b-a3b-q4")
    assert machine.expert_host_seconds(other, 1) == MACHINE.expert_host_seconds(other, 1)


def test_moving_bytes() -> None:
    assert MACHINE.link_seconds(20_000_000) == pytest.approx(1e-5 + 1e-3)
    assert MACHINE.storage_seconds(4_000_000) == pytest.approx(1e-3 + 2e-3)


def test_the_trunk_runs_where_it_is_and_layers_cost_extra() -> None:
    assert MACHINE.trunk_seconds(QWEN, 1, on_accelerator=True) == pytest.approx(
        48e-4 + QWEN.trunk_bytes / 1e12
    )
    assert MACHINE.trunk_seconds(QWEN, 1, on_accelerator=False) == pytest.approx(
        48e-4 + QWEN.trunk_bytes / 50e9
    )
    many = 48e-4 + 1000 * 2 * QWEN.trunk_weights / 1e13
    assert MACHINE.trunk_seconds(QWEN, 1000, on_accelerator=True) == pytest.approx(many)


def test_drafting_is_reading_the_drafter() -> None:
    assert MACHINE.draft_seconds(10**9) == pytest.approx(1e-3)
    assert HOST_ONLY.draft_seconds(10**9) == pytest.approx(1 / 50)


def test_copies_and_experts_share_the_hosts_memory() -> None:
    assert MACHINE.rates_together() == pytest.approx((0.6, 1.0))  # 20 of 50 GB/s go over the link
    assert replace(MACHINE, link_bandwidth=40e9).rates_together() == pytest.approx((0.5, 25 / 40))
    assert replace(MACHINE, link_shares_host_memory=False).rates_together() == (1, 1)
    assert HOST_ONLY.rates_together() == (1, 1)


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profiles_are_whole(name: str, tmp_path: Path) -> None:
    """Each figure says where it comes from, and survives being written and read."""
    profile = find_profile(name)
    assert profile.name == name
    figures = {
        f.name for f in fields(profile) if f.type in ("int", "float", "bool") and getattr(profile, f.name)
    }
    if not profile.has_accelerator:
        figures = {f for f in figures if not f.startswith(("accelerator", "link"))} | {"accelerator_memory"}
    assert set(profile.sources) == figures
    file = tmp_path / "p.json"
    file.write_text(json.dumps(profile.to_json()))
    assert find_profile(str(file)) == profile
    assert pickle.loads(pickle.dumps(profile)) == profile  # simulations run in several processes


def test_the_machines_that_were_promised() -> None:
    promised = {"rtx4090-pcie4", "rtx3060-12gb", "rtx5070ti-16gb", "h100-pcie5", "laptop-cpu-nvme"}
    assert set(profile_names()) == promised
    assert not find_profile("laptop-cpu-nvme").has_accelerator


def test_the_papers_unknown_cpu_is_what_llama_cpp_says() -> None:
    profile = find_profile("rtx4090-pcie4")
    assert "UNKNOWN" in profile.sources["host_bandwidth"]
    assert "fitted on llama.cpp's 15.23 TPS" in profile.sources["host_bandwidth"]
    fitted = fit_host_bandwidth(profile, QWEN, tokens_per_second=15.23, resident=0.17)
    assert profile.host_bandwidth == pytest.approx(fitted, rel=0.002)


def test_freetokens_unknown_cpu_is_what_llama_cpp_says() -> None:
    profile, model = find_profile("rtx5070ti-16gb"), named_model("qwen3-30b-a3b-q4")
    assert profile.sources["host_bandwidth"].startswith("UNKNOWN")
    fitted = fit_host_bandwidth(profile, model, tokens_per_second=46.3, resident=0.5)
    assert profile.host_bandwidth == pytest.approx(fitted, rel=0.002)


def test_the_fit_inverts_the_model() -> None:
    """With the fitted bandwidth a token takes as long as it should: 9.6 layers fit, so 9 are on the GPU."""
    machine = replace(MACHINE, host_bandwidth=fit_host_bandwidth(MACHINE, QWEN, 10.0, resident=0.2))
    token = machine.trunk_seconds(QWEN, 1, on_accelerator=True)
    token += 9 * 8 * machine.expert_accelerator_seconds(QWEN, 1)
    token += 39 * 8 * machine.expert_host_seconds(QWEN, 1)
    assert token == pytest.approx(0.1)


@pytest.mark.parametrize(("tps", "resident"), [(1000.0, 0.17), (10.0, 1.0)])
def test_a_throughput_that_cannot_be_is_not_fitted(tps: float, resident: float) -> None:
    with pytest.raises(ConfigError, match="no time for"):
        fit_host_bandwidth(MACHINE, QWEN, tps, resident)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("host_bandwidth", 0.0),
        ("host_bandwidth", float("nan")),
        ("host_bandwidth", "fast"),
        ("host_bandwidth", True),
        ("host_flops", float("inf")),
        ("layer_overhead", -1e-6),
        ("storage_slowdown", 1.0),
        ("expert_slowdown", -0.1),
        ("storage_depth", 0),
        ("storage_depth", 1.5),
        ("accelerator_bandwidth", 0.0),
        ("link_bandwidth", 0.0),
        ("link_shares_host_memory", 1),
        ("accelerator_memory", -1),
        ("name", 7),
    ],
)
def test_impossible_figures(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{field} cannot be"):
        replace(MACHINE, **{field: value})


def test_what_may_cost_nothing_may_be_zero() -> None:
    free = ("host_expert_overhead", "layer_overhead", "storage_latency", "accelerator_launch", "link_latency")
    free += ("decide_overhead", "cache_overhead", "ask_overhead", "storage_slowdown", "expert_slowdown")
    replace(MACHINE, **dict.fromkeys(free, 0.0))


@pytest.mark.parametrize(
    "curve", [[], [[1, 1e-10]], [[2, 1e-10], [4, 2e-10]], [[1, 2e-10], [4, 1e-10]], [[1, 0], [2, 1]]]
)
def test_curves_that_are_none(curve: list[list[float]]) -> None:
    data = MACHINE.to_json() | {"host_seconds_per_weight": {"bf16": curve}}
    with pytest.raises(ConfigError, match="is no rising list"):
        HardwareProfile.from_json(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read .* one of h100-pcie5, laptop"),
        ("{", "is not a profile"),
        ("3", "is not a profile"),
        ("{}", "missing .* required positional arguments"),
        (json.dumps(MACHINE.to_json() | {"color": "red"}), "unexpected keyword argument 'color'"),
        (json.dumps(MACHINE.to_json() | {"host_seconds_per_weight": {"bf16": 1}}), "cannot be used"),
        (json.dumps(MACHINE.to_json() | {"host_seconds_per_weight": 1}), "cannot be used"),
    ],
)
def test_files_that_are_no_profile(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "p.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        find_profile(str(file))
    assert "\n" not in str(caught.value)


def test_nothing_here_loads_torch() -> None:
    modules = "moespac.sim.fit, moespac.sim.hardware, moespac.sim.shapes, moespac.sim.synthetic"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_documented_figures_are_those_of_the_profiles(repository: Path) -> None:
    text = (repository / "docs" / "hardware.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]
    header = next(row for row in rows if row[0] == "field")
    units = {"GiB": 2**30, "GB/s": 1e9, "T/s": 1e12, "us": 1e-6, "": 1}
    figures = {row[0]: row[1:] for row in rows if row[0].startswith(MEASURED)}
    assert len(figures) == 14
    for column, name in enumerate(header[1:]):
        profile = find_profile(name.strip("`"))
        for field, cells in figures.items():
            number, _, unit = cells[column].partition(" ")
            assert float(number or 0) * units[unit] == pytest.approx(getattr(profile, field)), (name, field)


def test_the_documented_models_are_those_that_have_names(repository: Path) -> None:
    text = (repository / "docs" / "hardware.md").read_text()
    for name in MODEL_NAMES:
        model = named_model(name)
        sizes = [
            f"{model.expert_bytes / 1e6:.3g} MB",
            f"{model.to_model_shape().total * model.expert_bytes / 1e9:.3g} GB",
        ]
        sizes += [f"{nbytes / 1e9:.2f} GB" for nbytes in (model.trunk_bytes, model.drafter_bytes)]
        shape = f"{model.layers} x {model.experts}, {model.top_k}"
        assert f"| `{name}` | {shape} | {' | '.join(sizes)} |" in text
