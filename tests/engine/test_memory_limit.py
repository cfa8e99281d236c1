"""A model several times larger than its budget decodes within it: the process's peak memory says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moespac.engine.build import DEMO
from moespac.experts.pack import pack
from moespac.model.inflate import inflate

FACTOR = 16  # 302 MB of experts in bfloat16
MB = 10**6

# A process of its own: the peak of this one would count all tests before.
DECODE = """
import json, sys
import moespac
model, draft, budget = sys.argv[1:]
with moespac.load(model, draft=draft, host_memory=budget, profile=None) as engine:
    summary = engine.generate("Once upon a time there was", max_new_tokens=24).summary
# Not getrusage: its peak begins with that of the process that started this one.
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
print(json.dumps({"peak": peak, "experts": summary.peak_bytes["host"], "tokens": summary.token_ids}))
"""


@pytest.fixture(scope="module")
def inflated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inflated")
    inflate(DEMO / "target", directory / "checkpoint", FACTOR, progress=False)
    pack(directory / "checkpoint", directory / "packed", "bf16", progress=False)
    return directory / "packed"


def decode(model: Path, budget: str) -> dict:
    command = [sys.executable, "-c", DECODE, str(model), str(DEMO / "draft"), budget]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_peak_memory_stays_within_the_budget(inflated: Path) -> None:
    total = FACTOR * 18_874_368  # bytes of the embedded model's experts
    small = decode(DEMO / "target", "100%")  # the same trunk and code, 19 MB of experts
    tight = decode(inflated, "10%")
    whole = decode(inflated, "100%")
    assert tight["tokens"] == whole["tokens"] == small["tokens"]
    assert tight["experts"] <= total // 10
    growth = tight["peak"] - small["peak"]
    assert growth < total // 10 + 40 * MB, f"{growth / MB:.0f} MB more than a model of 19 MB"
    # The measure can fail: without a limit the experts that were touched are there.
    assert whole["peak"] - small["peak"] > whole["experts"] / 2 > 50 * MB
