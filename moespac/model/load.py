"""LOAD the trunk (everything but the experts) through transformers, with our experts modules in its place."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from moespac.errors import CheckpointError, ConfigError
from moespac.experts.runtime import OffloadedExperts, offloaded_class
from moespac.model.safetensors import TensorEntry
from moespac.model.skeleton import Skeleton

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in. "auto" is float32 on a CPU, where most have no fast bfloat16, else bfloat16.

    Raises ConfigError for a name that is not one of auto, float32, bfloat16, float16.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise ConfigError(f"--dtype {name}: unknown; choose one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def load_trunk(
    path: Path, skeleton: Skeleton, entries: Iterable[TensorEntry], dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, list[OffloadedExperts]]:
    """The model with the tensors ``entries`` in ``dtype`` on ``device``, and its experts modules by MoE layer.

    Raises CheckpointError when a trunk tensor is missing or cannot be read.
    """
    with ExitStack() as stack, _quiet_transformers(), _patched(skeleton.experts_class):
        try:
            state = _lazy_tensors(entries, stack)
            loaded: Any = type(skeleton.model).from_pretrained(
                None, config=skeleton.config, state_dict=state, dtype=dtype, output_loading_info=True
            )
        except SafetensorError as error:
            raise CheckpointError(
                f"{path}: a trunk tensor cannot be read ({error}); download it again"
            ) from None
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} trunk tensors are missing ({missing[0]} ...); download it again"
        )
    if (path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return _ready(model, skeleton, device)


def random_trunk(
    skeleton: Skeleton, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[PreTrainedModel, list[OffloadedExperts]]:
    """The same with random weights as the family initialises them, made where they are used: for measurements."""
    torch.manual_seed(seed)
    with _patched(skeleton.experts_class), torch.device(device):
        model = AutoModelForCausalLM.from_config(skeleton.config, dtype=dtype)
    return _ready(model, skeleton, device)


def _ready(
    model: Any, skeleton: Skeleton, device: torch.device
) -> tuple[PreTrainedModel, list[OffloadedExperts]]:
    """For inference on ``device``, and its experts modules."""
    experts = [module for module in model.modules() if isinstance(module, OffloadedExperts)]
    assert len(experts) == len(skeleton.experts)
    return model.requires_grad_(False).eval().to(device), experts


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model directory, or None when it has none (token ids still work)."""
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if not any((path / name).exists() for name in names):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers raises many kinds here
        raise CheckpointError(
            f"{path}: the tokenizer cannot be loaded ({str(error).splitlines()[0]})"
        ) from None


def _lazy_tensors(entries: Iterable[TensorEntry], stack: ExitStack) -> dict[str, Any]:
    """Slices that are read when transformers asks for them, so that the trunk is never held twice."""
    files: dict[Path, Any] = {}
    state = {}
    for entry in entries:
        if entry.file not in files:
            files[entry.file] = stack.enter_context(safe_open(entry.file, framework="pt"))
        state[entry.key] = files[entry.file].get_slice(entry.key)
    return state


@contextmanager
def _patched(experts_class: type[nn.Module]) -> Iterator[None]:
    """Within it, transformers builds our parameter-less module wherever it would build ``experts_class``.

    transformers' own monkey_patching does the same by looking every name up in every module, which in some
    versions imports optional packages that are not there; looking in the modules' dictionaries imports nothing.
    """
    name = experts_class.__name__
    users = [module for module in list(sys.modules.values()) if vars(module).get(name) is experts_class]
    replacement = offloaded_class(experts_class)
    for module in users:
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for module in users:
            setattr(module, name, experts_class)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its progress bar and load report, which speak of the experts that we leave out on purpose."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
