"""One expert = one contiguous record, so that a miss is one read.

A record holds the expert's tensors one after the other, each as one or more blocks (values, then scales),
each block at a multiple of 64 bytes for aligned vector loads, the record filled up to 4096 for O_DIRECT.
Packed matrices are (out, in) with contiguous rows, so a kernel streams through them; the records of an
unpacked checkpoint keep its orientation, and ``weights`` turns the view instead of the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from moespac.errors import ConfigError, ModelError
from moespac.experts.quantize import GROUP, dequantize_int4, dequantize_int8, quantize_int4, quantize_int8
from moespac.model.index import ExpertTensor

BLOCK_ALIGNMENT = 64  # a cache line; no vector load straddles two
RECORD_ALIGNMENT = 4096  # O_DIRECT: offsets, sizes and addresses in units of a page

PACK_FORMATS = ("f32", "bf16", "int8", "int4")
FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_FLOAT_NAMES = {dtype: name for name, dtype in FLOATS.items()}
_BLOCK_DTYPES = {**FLOATS, "int8": torch.int8, "uint8": torch.uint8}


@dataclass(frozen=True)
class Block:
    """Bytes of a record that hold numbers of one type, row after row."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0  # from the start of the record

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * _BLOCK_DTYPES[self.dtype].itemsize

    def view(self, record: torch.Tensor) -> torch.Tensor:
        """The block inside ``record`` (nbytes,) uint8, zero-copy."""
        return (
            record[self.offset : self.offset + self.nbytes].view(_BLOCK_DTYPES[self.dtype]).view(self.shape)
        )


@dataclass(frozen=True)
class TensorLayout:
    """One parameter of an expert: (out, in), or (out,) for a bias, in its blocks."""

    name: str
    shape: tuple[int, ...]
    format: str
    transposed: bool  # the values block is (in, out); only records of unpacked checkpoints
    blocks: tuple[Block, ...]

    def decode(self, record: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The tensor in ``dtype``; a view of the record when it is stored so."""
        weight = _CODECS[self.format].decode([b.view(record) for b in self.blocks], self, dtype)
        return weight.t() if self.transposed else weight

    def encode(self, weight: torch.Tensor, record: torch.Tensor) -> None:
        """Write a tensor of ``shape`` into its place in the record."""
        stored = weight.t() if self.transposed else weight
        for block, numbers in zip(self.blocks, _CODECS[self.format].encode(stored), strict=True):
            block.view(record).copy_(numbers)


@dataclass(frozen=True)
class RecordLayout:
    """Where everything lies in the records of a model; the same for all its experts."""

    tensors: tuple[TensorLayout, ...]
    nbytes: int  # of one record, a multiple of RECORD_ALIGNMENT

    def weights(self, record: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The expert's parameters by name, matrices always (out, in), biases (out,).

        ``record`` is (nbytes,) uint8 on any device, its start aligned to 64 bytes. What is stored in
        ``dtype`` comes as a view of the record, valid as long as the record is; the rest as fresh tensors.
        """
        return {tensor.name: tensor.decode(record, dtype) for tensor in self.tensors}

    def encode(self, weights: Mapping[str, torch.Tensor], record: torch.Tensor) -> None:
        """Write parameters, shaped as ``weights`` returns them, into ``record`` (nbytes,) uint8."""
        record.zero_()  # gaps between blocks are part of the checksum
        for tensor in self.tensors:
            tensor.encode(weights[tensor.name], record)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> RecordLayout:
        """Raises KeyError, TypeError or ValueError when ``data`` is no layout."""
        tensors = tuple(_tensor_from_json(item) for item in data["tensors"])
        ends = [block.offset + block.nbytes for tensor in tensors for block in tensor.blocks]
        if max(ends, default=0) > data["nbytes"] or data["nbytes"] % RECORD_ALIGNMENT:
            raise ValueError("the record layout does not fit its record")
        return RecordLayout(tensors, data["nbytes"])


def stored_layout(tensors: Sequence[ExpertTensor]) -> RecordLayout:
    """Records that hold the tensors as an unpacked checkpoint stores them.

    Raises ModelError for weights of a type that we cannot compute with.
    """
    return _arrange([(t, _float_name(t), t.transposed) for t in tensors])


def packed_layout(tensors: Sequence[ExpertTensor], format: str) -> RecordLayout:
    """Records in one of ``PACK_FORMATS``. The biases of quantised experts stay as they are.

    Raises ConfigError for an unknown format, ModelError for weights of a type that we cannot read.
    """
    if format not in PACK_FORMATS:
        raise ConfigError(f"unknown format {format!r}; choose one of {', '.join(PACK_FORMATS)}")

    def chosen(tensor: ExpertTensor) -> str:
        stored = _float_name(tensor)
        return stored if len(tensor.shape) == 1 and format not in FLOATS else format

    return _arrange([(t, chosen(t), False) for t in tensors])


def _float_name(tensor: ExpertTensor) -> str:
    if tensor.dtype not in _FLOAT_NAMES:
        raise ModelError(
            f"{tensor.name} is stored as {tensor.dtype}; take a checkpoint in float32, float16 or bfloat16"
        )
    return _FLOAT_NAMES[tensor.dtype]


def _arrange(plan: list[tuple[ExpertTensor, str, bool]]) -> RecordLayout:
    """Lay the tensors' blocks out one after the other. ``plan``: (tensor, format, keep transposed)."""
    offset = 0
    tensors = []
    for tensor, format, transposed in plan:
        shape = tensor.shape[::-1] if tensor.transposed else tensor.shape
        blocks = []
        for block in _CODECS[format].blocks(tensor.shape if transposed else shape):
            blocks.append(Block(block.name, block.dtype, block.shape, offset))
            offset = align(offset + block.nbytes, BLOCK_ALIGNMENT)
        tensors.append(TensorLayout(tensor.name, shape, format, transposed, tuple(blocks)))
    return RecordLayout(tuple(tensors), align(offset, RECORD_ALIGNMENT))


def align(size: int, to: int) -> int:
    return -(-size // to) * to


def _tensor_from_json(data: dict[str, Any]) -> TensorLayout:
    blocks = [Block(b["name"], b["dtype"], tuple(b["shape"]), b["offset"]) for b in data["blocks"]]
    if data["format"] not in _CODECS or any(block.dtype not in _BLOCK_DTYPES for block in blocks):
        raise ValueError(f"unknown format {data['format']!r}")
    return TensorLayout(data["name"], tuple(data["shape"]), data["format"], data["transposed"], tuple(blocks))


class _Codec(Protocol):
    """A number format: which blocks it needs, and the way there and back."""

    def blocks(self, shape: tuple[int, ...]) -> list[Block]: ...

    def encode(self, weight: torch.Tensor) -> Sequence[torch.Tensor]: ...

    def decode(
        self, blocks: Sequence[torch.Tensor], tensor: TensorLayout, dtype: torch.dtype
    ) -> torch.Tensor: ...


class _Float:
    def __init__(self, name: str) -> None:
        self._name = name

    def blocks(self, shape: tuple[int, ...]) -> list[Block]:
        return [Block("values", self._name, shape)]

    def encode(self, weight: torch.Tensor) -> Sequence[torch.Tensor]:
        return (weight,)

    def decode(
        self, blocks: Sequence[torch.Tensor], tensor: TensorLayout, dtype: torch.dtype
    ) -> torch.Tensor:
        return blocks[0].to(dtype)


class _Int8:
    def blocks(self, shape: tuple[int, ...]) -> list[Block]:
        rows, columns = shape
        return [Block("values", "int8", (rows, columns)), Block("scales", "f32", (rows,))]

    def encode(self, weight: torch.Tensor) -> Sequence[torch.Tensor]:
        return quantize_int8(weight)

    def decode(
        self, blocks: Sequence[torch.Tensor], tensor: TensorLayout, dtype: torch.dtype
    ) -> torch.Tensor:
        values, scales = blocks
        return dequantize_int8(values, scales, dtype)


class _Int4:
    def blocks(self, shape: tuple[int, ...]) -> list[Block]:
        rows, columns = shape
        groups = -(-columns // GROUP)
        return [
            Block("nibbles", "uint8", (rows, groups * GROUP // 2)),
            Block("scales", "uint8", (rows, groups)),
            Block("minima", "int8", (rows, groups)),
            Block("row_scales", "f32", (rows, 2)),
        ]

    def encode(self, weight: torch.Tensor) -> Sequence[torch.Tensor]:
        return quantize_int4(weight)

    def decode(
        self, blocks: Sequence[torch.Tensor], tensor: TensorLayout, dtype: torch.dtype
    ) -> torch.Tensor:
        nibbles, scales, minima, row_scales = blocks
        return dequantize_int4(nibbles, scales, minima, row_scales, tensor.shape[1], dtype)


_CODECS: dict[str, _Codec] = {**{name: _Float(name) for name in FLOATS}, "int8": _Int8(), "int4": _Int4()}
