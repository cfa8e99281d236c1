"""Which processor this is."""

from __future__ import annotations

import os
from pathlib import Path


def describe_processor() -> list[str]:
    """Its model, where the system says it, and how many cores there are."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return [name, str(os.cpu_count())]
