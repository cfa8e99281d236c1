"""A wider model that computes the same function: real routing at any expert size.

Net2WiderNet (Chen, Goodfellow, Shlens 2016, arXiv 1511.05641) for experts: every intermediate neuron is
replicated ``factor`` times and what leaves it is divided by ``factor``. The router sees the same inputs, so
routing, outputs and acceptance stay as they are (up to rounding) while each expert's bytes grow.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from moespac.atomic import sync_directory
from moespac.config import PackConfig
from moespac.errors import ConfigError, ModelError, PackError
from moespac.model.index import ExpertIndex, Role, build_index
from moespac.model.safetensors import TensorEntry
from moespac.model.safetensors_writer import TensorStream, copy_stream, read_chunks, write_safetensors
from moespac.model.side_files import side_files
from moespac.model.skeleton import Skeleton, build_skeleton
from moespac.progress import ProgressOption, progress_over


def inflate(
    source: Path,
    destination: Path,
    factor: int,
    progress: ProgressOption = True,
    config: PackConfig | None = None,
) -> None:
    """Write ``source`` with experts ``factor`` times as wide to ``destination``, a new directory.

    Exact in arithmetic; a factor that is a power of two adds no rounding to the weights. Raises ConfigError
    for a factor below 1 or a destination that exists, ModelError for a family whose experts cannot be widened
    by themselves, PackError when writing fails.
    """
    config = config or PackConfig()
    if not isinstance(factor, int) or factor < 1:
        raise ConfigError(f"inflate by {factor}: give a whole number of 1 or more")
    if destination.exists():
        raise ConfigError(f"{destination}: exists already; name a new directory")
    skeleton = build_skeleton(source)
    index = build_index(source, skeleton)
    destination.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=destination.parent, prefix=f".{destination.name}."))
    try:
        for file in side_files(source):
            shutil.copyfile(file, staging / file.name)
        _widen_config(staging, skeleton, factor)
        _write_weights(index, skeleton, factor, staging, progress, config)
        staging.chmod(0o755)  # mkdtemp makes it private
        sync_directory(staging)
        os.rename(staging, destination)
        sync_directory(destination.parent)
    except OSError as error:
        raise PackError(
            f"{destination}: not written ({error}); solve that and run the same command again"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # gone by then when all went well


# ---- configuration -----------------------------------------------------------------------------------


def _widen_config(directory: Path, skeleton: Skeleton, factor: int) -> None:
    """Multiply the configuration's key that sets the experts' width, and only theirs.

    Which key that is differs by family (moe_intermediate_size, intermediate_size ...), so each that has the
    experts' width is tried: the right one changes the experts' parameters and nothing else.
    """
    file = directory / "config.json"
    original = file.read_text()
    wanted = _wide_shapes(skeleton, factor)
    for key in _width_keys(skeleton):
        data = json.loads(original)
        section = data.get("text_config", data)
        section[key] = _width(skeleton) * factor
        file.write_text(json.dumps(data, indent=2))
        if _shapes(build_skeleton(directory)) == wanted:
            return
    raise ModelError(
        f"{skeleton.config.model_type}: its dense layers or shared experts share the experts' width, "
        "so the experts cannot be widened by themselves; take another family"
    )


def _width_keys(skeleton: Skeleton) -> list[str]:
    """Configuration keys that hold the experts' width, those named after experts first."""
    config = skeleton.config.get_text_config().to_dict()
    keys = [
        key
        for key, value in config.items()
        if value == _width(skeleton) and _WIDTH_WORDS & set(key.split("_"))
    ]
    return sorted(keys, key=lambda key: not {"moe", "expert"} & set(key.split("_")))


_WIDTH_WORDS = {"intermediate", "ffn", "moe", "expert"}


def _width(skeleton: Skeleton) -> int:
    """Intermediate neurons of one expert."""
    module = next(iter(skeleton.experts.values()))
    shape = module.get_parameter("down_proj").shape
    return shape[1 if module.is_transposed else 2]


def _shapes(skeleton: Skeleton) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in skeleton.model.named_parameters()}


def _wide_shapes(skeleton: Skeleton, factor: int) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters once the experts are widened."""
    shapes = _shapes(skeleton)
    for path, module in skeleton.experts.items():
        for name in skeleton.expert_parameters():
            shape = list(shapes[f"{path}.{name}"])
            axis = _neuron_axis(name, bool(module.is_transposed))
            if axis is not None:
                shape[axis] *= factor
            shapes[f"{path}.{name}"] = tuple(shape)
    return shapes


# ---- weights -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Widening:
    """How one stored expert tensor is widened along the axis of its intermediate neurons."""

    axis: int  # -1 or -2, counted from behind: fused tensors have the experts in front
    halves: int  # 2: gate and up lie one after the other along the axis
    factor: int
    divide: bool  # this tensor carries what leaves the neurons

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        wide = list(shape)
        wide[self.axis] *= self.factor
        return tuple(wide)

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """Repeat all neurons one after the other, gate and up each for themselves.

        Interleaved gates and ups are repeated as pairs by the same rule, and a down projection in the same
        order.
        """
        parts = weight.chunk(self.halves, dim=self.axis)
        wide = torch.cat([part for half in parts for part in [half] * self.factor], dim=self.axis)
        return (wide / self.factor).to(weight.dtype) if self.divide else wide


def _neuron_axis(name: str, transposed: bool) -> int | None:
    """The axis of a tensor named ``name`` that counts intermediate neurons; None: it has none."""
    if name.endswith("_bias"):
        return None if name.startswith("down_proj") else -1
    out_axis, in_axis = (-1, -2) if transposed else (-2, -1)
    return in_axis if name.startswith("down_proj") else out_axis


def _write_weights(
    index: ExpertIndex,
    skeleton: Skeleton,
    factor: int,
    directory: Path,
    progress: ProgressOption,
    config: PackConfig,
) -> None:
    streams = [_stream(index, skeleton, entry, factor, config) for entry in index.entries.values()]
    shards = _shards(streams, config.shard_bytes)
    with progress_over(sum(stream.nbytes for stream in streams), "inflate", progress) as advance:
        for number, shard in enumerate(shards, start=1):
            write_safetensors(directory / _shard_name(number, len(shards)), shard, advance)
    if len(shards) > 1:
        _write_shard_index(directory, shards)


def _stream(
    index: ExpertIndex, skeleton: Skeleton, entry: TensorEntry, factor: int, config: PackConfig
) -> TensorStream:
    """The tensor as the wide checkpoint has it, under the same key."""
    role = index.roles.get(entry.key)
    widening = _widening(index, skeleton, role, factor) if role else None
    if role is None or widening is None:
        return copy_stream(entry, config.copy_bytes)
    experts = index.experts if role.expert < 0 else 1
    return TensorStream(
        entry.key, entry.dtype, widening.shape(entry.shape), _widened(entry, experts, widening)
    )


def _widening(index: ExpertIndex, skeleton: Skeleton, role: Role, factor: int) -> _Widening | None:
    tensor = next(tensor for tensor in index.tensors if tensor.name == role.tensor)
    axis = _neuron_axis(tensor.name, tensor.transposed)
    if axis is None:
        return None
    module = next(iter(skeleton.experts.values()))
    both = tensor.name.startswith("gate_up_proj") and role.parts == 1 and module.is_concatenated
    return _Widening(axis, 2 if both else 1, factor, divide=tensor.name == "down_proj")


def _widened(entry: TensorEntry, experts: int, widening: _Widening) -> Callable[[], Iterator[memoryview]]:
    """Widened bytes, one expert at a time: fused tensors are larger than memory."""
    shape = (1, *entry.shape[1:]) if experts > 1 else entry.shape

    def chunks() -> Iterator[memoryview]:
        for chunk in read_chunks(entry, entry.nbytes // experts):
            weight = torch.frombuffer(bytearray(chunk), dtype=entry.dtype).view(shape)
            wide = widening.apply(weight).contiguous()
            yield wide.view(torch.uint8).numpy().data

    return chunks


def _shards(streams: list[TensorStream], limit: int) -> list[list[TensorStream]]:
    """In order, as many tensors a file as fit under ``limit`` bytes, at least one."""
    shards: list[list[TensorStream]] = [[]]
    size = 0
    for stream in streams:
        if shards[-1] and size + stream.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(stream)
        size += stream.nbytes
    return shards


def _shard_name(number: int, of: int) -> str:
    return "model.safetensors" if of == 1 else f"model-{number:05d}-of-{of:05d}.safetensors"


def _write_shard_index(directory: Path, shards: list[list[TensorStream]]) -> None:
    weight_map = {
        stream.key: _shard_name(number, len(shards))
        for number, shard in enumerate(shards, start=1)
        for stream in shard
    }
    total = sum(stream.nbytes for shard in shards for stream in shard)
    data = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(data, indent=2))
