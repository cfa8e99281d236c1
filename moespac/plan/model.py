"""What a model is, before any of its weights were read: from a directory, or from the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from moespac.errors import ModelError
from moespac.experts.format import PACK_FORMATS, packed_layout
from moespac.experts.manifest import is_pack, read_manifest
from moespac.model.index import ExpertTensor
from moespac.model.kv_size import KVCache, kv_cache
from moespac.model.skeleton import Skeleton, build_skeleton
from moespac.plan.source import open_source
from moespac.sim.shapes import SimModel

_FORMAT_OF_DTYPE = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "bf16",
}  # as `moespac pack` has it


@dataclass(frozen=True)
class PlannedModel:
    """Sizes of a model whose experts may be stored in several formats. Bytes and weights."""

    name: str
    stored_format: str  # of its experts as they are now
    formats: tuple[str, ...]  # that they can be had in: of a pack, its own
    stored_bytes: int | None  # on the disk, or to download; None: there are no weights yet
    layers: int
    experts: int
    top_k: int
    hidden: int
    expert_weights: int
    record_bytes: dict[str, int]  # of one expert, by format
    trunk_weights: int  # read for every token
    embedding_weights: int  # held beside them; one row a token is read
    vocabulary: int  # width of its logits
    kv_cache: KVCache  # in 16 bits

    def to_sim_model(self, format: str, trunk_bytes: int) -> SimModel:
        """For the simulator; ``trunk_bytes`` a weight of the trunk, as it is computed."""
        return SimModel(
            name=f"{self.name}, {format}",
            format=format,
            layers=self.layers,
            experts=self.experts,
            top_k=self.top_k,
            hidden=self.hidden,
            shared_experts=0,  # part of the trunk here
            expert_weights=self.expert_weights,
            expert_bytes=self.record_bytes[format],
            trunk_weights=self.trunk_weights,
            trunk_bytes=self.trunk_weights * trunk_bytes,
            embedding_weights=self.embedding_weights,
            embedding_bytes=self.embedding_weights * trunk_bytes,
        )


def read_planned_model(source: str) -> PlannedModel:
    """``source`` is a directory (a checkpoint, a pack, or only its config.json), or a model's id on the Hub.

    Raises ModelError or CheckpointError for what is not there, cannot be read, or cannot be run.
    """
    if is_pack(Path(source)):
        return _from_pack(Path(source))
    with open_source(source) as found:
        skeleton = build_skeleton(found.path)
        dtype = found.dtype or skeleton.config.dtype or torch.bfloat16
        return _measure(found.name, skeleton, _format(dtype, source), found.stored_bytes)


def _from_pack(path: Path) -> PlannedModel:
    manifest = read_manifest(path)
    found = _measure(path.resolve().name, build_skeleton(path), manifest.format)
    sizes = {manifest.format: manifest.layout.nbytes}
    stored = manifest.records_bytes + manifest.trunk_bytes
    return replace(found, formats=(manifest.format,), record_bytes=sizes, stored_bytes=stored)


def _measure(name: str, skeleton: Skeleton, stored: str, stored_bytes: int | None = None) -> PlannedModel:
    """Everything follows from the model on the meta device, for any family."""
    module: Any = next(iter(skeleton.experts.values()))
    stacked = {key: getattr(module, key) for key in skeleton.expert_parameters()}
    tensors = [
        ExpertTensor(
            key,
            tuple(parameter.shape[1:]),
            torch.bfloat16,
            bool(module.is_transposed and parameter.dim() == 3),
        )
        for key, parameter in stacked.items()
    ]
    experts = skeleton.num_experts
    expert_weights = sum(prod(parameter.shape[1:]) for parameter in stacked.values())
    held, embedding = count_weights(skeleton.model)
    config = skeleton.config.get_text_config()
    return PlannedModel(
        name=name,
        stored_format=stored,
        formats=PACK_FORMATS,
        stored_bytes=stored_bytes,
        layers=len(skeleton.experts),
        experts=experts,
        top_k=skeleton.top_k,
        hidden=config.hidden_size,
        expert_weights=expert_weights,
        record_bytes={format: packed_layout(tensors, format).nbytes for format in PACK_FORMATS},
        trunk_weights=held - embedding - expert_weights * experts * len(skeleton.experts),
        embedding_weights=embedding,
        vocabulary=config.vocab_size,
        kv_cache=kv_cache(skeleton.config, 2),
    )


def count_weights(network: Any) -> tuple[int, int]:
    """Of a model on the meta device: all, and those of an input embedding that is not the head too."""
    held = sum(parameter.numel() for parameter in network.parameters())
    head, embedding = network.get_output_embeddings(), network.get_input_embeddings().weight
    if head is None or head.weight is embedding:
        return held, 0
    if network.config.tie_word_embeddings:
        return held - head.weight.numel(), 0  # tied, but not on the meta device
    return held, embedding.numel()


def _format(dtype: Any, source: object) -> str:
    if dtype not in _FORMAT_OF_DTYPE:
        raise ModelError(
            f"{source}: its weights are stored as {dtype}; take a float32, float16 or bfloat16 checkpoint"
        )
    return _FORMAT_OF_DTYPE[dtype]
