"""(layer, expert) -> the bytes of a checkpoint's safetensors files, for any family of the experts interface.

No table per family: transformers itself knows how each family's checkpoint keys become the stacked parameters
of its experts module (its conversion mapping), and we ask it. That API is semi-private; the supported range
of transformers is pinned in pyproject.toml and tests/model/test_index.py tries every family we name.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from moespac.errors import CheckpointError, ModelError
from moespac.model.safetensors import TensorEntry, read_checkpoint_headers
from moespac.model.skeleton import Skeleton, build_skeleton


class Part(NamedTuple):
    """A range of bytes in one of the checkpoint's files."""

    file: Path
    offset: int
    nbytes: int


class Role(NamedTuple):
    """What a checkpoint key holds of the experts."""

    tensor: str  # parameter of the experts module, "gate_up_proj"
    part: int  # which of the tensors that are concatenated into it (0: gate, 1: up)
    parts: int  # how many there are
    layer: int
    expert: int  # -1: all experts, fused along dimension 0


@dataclass(frozen=True)
class ExpertTensor:
    """One tensor of one expert, as the checkpoint stores it."""

    name: str
    shape: tuple[int, ...]  # as stored, the parts concatenated
    dtype: torch.dtype
    transposed: bool  # stored (in, out) instead of (out, in)


@dataclass(frozen=True)
class ExpertIndex:
    """Where every expert of a checkpoint lies."""

    source: Path
    tensors: tuple[ExpertTensor, ...]
    layers: int
    experts: int
    top_k: int
    roles: dict[str, Role]  # checkpoint key -> what it holds; keys that are not here belong to the trunk
    entries: dict[str, TensorEntry]  # every key of the checkpoint
    _parts: dict[tuple[int, int, str], tuple[Part, ...]]  # (layer, expert, tensor)

    def parts(self, layer: int, expert: int) -> tuple[tuple[Part, ...], ...]:
        """For each of ``tensors``, the byte ranges that make up this expert's, to be concatenated in order."""
        return tuple(self._parts[layer, expert, tensor.name] for tensor in self.tensors)

    @property
    def expert_bytes(self) -> int:
        return sum(part.nbytes for parts in self.parts(0, 0) for part in parts)

    @property
    def expert_keys(self) -> set[str]:
        return set(self.roles)

    @property
    def trunk_keys(self) -> list[str]:
        return [key for key in self.entries if key not in self.roles]

    @property
    def fingerprint(self) -> str:
        """A short hash of what is where; it changes with any file's size or header, without reading data."""
        digest = hashlib.sha256()
        for key, entry in sorted(self.entries.items()):
            size = entry.file.stat().st_size
            row = [key, entry.file.name, size, entry.offset, str(entry.dtype), *entry.shape]
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()[:16]


def build_index(path: Path, skeleton: Skeleton | None = None) -> ExpertIndex:
    """Index the checkpoint in ``path``.

    Raises ModelError when the family's conversion is not one we can express as byte ranges, CheckpointError
    when files are damaged or an expert is missing.
    """
    skeleton = skeleton or build_skeleton(path)
    entries = read_checkpoint_headers(path)
    conversions = get_model_conversion_mapping(skeleton.model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    meta = skeleton.model.state_dict()
    targets = {
        f"{module}.{name}": (layer, name)
        for layer, module in enumerate(skeleton.experts)
        for name in skeleton.expert_parameters()
    }

    groups: dict[tuple[str, str | None], list[str]] = defaultdict(list)  # (target, source pattern) -> keys
    for key in sorted(entries, key=dot_natural_key):
        target, pattern = rename_source_key(
            key, renamings, converters, skeleton.model.base_model_prefix, meta
        )
        if target in targets:
            groups[target, pattern].append(key)

    roles: dict[str, Role] = {}
    transposed: dict[str, bool] = {}
    is_transposed = next(iter(skeleton.experts.values())).is_transposed
    for (target, pattern), keys in groups.items():
        layer, name = targets[target]
        converter = by_pattern[pattern] if pattern is not None else None
        merged, flipped = _understand(converter, skeleton.config.model_type)
        transposed[name] = flipped != (is_transposed and not name.endswith("_bias"))
        part = converter.source_patterns.index(pattern) if converter and pattern else 0
        parts = len(converter.source_patterns) if converter else 1
        for number, key in enumerate(keys):
            roles[key] = Role(name, part, parts, layer, number if merged else -1)

    parts_of = _collect_parts(roles, entries, skeleton.num_experts)
    tensors = tuple(
        _expert_tensor(name, transposed.get(name, False), roles, entries)
        for name in skeleton.expert_parameters()
    )
    index = ExpertIndex(
        source=path,
        tensors=tensors,
        layers=len(skeleton.experts),
        experts=skeleton.num_experts,
        top_k=skeleton.top_k,
        roles=roles,
        entries=entries,
        _parts=parts_of,
    )
    _check_complete(index)
    return index


def _understand(converter: WeightConverter | None, family: str) -> tuple[bool, bool]:
    """(are experts stored one tensor each, is the last pair of dimensions flipped on disk)."""
    if converter is None:
        return False, False
    merged = flipped = False
    for operation in converter.operations:
        match operation:
            case MergeModulelist(dim=0):
                merged = True
            case Concatenate(dim=1):
                pass  # gate rows, then up rows: the order of the source patterns
            case Transpose(dim0=1, dim1=2):
                flipped = True
            case _:
                raise ModelError(f"{family}: its checkpoint conversion ({operation}) is not supported yet")
    return merged, flipped


def _collect_parts(
    roles: dict[str, Role], entries: dict[str, TensorEntry], experts: int
) -> dict[tuple[int, int, str], tuple[Part, ...]]:
    found: dict[tuple[int, int, str], dict[int, Part]] = defaultdict(dict)
    for key, role in roles.items():
        entry = entries[key]
        if role.expert >= 0:
            found[role.layer, role.expert, role.tensor][role.part] = Part(
                entry.file, entry.offset, entry.nbytes
            )
            continue
        each = entry.nbytes // experts
        for expert in range(experts):
            part = Part(entry.file, entry.offset + expert * each, each)
            found[role.layer, expert, role.tensor][role.part] = part
    return {place: tuple(parts[i] for i in sorted(parts)) for place, parts in found.items()}


def _expert_tensor(
    name: str, transposed: bool, roles: dict[str, Role], entries: dict[str, TensorEntry]
) -> ExpertTensor:
    first: dict[int, TensorEntry] = {}  # one source tensor for each part
    fused = False
    for key, role in roles.items():
        if role.tensor == name and role.part not in first:
            first[role.part] = entries[key]
            fused = role.expert < 0
    if not first:
        raise CheckpointError(f"the checkpoint holds no {name} of any expert; download it again")
    shapes = [entry.shape[1:] if fused else entry.shape for entry in first.values()]
    shape = (sum(s[0] for s in shapes), *shapes[0][1:])
    return ExpertTensor(name, shape, next(iter(first.values())).dtype, transposed)


def _check_complete(index: ExpertIndex) -> None:
    sizes = [torch.Size(t.shape).numel() * t.dtype.itemsize for t in index.tensors]
    for layer in range(index.layers):
        for expert in range(index.experts):
            for tensor, size in zip(index.tensors, sizes, strict=True):
                parts = index._parts.get((layer, expert, tensor.name), ())
                if sum(part.nbytes for part in parts) != size:
                    raise CheckpointError(
                        f"{index.source}: expert {expert} of MoE layer {layer} has no complete {tensor.name}; "
                        "download the checkpoint again"
                    )
