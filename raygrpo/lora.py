"""Low-rank adapters (LoRA, arXiv:2106.09685): what the learner trains of a policy, and what travels to the generators.

The learner trains matrices A and B beside frozen weights W: y = W x + (alpha / rank) B A x. Only A and B are published;
a generator adds them to the weights of the checkpoint it started from, W + (alpha / rank) B A, so every engine samples
from an ordinary model. The reference policy of a KL penalty is the same model with its adapters off.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from raygrpo.config import LoraConfig, ModelConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn

ADAPTER = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])\.default\.weight")
FROZEN = re.compile(r"base_model\.model\.(?P<module>.+?)(?:\.base_layer)?\.(?P<parameter>[^.]+)")


def add_adapters(model: nn.Module, settings: LoraConfig) -> PeftModel:
    """The model with adapters, which are all that is trained. B starts as zero: nothing changes yet. Raises ValueError
    for modules that the model does not have."""
    import peft

    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft only divides it by the rank
        target_modules=settings.target_modules,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)  # type: ignore[arg-type,return-value]


class AdapterMerger:
    """Turns published adapters into weights for an engine."""

    def __init__(self, model: ModelConfig):
        from raygrpo.engines.sampling import checkpoint_tensors

        assert model.lora is not None
        self._scaling = model.lora.scaling
        self._dtype = model.dtype
        self._base = checkpoint_tensors(model.path)

    def __call__(self, adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of the checkpoint, those with an adapter changed. Raises ValueError for adapters of weights that
        the checkpoint does not have."""
        return merge(self._base, adapters, self._scaling, self._dtype)


def merge(base: Mapping[str, Tensor], adapters: Mapping[str, Tensor], scaling: float, dtype: str) -> dict[str, Tensor]:
    """Tensors of the base model by name, with scaling * B A added in float32 to those that have adapters."""
    import torch

    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapters.items():
        found = ADAPTER.fullmatch(name)
        if found is None or f"{found['module']}.weight" not in base:
            raise ValueError(f"{name!r} is no adapter of a weight of the model")
        pairs.setdefault(f"{found['module']}.weight", {})[found["matrix"]] = tensor
    merged = dict(base)
    for name, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"the adapter of {name!r} lacks a matrix: only {', '.join(pair)} came")
        delta = scaling * (pair["B"].float() @ pair["A"].float())
        if delta.shape != base[name].shape:
            raise ValueError(f"the adapter of {name!r} has shape {tuple(delta.shape)}, not {tuple(base[name].shape)}")
        # The learner's frozen weights were rounded to its precision when they were loaded.
        frozen = base[name].to(getattr(torch, dtype))
        merged[name] = (frozen.float() + delta).to(frozen.dtype)
    return merged


def split_adapters(tensors: Iterable[tuple[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(frozen weights under their names without peft's wrapping, adapters) of a model with adapters."""
    frozen, adapters = {}, {}
    for name, tensor in tensors:
        if ADAPTER.fullmatch(name):
            adapters[name] = tensor
        elif found := FROZEN.fullmatch(name):
            frozen[f"{found['module']}.{found['parameter']}"] = tensor
        else:
            frozen[name] = tensor
    return frozen, adapters
