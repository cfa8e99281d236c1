"""A machine as the simulator sees it: bytes a second, operations a second, and what no bandwidth explains.

Every figure is what programs reach, not what a datasheet promises, and says where it comes from. Profiles of
machines that we do not own are in ``profiles/``; ``moespac profile`` measures this one.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from moespac.errors import ConfigError
from moespac.sim.shapes import FORMATS, SimModel

Curve = tuple[tuple[int, float], ...]  # (tokens, seconds per weight), tokens rising from 1

_SHIPPED = Path(__file__).parent / "profiles"
_OPERATIONS = 2  # a multiplication and an addition for each weight and token
_MAY_BE_ZERO = (
    "host_expert_overhead",
    "layer_overhead",
    "decide_overhead",
    "cache_overhead",
    "ask_overhead",
    "storage_latency",
    "storage_slowdown",
    "expert_slowdown",
    "accelerator_memory",
    "accelerator_launch",
    "link_latency",
)
_BELOW_ONE = ("storage_slowdown", "expert_slowdown")
_KINDS: dict[str, Any] = {"str": str, "bool": bool, "int": int, "float": (int, float)}


class Rates(NamedTuple):
    """Shares of their own full speed at which two users of the host's memory run side by side."""

    host: float
    link: float


@dataclass(frozen=True)
class HardwareProfile:
    """One machine. Bytes, seconds, bytes/s, operations/s; without an accelerator its fields and the link's are 0.

    Raises ConfigError for a figure that cannot be.
    """

    name: str
    host_memory: int
    host_bandwidth: float  # at which all threads together read weights
    host_flops: float  # of all threads, in an expert's matrices
    host_expert_overhead: float  # of each expert on the host: calls and small operations
    layer_overhead: float  # of each layer and pass: launches, reading the router, deciding, joining
    storage_bandwidth: float  # of random reads of whole records at ``storage_depth``
    storage_latency: float  # of a read before its bytes flow; reads in flight together wait for it together
    storage_depth: int  # reads in flight that reach the bandwidth; more do not help
    storage_slowdown: float = 0.0  # share of its speed that it loses while the host computes experts ...
    expert_slowdown: float = 0.0  # ... and they while it is read; both where no accelerator holds experts
    accelerator_memory: int = 0  # 0: there is none
    accelerator_bandwidth: float = 0.0
    accelerator_flops: float = 0.0
    accelerator_launch: float = 0.0  # of each expert on the accelerator
    link_bandwidth: float = 0.0  # pinned host memory to accelerator
    link_latency: float = 0.0
    decide_overhead: float = 0.0  # beyond that while memory lacks experts: where a policy plans each pass ...
    cache_overhead: float = 0.0  # ... where, without an accelerator, it is a cache that only uses change ...
    ask_overhead: float = 0.0  # ... and where, without an accelerator, each layer asks it
    link_shares_host_memory: bool = True  # a copy reads the very memory that the CPU's experts read
    host_seconds_per_weight: Mapping[str, Curve] = field(default_factory=dict)  # measured, by record format
    sources: Mapping[str, str] = field(default_factory=dict)  # where each figure comes from

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type in _KINDS and not self._is_possible(item.name, str(item.type), value):
                raise ConfigError(
                    f"hardware profile {self.name}: {item.name} cannot be {value!r}; correct it"
                )
        for format, curve in self.host_seconds_per_weight.items():
            if format not in FORMATS or not _is_curve(curve):
                raise ConfigError(
                    f"hardware profile {self.name}: host_seconds_per_weight of {format!r} is no rising list of"
                    " [tokens, seconds] from 1 token; measure again with `moespac profile`"
                )

    @property
    def has_accelerator(self) -> bool:
        return self.accelerator_memory > 0

    def expert_host_seconds(self, model: SimModel, tokens: int) -> float:
        """One expert's FFN on the host for ``tokens`` (1 or more), its weights in memory but in no cache.

        As measured, where its format was; else a roofline: the weights are read once, or arithmetic takes longer.
        """
        curve = self.host_seconds_per_weight.get(model.format)
        if curve is not None:
            return self.host_expert_overhead + model.expert_weights * _interpolate(curve, tokens)
        return self.host_expert_overhead + self._host_roofline(
            model.expert_bytes, model.expert_weights, tokens
        )

    def expert_accelerator_seconds(self, model: SimModel, tokens: int) -> float:
        """The same on the accelerator, its weights being there."""
        return self.accelerator_launch + self._accelerator_roofline(
            model.expert_bytes, model.expert_weights, tokens
        )

    def link_seconds(self, nbytes: int) -> float:
        """One copy from host to accelerator that has the link to itself."""
        assert self.has_accelerator
        return self.link_latency + nbytes / self.link_bandwidth

    def storage_seconds(self, nbytes: int) -> float:
        """One read that has the device to itself. Of n together, each waits the latency, and all share the rest."""
        return self.storage_latency + nbytes / self.storage_bandwidth

    def trunk_seconds(self, model: SimModel, tokens: int, on_accelerator: bool) -> float:
        """All of a pass over ``tokens`` but the routed experts, every layer's overhead included."""
        roofline = self._accelerator_roofline if on_accelerator else self._host_roofline
        return model.layers * self.layer_overhead + roofline(model.trunk_bytes, model.trunk_weights, tokens)

    def draft_seconds(self, draft_bytes: int) -> float:
        """One drafted token of a dense draft model: every weight is read once, where the trunk is."""
        bandwidth = self.accelerator_bandwidth if self.has_accelerator else self.host_bandwidth
        return draft_bytes / bandwidth

    def rates_together(self) -> Rates:
        """How fast experts on the host and copies over the link run while both do.

        They share the host's memory max-min fairly: neither gets more than half while the other wants it.
        """
        if not (self.has_accelerator and self.link_shares_host_memory):
            return Rates(1.0, 1.0)
        half = self.host_bandwidth / 2
        link = min(self.link_bandwidth, half)
        return Rates((self.host_bandwidth - link) / self.host_bandwidth, link / self.link_bandwidth)

    def to_json(self) -> dict[str, Any]:
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        curves = {
            format: [list(point) for point in curve] for format, curve in self.host_seconds_per_weight.items()
        }
        return plain | {"host_seconds_per_weight": curves, "sources": dict(self.sources)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> HardwareProfile:
        """Raises ConfigError for a field that is missing, unknown or impossible."""
        try:
            curves = {
                format: tuple((int(tokens), float(seconds)) for tokens, seconds in curve)
                for format, curve in data.get("host_seconds_per_weight", {}).items()
            }
            return HardwareProfile(**{**data, "host_seconds_per_weight": curves})
        except (TypeError, ValueError, AttributeError) as error:
            reason = str(error).replace("HardwareProfile.__init__() ", "")
            raise ConfigError(
                f"the hardware profile cannot be used ({reason}); measure it again with `moespac profile`"
            ) from None

    def _host_roofline(self, nbytes: int, weights: int, tokens: int) -> float:
        return max(nbytes / self.host_bandwidth, tokens * weights * _OPERATIONS / self.host_flops)

    def _accelerator_roofline(self, nbytes: int, weights: int, tokens: int) -> float:
        assert self.has_accelerator
        return max(
            nbytes / self.accelerator_bandwidth, tokens * weights * _OPERATIONS / self.accelerator_flops
        )

    def _is_possible(self, name: str, kind: str, value: Any) -> bool:
        """Numbers are finite and above 0; 0 too for what may cost nothing, and where there is no accelerator."""
        if not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind != "bool"):
            return False
        if kind in ("str", "bool"):
            return True
        if name in _BELOW_ONE and value >= 1:
            return False
        absent = name.startswith(("accelerator_", "link_")) and not self.has_accelerator
        return math.isfinite(value) and (value > 0 or (value == 0 and (absent or name in _MAY_BE_ZERO)))


def profile_names() -> tuple[str, ...]:
    """The machines that come with moespac."""
    return tuple(sorted(file.stem for file in _SHIPPED.glob("*.json")))


def find_profile(source: str) -> HardwareProfile:
    """A profile by name (one of ``profile_names()``) or by the path of a file that ``moespac profile`` wrote.

    Raises ConfigError for an unknown name and for a file that is no profile.
    """
    file = _SHIPPED / f"{source}.json" if source in profile_names() else Path(source)
    try:
        data = json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"hardware {source}: cannot be read ({error.strerror}); give the file of a profile, or one of "
            f"{', '.join(profile_names())}"
        ) from None
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise ConfigError(f"hardware {source}: is not a profile; write one with `moespac profile`")
    return HardwareProfile.from_json(data)


def _interpolate(curve: Curve, tokens: int) -> float:
    """Linear between the points, and on along the last piece: there it is arithmetic that counts."""
    assert tokens >= 1
    right = min(max(bisect_right(curve, (tokens, math.inf)), 1), len(curve) - 1)
    (x0, y0), (x1, y1) = curve[right - 1], curve[right]
    return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)


def _is_curve(curve: Curve) -> bool:
    tokens, seconds = [point[0] for point in curve], [point[1] for point in curve]
    return (
        len(curve) >= 2
        and tokens[0] == 1
        and all(a < b for a, b in pairwise(tokens))
        and all(math.isfinite(s) and s > 0 for s in seconds)
        and seconds[0] <= seconds[-1]
    )
