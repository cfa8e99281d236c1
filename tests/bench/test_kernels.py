"""``moespac bench kernels`` on a small expert: every contender is checked against float32 before it is timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moespac.bench.kernels import OURS, READ, bench_kernels
from moespac.cli import app
from moespac.config import KernelBenchConfig

SMALL = KernelBenchConfig(tokens=(1, 4), rotate_bytes=1 << 20, rounds=3)


@pytest.mark.parametrize("threads", [1, 2])
def test_times_every_contender_at_every_size(threads: int) -> None:
    done = []
    report = bench_kernels(
        ["int8", "int4", "bf16"], 256, 256, threads, SMALL, lambda *step: done.append(step)
    )
    assert done[-1] == (9, 9)
    for format in ("int8", "int4", "bf16"):
        names = {timing.contender for timing in report.timings if timing.format == format}
        assert {OURS, READ} < names and any(name.startswith("torch") for name in names)
        for tokens in SMALL.tokens:
            ours = report.find(format, OURS, tokens)
            assert ours is not None and 0 < ours.best <= ours.median
            ratio, peers = report.ratio(format, "torch", tokens), report.timings
            best = min(
                t.median
                for t in peers
                if t.format == format and t.tokens == tokens and "torch" in t.contender
            )
            assert ratio == pytest.approx(best / ours.median)
    assert (len(report.left_out) == 1) != any("ggml" in timing.contender for timing in report.timings)


def test_command_refuses_what_it_cannot_time(tmp_path: Path) -> None:
    for arguments in (["--formats", "int5"], ["--hidden", "200"], ["--json", str(tmp_path)]):
        result = CliRunner().invoke(app, ["bench", "kernels", *arguments])
        assert result.exit_code != 0


def test_report_is_json() -> None:
    report = bench_kernels(["f32"], 128, 128, 1, SMALL, lambda *_: None)
    data = json.loads(json.dumps(report.to_dict()))
    assert {row["contender"] for row in data["timings"]} == {OURS, READ, "torch fp32"}
    assert data["isa"] and data["timings"][0]["share_of_read"] > 0
