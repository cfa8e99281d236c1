"""Versions, and what the extras need."""

from __future__ import annotations

import importlib.metadata as metadata
import platform
from collections import defaultdict
from collections.abc import Iterator

from packaging.requirements import Requirement

from moespac.doctor.finding import Finding, Place, bad, ok

_SHOWN = ("torch", "transformers", "tokenizers", "safetensors")


def check_versions(place: Place) -> Iterator[Finding]:
    wanted = {each.name: each for each in _requirements() if each.marker is None}
    shown = [f"Python {platform.python_version()}"]
    for name, requirement in wanted.items():
        version = _version(name)
        if version is None:
            yield bad("software", f"{name} is missing", f"pip install '{requirement}'")
        elif not requirement.specifier.contains(version, prereleases=True):
            yield bad("software", f"{name} {version} is not supported", f"pip install '{requirement}'")
        elif name in _SHOWN:
            shown.append(f"{name} {version}")
    yield ok("software", ", ".join(shown))


def check_extras(place: Place) -> Iterator[Finding]:
    """Nothing is amiss where one is not installed."""
    missing: dict[str, list[str]] = defaultdict(list)
    for extra in metadata.metadata("moespac").get_all("Provides-Extra") or []:
        missing[extra] = [
            each.name
            for each in _requirements()
            if each.marker and each.marker.evaluate({"extra": extra}) and _version(each.name) is None
        ]
    there = [extra for extra, names in missing.items() if not names]
    absent = [f"{extra} (lacks {', '.join(names)})" for extra, names in missing.items() if names]
    what = f"installed: {', '.join(there) or 'none'}"
    yield ok("extras", what + (f"; not installed: {', '.join(absent)}" if absent else ""))


def _requirements() -> list[Requirement]:
    return [Requirement(text) for text in metadata.requires("moespac") or []]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
