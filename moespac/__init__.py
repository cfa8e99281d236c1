"""moespac runs Mixture-of-Experts language models on machines whose fast memory is too small.

>>> import moespac
>>> with moespac.load(host_memory="25%") as engine:
...     print(engine.generate("def fibonacci(n):", max_new_tokens=32).text)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moespac.errors import (
    CheckpointError,
    ConfigError,
    DeviceMemoryError,
    DraftError,
    ModelError,
    MoespacError,
    PackError,
    StorageError,
)

if TYPE_CHECKING:
    from moespac.engine.build import load
    from moespac.engine.engine import Engine, Generation

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DeviceMemoryError",
    "DraftError",
    "Engine",
    "Generation",
    "ModelError",
    "MoespacError",
    "PackError",
    "StorageError",
    "__version__",
    "load",
]

# Imported when first asked for: torch and transformers take seconds, and `moespac --help` needs neither.
_LAZY = {
    "load": "moespac.engine.build",
    "Engine": "moespac.engine.engine",
    "Generation": "moespac.engine.engine",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
