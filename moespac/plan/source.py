"""Where a model's configuration and headers come from: a directory, or the Hugging Face Hub."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moespac.errors import CheckpointError, ModelError
from moespac.model.safetensors import read_checkpoint_headers

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TIMEOUT = 10.0  # seconds for the Hub's first answer
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Source:
    """A model's configuration, and what the headers of its weights say."""

    name: str
    path: Path  # with its config.json
    stored_bytes: int | None  # of all tensors; None: there are no weights yet
    dtype: Any  # of the largest; one that experts cannot have is named as the header does


@contextmanager
def open_source(source: str) -> Iterator[Source]:
    """``source`` is a directory (a checkpoint, or only its config.json), or a model's id on the Hub.

    Raises ModelError or CheckpointError for what is not there or cannot be read; what is raised within about a
    model of the Hub names it by its id.
    """
    path = Path(source)
    if path.exists():
        yield _from_directory(path)
        return
    if not _HUB_ID.fullmatch(source):
        raise ModelError(
            f"{source}: no such directory; give a model's directory, or its id on the Hub (owner/name)"
        )
    with tempfile.TemporaryDirectory() as place:
        found = _from_hub(source, Path(place))
        try:
            yield found
        except ModelError as error:
            raise type(error)(str(error).replace(place, source)) from None


def _from_directory(path: Path) -> Source:
    try:
        entries = read_checkpoint_headers(path)
    except CheckpointError:
        if any(path.glob("*.safetensors*")):
            raise  # there are weights, and something is wrong with them
        return Source(path.resolve().name, path, None, None)
    largest = max(entries.values(), key=lambda entry: entry.nbytes)
    return Source(path.resolve().name, path, sum(entry.nbytes for entry in entries.values()), largest.dtype)


def _from_hub(name: str, place: Path) -> Source:
    """config.json, and the headers of the safetensors files by HTTP range: kilobytes, however large the model."""
    import huggingface_hub

    _ask_hub(
        name, lambda: huggingface_hub.HfApi().model_info(name, timeout=_TIMEOUT)
    )  # fails at once, unlike the rest
    config = Path(_ask_hub(name, lambda: huggingface_hub.hf_hub_download(name, "config.json")))
    metadata = _ask_hub(name, lambda: huggingface_hub.get_safetensors_metadata(name))
    (place / "config.json").write_bytes(config.read_bytes())
    tensors = [tensor for file in metadata.files_metadata.values() for tensor in file.tensors.values()]
    sizes = [end - begin for begin, end in (tensor.data_offsets for tensor in tensors)]
    largest = tensors[sizes.index(max(sizes))].dtype
    return Source(name, place, sum(sizes), _DTYPES.get(largest, largest))


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
