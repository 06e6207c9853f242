"""A model's parameters as its checkpoint has them.

transformers holds some models in another form than their files: the experts of a layer are one parameter there, and a
tensor for each expert on disk. Published weights have the names and shapes of the checkpoint, as every engine expects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


class CheckpointNames:
    """What the parameters of a model are in its checkpoint.

    Raises ValueError for a model of which one tensor on disk is several parameters: those could only be put together
    when all of them are there, and ZeRO-3 gathers one after the other.
    """

    def __init__(self, model: nn.Module):
        """model: as from_pretrained made it; of any other, adapters around it included, names are left as they are."""
        self._model: Any = model
        self._conversions: list[Any] = list(vars(model).get("_weight_conversions") or [])
        for conversion in self._conversions:
            if len(conversion.target_patterns) > 1:
                raise ValueError(
                    f"{type(model).__name__} makes several parameters ({', '.join(conversion.target_patterns)}) of one "
                    f"tensor of its checkpoint ({', '.join(conversion.source_patterns)}): its weights cannot be "
                    "published"
                )

    def __call__(self, name: str, parameter: Tensor) -> dict[str, Tensor]:
        """The tensors of the checkpoint that one parameter holds."""
        if not self._conversions:
            return {name: parameter}
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self._model, {name: parameter})

    def views(self, name: str, parameter: Tensor) -> dict[str, Tensor]:
        """The same as views of the parameter, to be written to. Raises ValueError where one is no part of it in one
        piece, such as a transposed one."""
        if not self._conversions:
            return {name: parameter}
        import torch

        numbered = torch.arange(parameter.numel()).view(parameter.shape)
        found = {}
        for key, numbers in self(name, numbered).items():
            flat = numbers.reshape(-1)
            start, end = int(flat[0]), int(flat[0]) + len(flat)
            if not torch.equal(flat, torch.arange(start, end)):
                raise ValueError(f"{name} holds {key} of the checkpoint in another order: it cannot be loaded in place")
            found[key] = parameter.view(-1)[start:end].view(numbers.shape)
        return found
