"""The model without its weights: built on the meta device to learn its experts' class, shapes and names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from moespac.errors import ModelError

# The configuration keys under which the families keep the number of experts a token is routed to.
_TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "top_k")


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device, and its experts modules in layer order."""

    config: PretrainedConfig
    model: PreTrainedModel
    experts: dict[str, nn.Module]  # module path -> transformers' experts module, all of one class

    @property
    def experts_class(self) -> type[nn.Module]:
        return type(next(iter(self.experts.values())))

    @property
    def num_experts(self) -> int:
        module: Any = next(iter(self.experts.values()))
        return module.down_proj.shape[0]

    @property
    def top_k(self) -> int:
        config = self.config.get_text_config()
        found = (getattr(config, key, None) for key in _TOP_K_KEYS)
        return next((k for k in found if isinstance(k, int) and k > 0), 1)

    @property
    def hidden_size(self) -> int:
        return self.config.get_text_config().hidden_size

    def expert_parameters(self) -> list[str]:
        """Names of the parameters that are stacked over experts, in the module's own order."""
        module = next(iter(self.experts.values()))
        return [name for name, _ in module.named_parameters(recurse=False)]


def read_config(path: Path) -> PretrainedConfig:
    """The configuration of a model directory. Raises ModelError when there is none that can be read."""
    if not path.exists():
        raise ModelError(f"{path}: no such model directory; give the path of a downloaded checkpoint")
    if not (path / "config.json").exists():
        raise ModelError(f"{path}: no config.json there; give the directory of a Hugging Face checkpoint")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers raises many kinds here; each of them means an unusable config
        reason = str(error).splitlines()[0]
        raise ModelError(f"{path}: config.json cannot be used ({reason})") from None


def build_skeleton(path: Path) -> Skeleton:
    """Build the model of ``path`` on the meta device.

    Raises ModelError for a dense model, a family outside transformers' experts interface, and a checkpoint
    that is quantised in a way whose experts we cannot slice.
    """
    config = read_config(path)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{path}: the checkpoint is already quantised ({_quantization_name(config)}); "
            "take the unquantised checkpoint and use `moespac pack --format int4`"
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError:
        raise ModelError(f"{path}: {config.model_type} is not a causal language model") from None
    experts = {name: module for name, module in model.named_modules() if _is_experts(module)}
    if not experts:
        raise ModelError(f"{path}: {_why_no_experts(config)}")
    classes = {type(module) for module in experts.values()}
    shapes = {tuple(p.shape for p in module.parameters(recurse=False)) for module in experts.values()}
    if len(classes) > 1 or len(shapes) > 1:
        raise ModelError(
            f"{path}: {config.model_type} mixes experts of several shapes, which is not supported"
        )
    return Skeleton(config, model, experts)


def supported_families() -> list[str]:
    """The model types of the installed transformers whose modelling file uses the experts interface."""
    models = Path(transformers.__file__).parent / "models"
    files = models.glob("*/modeling_*.py")
    return sorted({file.parent.name for file in files if "@use_experts_implementation" in file.read_text()})


def _is_experts(module: nn.Module) -> bool:
    """transformers marks experts modules by these flags (integrations/moe.py, use_experts_implementation)."""
    return (
        hasattr(module, "has_gate") and hasattr(module, "is_transposed") and "down_proj" in module._parameters
    )


def _why_no_experts(config: PretrainedConfig) -> str:
    words = re.compile(r"expert|moe", re.IGNORECASE)
    if any(words.search(key) for key in config.get_text_config().to_dict()):
        return (
            f"{config.model_type} does not use transformers' experts interface, so its experts cannot be "
            f"offloaded; supported families: {', '.join(supported_families())}"
        )
    return f"{config.model_type} is a dense model; moespac runs Mixture-of-Experts models"


def _quantization_name(config: PretrainedConfig) -> str:
    quantization = config.quantization_config
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    return str(getattr(method, "value", method))
