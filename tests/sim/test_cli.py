"""``moespac simulate`` and ``moespac bench paper`` from end to end, and what they refuse."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from moespac.bench.ablation import PARTS
from moespac.cli import app
from moespac.policy.registry import SIMULATOR_POLICIES
from moespac.sim.shapes import named_model
from moespac.trace import TraceRecorder, write
from moespac.types import Observation, Window

SHAPE = "deepseek-v2-lite-f16"


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short texts of plain decoding, of two benchmarks."""
    shape, rng = named_model(SHAPE).to_model_shape(), np.random.default_rng(0)
    recorder = TraceRecorder(shape, "a test")
    for category in ("mt_bench/writing", "humaneval"):
        recorder.begin_sequence(category)
        for at in range(16):
            routing = rng.random((shape.layers, 1, shape.experts)).argsort(axis=-1)[..., : shape.top_k]
            recorder(Observation(Window(np.array([at])), routing, accepted=0))
    file = tmp_path_factory.mktemp("trace") / "trace.npz"
    write(file, recorder.trace())
    return file


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "120"})


def simulate(trace: Path, *arguments: object) -> Result:
    """Later options come first where one is given twice."""
    given = {"--hardware": "rtx4090-pcie4", "--model-shape": SHAPE, "--jobs": 1}
    rest = [part for flag, value in given.items() if flag not in arguments for part in (flag, value)]
    return run("simulate", trace, *rest, *arguments)


def refused(result: Result) -> str:
    """The one line of an error with exit code 2."""
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    return result.stderr


def test_all_policies_are_simulated_and_written(trace: Path, tmp_path: Path) -> None:
    file, plots = tmp_path / "results.json", tmp_path / "plots"
    result = simulate(trace, "--cache", "17%", "--window", 3, "--tokens", 4, "--json", file, "--plots", plots)
    assert result.exit_code == 0, result.output
    records = json.loads(file.read_text())
    assert [record["policy"] for record in records] == list(SIMULATOR_POLICIES)
    for record in records:
        assert record["tokens_per_second"] > 0 and 0 <= record["hit_rate"] <= 1
        assert record["tokens"] == 8 and record["share_of_belady"] > 0
        assert record["accelerator_slots"] == int(0.17 * 26 * 64) and record["window"] == 3
        assert f"{record['tokens_per_second']:.2f}" in result.stdout
    assert {"speed.png", "time.png", "hits.png"} == {file.name for file in plots.iterdir()}
    said = " ".join(result.stdout.split())
    for words in (
        "acceptance is assumed: 0.8 for each draft, drawn with seed 0; rejected drafts have the routing of",
        "no prompts were recorded",
        "host_bandwidth was not published",
        "routing: a test",
    ):
        assert words in said
    again = tmp_path / "again.json"
    simulate(trace, "--cache", "17%", "--window", 3, "--tokens", 4, "--json", again, "--jobs", 2)
    assert again.read_text() == file.read_text()


def test_some_policies_some_sequences(trace: Path, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    result = simulate(
        trace, "--policies", "lru, llama.cpp,lru", "--sequences", 1, "--draft", "none", "--json", file
    )
    assert result.exit_code == 0, result.output
    lru, llama = json.loads(file.read_text())
    assert (lru["policy"], llama["policy"]) == ("lru", "llama.cpp")
    assert lru["tokens"] == 8 and lru["drafted"] == 0 and lru["share_of_belady"] is None
    assert "nothing is drafted" in result.stdout


def test_a_timeline_is_written(trace: Path, tmp_path: Path) -> None:
    file = tmp_path / "timeline.json"
    both = {"trunk", "host experts", "accelerator experts"}
    for policy, wanted in (("moe-spac", {*both, "storage 1"}), ("llama.cpp+sd", {*both, "draft"})):
        result = simulate(trace, "--policies", policy, "--tokens", 2, "--timeline", file)
        assert result.exit_code == 0, result.output
        events = json.loads(file.read_text())["traceEvents"]
        assert wanted <= {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert any(event["ph"] == "X" and event["name"] == "draft" for event in events)
    assert "--timeline shows one policy" in refused(simulate(trace, "--timeline", file))


def test_a_machine_without_accelerator_caches_in_host_memory(trace: Path, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    result = simulate(
        trace, "--hardware", "laptop-cpu-nvme", "--policies", "lru", "--tokens", 2, "--json", file
    )
    assert result.exit_code == 0, result.output
    (record,) = json.loads(file.read_text())
    assert record["link_bytes"] == 0 < record["storage_bytes"]
    assert (record["host_slots"], record["accelerator_slots"]) == (26 * 64 // 4, 0)


def test_a_cache_that_does_not_fit_is_said(trace: Path) -> None:
    arguments = ("--policies", "llama.cpp", "--tokens", 1, "--cache", "100%")
    assert "lacks" in simulate(trace, *arguments, "--hardware", "rtx3060-12gb").stdout
    assert "lacks" not in simulate(trace, *arguments, "--hardware", "h100-pcie5").stdout


@pytest.mark.parametrize("cache", ["0%", "0.0%", "101%", "-5%", "25", "nan%", ""])
def test_a_cache_that_is_no_share_is_refused(trace: Path, cache: str) -> None:
    assert "--cache" in refused(simulate(trace, f"--cache={cache}"))


def test_what_does_not_fit_or_exist_is_refused(trace: Path, tmp_path: Path) -> None:
    error = refused(simulate(trace, "--model-shape", "qwen3-30b-a3b-f16"))
    assert "26 layers of 64 experts, top 6" in error and "qwen3-30b-a3b-f16 48 of 128, top 8" in error
    assert "rtx9090" in refused(simulate(trace, "--hardware", "rtx9090"))
    assert "gpt-9" in refused(simulate(trace, "--model-shape", "gpt-9"))
    assert "'bealdy'" in refused(simulate(trace, "--policies", "lru,bealdy"))
    assert "--acceptance" in refused(simulate(trace, "--acceptance", "1.5"))
    assert "--window" in refused(simulate(trace, "--window", "-1"))
    assert "none; give at least 0.07%" in refused(simulate(trace, "--cache", "0.01%"))
    assert "cannot be written" in refused(simulate(trace, "--json", tmp_path / "no" / "f.json"))
    cut = tmp_path / "cut.npz"
    cut.write_bytes(trace.read_bytes()[:-200])
    assert "cut.npz" in refused(simulate(cut))
    assert "no such file" in refused(simulate(tmp_path / "absent.npz"))


def test_plots_without_matplotlib_say_how_to_install_it(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = simulate(trace, "--policies", "llama.cpp", "--tokens", 1, "--plots", tmp_path)
    assert result.exit_code == 2 and "pip install 'moespac[plots]'" in result.stderr


def test_the_papers_table(trace: Path, tmp_path: Path) -> None:
    file = tmp_path / "paper.json"
    arguments = ("--model-shape", SHAPE, "--cache", "17%", "--tokens", 4, "--jobs", 1, "--json", file)
    result = run("bench", "paper", "--trace", trace, *arguments, "--plots", tmp_path)
    assert result.exit_code == 0, result.output
    (table,) = json.loads(file.read_text())
    rows = {row["policy"]: row for row in table["rows"]}
    assert set(rows) == {*SIMULATOR_POLICIES, "moe-spac, fixed K", "moe-spac, K = 0"}
    assert list(rows["lru"]["categories"]) == ["mt_bench", "humaneval"]
    assert rows["moe-spac"]["published"] == 25.06 and rows["lru"]["published"] is None
    assert rows["moe-spac, K = 0"]["categories"]["humaneval"]["drafted"] == 0
    speeds = {name: row["tokens_per_second"] for name, row in rows.items()}
    ours, best = speeds["moe-spac"], table["best_speculative"]
    assert table["over_best_speculative"] == pytest.approx(ours / speeds[best])
    assert speeds[best] == max(
        speeds[name] for name in ("llama.cpp+sd", "sp-moe", "specter", "lru", "lfu", "arc")
    )
    assert table["share_of_bound"] == pytest.approx(ours / speeds["belady"])
    for words in ("mt_bench", "humaneval", "25.06", "17.66", "15.23", "12.15", "1.42", "4.04", "█"):
        assert words in result.stdout
    assert (tmp_path / "paper-17.png").exists()


def test_published_figures_beside_simulated_ones(tmp_path: Path) -> None:
    """A few tokens: what is fitted must fit, the other rows only need to be there."""
    file = tmp_path / "validity.json"
    result = run("bench", "validity", "--tokens", 2, "--sequences", 1, "--jobs", 1, "--json", file)
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())
    for row in rows:
        assert row["ratio"] == pytest.approx(row["simulated"] / row["published"])
    fits = {row["machine"]: row["ratio"] for row in rows if row["system"] == "llama.cpp"}
    assert fits == pytest.approx({"rtx4090-pcie4": 1, "rtx5070ti-16gb": 1}, abs=0.02)
    python, native = (row["simulated"] for row in rows if row["system"] == "hybrimoe")
    assert python < native
    assert "12.15" in result.stdout and "118.80" in result.stdout


def test_each_part_is_taken_out(trace: Path, tmp_path: Path) -> None:
    file = tmp_path / "ablation.json"
    arguments = ("--model-shape", SHAPE, "--cache", "17%", "--tokens", 6, "--window", 2, "--jobs", 1)
    result = run("bench", "ablation", trace, *arguments, "--json", file)
    assert result.exit_code == 0, result.output
    rows = {row["without"]: row for row in json.loads(file.read_text())}
    assert list(rows) == [part.name for part in PARTS]
    assert rows["speculation"]["drafted"] == 0 < rows["governor of K"]["drafted"]
    assert len({(row["seconds"]["total"], row["link_bytes"]) for row in rows.values()}) > 5
    assert "rtx9090" in refused(run("bench", "ablation", trace, "--hardware", "rtx9090"))
