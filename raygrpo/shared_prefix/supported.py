"""What the shared-prefix forward can and cannot do exactly: refusals, and the little that must be known per model."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from raygrpo.shared_prefix.head import LogitTransform
from raygrpo.shared_prefix.layout import SharedPrefixBatch


class UnsupportedModelError(ValueError):
    """The model does something that a shared prefix would get wrong. The message says what."""


# Layer types in which a token sees earlier tokens only through attention with rotary or absolute positions.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


def check_model(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError, with the reason, for a model whose result would not be exact."""
    name, config = type(model).__name__, model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder; a shared prefix needs a decoder")
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise UnsupportedModelError(
            f"the LM head of {name} is {type(model.get_output_embeddings()).__name__}, not a plain linear layer"
        )
    others = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if others:
        raise UnsupportedModelError(
            f"{name} has layers of type {', '.join(sorted(others))}: they carry a state along the sequence or cut it in "
            "their own way, so completions would see one another"
        )
    mixers = {type(module).__name__ for module in model.modules() if isinstance(module, nn.Conv1d)}
    if mixers:
        raise UnsupportedModelError(f"{name} has convolutions over the sequence: completions would see one another")
    if not model._supports_attention_backend:
        raise UnsupportedModelError(f"{name} does not call attention through transformers' AttentionInterface")
    check_dropout(model)


def check_dropout(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise UnsupportedModelError(f"{path} drops out with p = {module.p}: logprobs would be random; set it to 0")


def check_batch(model: PreTrainedModel, batch: SharedPrefixBatch) -> None:
    """Raise ValueError for a stream that this model cannot encode exactly, or at all."""
    pass


def logit_transform(model: PreTrainedModel) -> LogitTransform:
    """What the model's forward does to the output of its LM head."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))
