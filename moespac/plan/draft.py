"""A draft model, before any of its weights were read: what it takes beside the target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from moespac.errors import DraftError
from moespac.experts.manifest import is_pack
from moespac.model.kv_size import KVCache, kv_cache
from moespac.model.load import load_tokenizer
from moespac.plan.model import PlannedModel, count_weights
from moespac.plan.source import open_source
from moespac.speculate.drafters import check_draft_model


@dataclass(frozen=True)
class PlannedDraft:
    """Sizes of a draft model; it lies where the trunk is, and is computed as that is."""

    name: str
    stored_bytes: int | None  # on the disk, or to download; None: there are no weights yet
    weights: int  # all that are held
    read_weights: int  # for each drafted token: all but an input embedding of its own
    kv_cache: KVCache  # in 16 bits


def read_planned_draft(source: str, target: str, model: PlannedModel) -> PlannedDraft:
    """``source``, and ``target`` that ``model`` was read from, are directories or ids on the Hub.

    Raises DraftError for what the engine refuses too: other tokens than the target's (by their tokenizers where
    both are in directories, else by the vocabularies' sizes), or a cache that cannot take tokens back. Raises
    ModelError or CheckpointError for what is not there or cannot be read.
    """
    if is_pack(Path(source)):
        raise DraftError(f"{source}: is a pack, which only a target can be; give a draft model's checkpoint")
    tokenizer = load_tokenizer(Path(target)) if Path(target).is_dir() else None
    with open_source(source) as found:
        config = check_draft_model(found.path, model.vocabulary, tokenizer)
        if getattr(config, "quantization_config", None) is not None:
            raise DraftError(
                f"{source}: is quantised already; its memory is unknown: give the unquantised one"
            )
        held, embedding = count_weights(_on_meta(config, source))
        return PlannedDraft(found.name, found.stored_bytes, held, held - embedding, kv_cache(config, 2))


def _on_meta(config: Any, source: str) -> Any:
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except ValueError:
        raise DraftError(f"{source}: {config.model_type} is not a causal language model") from None
