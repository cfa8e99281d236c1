"""What a model is, before any of its weights were read: from a directory, or from the Hugging Face Hub."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from moespac.errors import CheckpointError, ModelError
from moespac.experts.format import PACK_FORMATS, packed_layout
from moespac.experts.manifest import is_pack, read_manifest
from moespac.model.index import ExpertTensor
from moespac.model.kv_size import KVCache, kv_cache
from moespac.model.safetensors import read_checkpoint_headers
from moespac.model.skeleton import Skeleton, build_skeleton
from moespac.sim.shapes import SimModel

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TIMEOUT = 10.0  # seconds for the Hub's first answer
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
    path = Path(source)
    if path.exists():
        return _from_pack(path) if is_pack(path) else _from_directory(path)
    if _HUB_ID.fullmatch(source):
        return _from_hub(source)
    raise ModelError(
        f"{source}: no such directory; give a model's directory, or its id on the Hub (owner/name)"
    )


def _from_pack(path: Path) -> PlannedModel:
    manifest = read_manifest(path)
    found = _measure(path.resolve().name, build_skeleton(path), manifest.format)
    sizes = {manifest.format: manifest.layout.nbytes}
    stored = manifest.records_bytes + manifest.trunk_bytes
    return replace(found, formats=(manifest.format,), record_bytes=sizes, stored_bytes=stored)


def _from_directory(path: Path) -> PlannedModel:
    skeleton = build_skeleton(path)
    try:
        entries = read_checkpoint_headers(path)
    except CheckpointError:
        if any(path.glob("*.safetensors*")):
            raise  # there are weights, and something is wrong with them
        entries = {}
    stored, dtype = sum(entry.nbytes for entry in entries.values()), skeleton.config.dtype or torch.bfloat16
    if entries:
        dtype = max(entries.values(), key=lambda entry: entry.nbytes).dtype
    return _measure(path.resolve().name, skeleton, _format(dtype, path), stored or None)


def _from_hub(name: str) -> PlannedModel:
    """config.json, and the headers of the safetensors files by HTTP range: kilobytes, however large the model."""
    import huggingface_hub

    _ask_hub(
        name, lambda: huggingface_hub.HfApi().model_info(name, timeout=_TIMEOUT)
    )  # fails at once, unlike the rest
    config = Path(_ask_hub(name, lambda: huggingface_hub.hf_hub_download(name, "config.json")))
    metadata = _ask_hub(name, lambda: huggingface_hub.get_safetensors_metadata(name))
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "config.json").write_bytes(config.read_bytes())
        try:
            skeleton = build_skeleton(Path(place))
        except ModelError as error:
            raise ModelError(str(error).replace(place, name)) from None
    tensors = [tensor for file in metadata.files_metadata.values() for tensor in file.tensors.values()]
    stored = sum(end - begin for begin, end in (tensor.data_offsets for tensor in tensors))
    largest = max(tensors, key=lambda tensor: tensor.data_offsets[1] - tensor.data_offsets[0])
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}.get(
        largest.dtype, largest.dtype
    )
    return _measure(name, skeleton, _format(dtype, name), stored)


def _ask_hub(name: str, question: Callable[[], Any]) -> Any:
    try:
        return question()
    except (
        Exception
    ) as error:  # the network and the Hub fail in dozens of ways; each of them is one line here
        lines = (line.strip() for line in str(error).splitlines())
        reason = next((line for line in lines if line), "")[:160]
        raise ModelError(
            f"{name}: no such directory, and the Hub has no answer for it ({type(error).__name__}: {reason}); "
            "check the name and the network, or give the directory of a download"
        ) from None


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
    network: Any = skeleton.model
    everything = sum(parameter.numel() for parameter in network.parameters())
    trunk = everything - expert_weights * experts * len(skeleton.experts)
    head = network.get_output_embeddings()
    embedding = network.get_input_embeddings().weight
    untied = head is not None and head.weight is not embedding and not skeleton.config.tie_word_embeddings
    if not untied and head is not None and head.weight is not embedding:
        trunk -= head.weight.numel()  # tied, but not on the meta device
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
        trunk_weights=trunk - embedding.numel() if untied else trunk,
        embedding_weights=embedding.numel() if untied else 0,
        kv_cache=kv_cache(skeleton.config, 2),
    )


def _format(dtype: Any, source: object) -> str:
    if dtype not in _FORMAT_OF_DTYPE:
        raise ModelError(
            f"{source}: its weights are stored as {dtype}; take a float32, float16 or bfloat16 checkpoint"
        )
    return _FORMAT_OF_DTYPE[dtype]
