"""Who runs: this engine under every policy, each as the system that it stands for decodes.

A baseline whose system speculates drafts a fixed number of tokens, and runs without drafts too; moe-spac's governor
chooses, and it runs with a fixed number and without drafts too. Names are those of ``moespac bench paper``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from moespac.bench.paper import OURS, OURS_PLAIN, OURS_UNGOVERNED, STANDARD
from moespac.errors import ConfigError
from moespac.policy.registry import ENGINE_POLICIES

OFFLOAD = "transformers + accelerate"
COMPILED = "transformers, compiled"
LLAMA = "llama.cpp, CUDA"
PROGRAMS = (OFFLOAD, COMPILED, LLAMA)  # others', by themselves
RESIDENT = "moe-spac, all resident"

_PLAIN = ", K = 0"
_OURS_ALL = (OURS, OURS_PLAIN, OURS_UNGOVERNED)
_SPECULATIVE = (
    "llama.cpp+sd",
    "sp-moe",
    "specter",
    "lru",
    "lfu",
    "arc",
)  # baselines' candidates for the fastest


@dataclass(frozen=True)
class Contender:
    """One policy, and how it drafts."""

    name: str
    policy: str
    window: int | Literal["auto"]  # K

    @property
    def is_ours(self) -> bool:
        return self.policy == OURS


def all_contenders(window: int) -> list[Contender]:
    """Every one, those first that the goals are about. ``window``: K where it is fixed."""
    names = [*_OURS_ALL, *STANDARD, *_SPECULATIVE]
    rest = [name for policy in ENGINE_POLICIES for name in (policy, policy + _PLAIN)]
    known = {name: contender(name, window) for name in [*names, *rest] if _exists(name)}
    return list(known.values())


def main_contenders(window: int) -> list[Contender]:
    """Those that the goals are about and no more: ours, the paper's baselines, and the fastest that speculate."""
    names = [OURS, OURS_PLAIN, *STANDARD, *_SPECULATIVE]
    return [contender(name, window) for name in dict.fromkeys(names)]


def contender(name: str, window: int) -> Contender:
    """Raises ConfigError for a name that is not known."""
    if name in (OURS, OURS_UNGOVERNED):
        return Contender(name, OURS, "auto" if name == OURS else window)
    if not _exists(name):
        raise ConfigError(f"--contenders {name}: is not known; give some of {', '.join(sorted(_names()))}")
    policy = name.removesuffix(_PLAIN)
    return Contender(name, policy, window if policy == name and _speculates(policy) else 0)


def _names() -> set[str]:
    return {*_OURS_ALL, *(n for policy in ENGINE_POLICIES for n in (policy, policy + _PLAIN) if _exists(n))}


def _exists(name: str) -> bool:
    """Whether it is a policy, and says "K = 0" only where its system would draft."""
    policy = name.removesuffix(_PLAIN)
    if name == OURS_UNGOVERNED:
        return True
    return (
        policy in ENGINE_POLICIES
        and (policy == name or _speculates(policy))
        and name != "llama.cpp+sd, K = 0"
    )


def _speculates(policy: str) -> bool:
    factory: Any = ENGINE_POLICIES[policy]
    return factory.speculates
