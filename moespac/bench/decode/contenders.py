"""Who runs, by name.

``llama.cpp``, ``llama.cpp+draft``, ``llama.cpp+lookup``: through llama-cpp-python, the file mapped (mmap).
``llama.cpp-ram``, with ``+draft`` or ``+lookup``: the same, loaded into memory; only where everything fits.
``transformers``: all in memory, in bfloat16; ``transformers+disk``: what does not fit is left to accelerate.
Every other name is a policy of this engine (``moe-spac``, ``lru``, ``hybrimoe`` ...) on its own, or with ``+draft``
(the embedded draft model) or ``+lookup`` (prompt lookup). moe-spac then governs K; the baselines have it fixed, and
``@2`` at the end fixes it too: what the governor is measured by.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from moespac.errors import ConfigError
from moespac.policy.planner import MoeSpacPolicy
from moespac.policy.registry import ENGINE_POLICIES

OURS = MoeSpacPolicy.name
DRAFTS = ("none", "draft", "lookup")
PEERS = ("llama.cpp", "llama.cpp-ram", "transformers", "transformers+disk")
DEFAULT = (
    "moe-spac",
    "moe-spac+draft",
    "moe-spac+lookup",
    "lru",
    "lru+draft",
    "hybrimoe+draft",
    "sp-moe+draft",
    "llama.cpp",
    "llama.cpp+draft",
    "llama.cpp-ram",
    "llama.cpp-ram+draft",
    "transformers",
    "transformers+disk",
)
_PACKAGES = {  # what each peer needs besides what moespac itself does: module -> package
    "llama.cpp": {"llama_cpp": "llama-cpp-python", "gguf": "gguf"},
    "llama.cpp-ram": {"llama_cpp": "llama-cpp-python", "gguf": "gguf"},
    "transformers+disk": {"accelerate": "accelerate"},
}


@dataclass(frozen=True)
class Contender:
    """One way to decode."""

    name: str
    system: str  # a peer's name, or a policy's
    draft: str  # one of DRAFTS
    window: int | None = None  # K, where the name fixes it

    @property
    def is_peer(self) -> bool:
        return self.system in PEERS

    @property
    def is_llama(self) -> bool:
        return self.system.startswith("llama.cpp")

    @property
    def missing(self) -> list[str]:
        """Packages that it needs and that are not installed."""
        wanted = _PACKAGES.get(self.system, {})
        return [package for module, package in wanted.items() if find_spec(module) is None]

    def runs_at(self, budget: float) -> bool:
        """Whether it makes sense with room for this share of the experts."""
        if self.system in ("llama.cpp-ram", "transformers"):
            return budget >= 1  # all in memory
        return self.system != "transformers+disk" or budget < 1


def parse_contenders(text: str) -> list[Contender]:
    """A list of names with commas between. Raises ConfigError for one that is not known."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"--contenders {text!r}: names nobody; give some of {', '.join(DEFAULT)}")
    return [_contender(name) for name in dict.fromkeys(names)]


def _contender(name: str) -> Contender:
    if name in ("transformers", "transformers+disk"):
        return Contender(name, name, "none")
    system, _, draft = name.partition("+")
    draft, _, window = draft.partition("@")
    draft = draft or "none"
    if draft in DRAFTS and system in ("llama.cpp", "llama.cpp-ram") and not window:
        return Contender(name, system, draft)
    if draft in DRAFTS and system in _policies() and (not window or (window.isdecimal() and draft != "none")):
        return Contender(name, system, draft, int(window) if window else None)
    known = ", ".join([*PEERS, *sorted(_policies())])
    raise ConfigError(
        f"--contenders {name}: is not known; give one of {known}; all but transformers also with +draft or +lookup,"
        " policies with +draft@2 too, which fixes K"
    )


def _policies() -> set[str]:
    """llama.cpp runs itself; what stands for it elsewhere, the engine's policies of that name, need not."""
    return {name for name in ENGINE_POLICIES if not name.startswith("llama.cpp")}
