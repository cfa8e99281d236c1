"""Deciding never loads torch: the simulator and the trace tools start at once."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import moespac.policy


def test_policies_and_their_benches_do_not_load_torch() -> None:
    names = [module.name for module in pkgutil.walk_packages(moespac.policy.__path__, "moespac.policy.")]
    assert "moespac.policy.baselines.lru" in names
    names += ["moespac.types", "moespac.config", "moespac.bench.decisions", "moespac.bench.coverage"]
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
