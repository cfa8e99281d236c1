"""Simulating never loads torch."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import moespac.sim


def test_simulating_and_its_benches_do_not_load_torch() -> None:
    names = [module.name for module in pkgutil.walk_packages(moespac.sim.__path__, "moespac.sim.")]
    assert "moespac.sim.simulator" in names
    names += ["moespac.bench.paper", "moespac.cli.simulate", "moespac.cli.bench_paper"]
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
