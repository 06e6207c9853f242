"""What the shared-prefix forward can and cannot do exactly: refusals, and the little that must be known per model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from raygrpo.shared_prefix.head import LogitTransform
from raygrpo.shared_prefix.layout import SharedPrefixBatch


class UnsupportedModelError(ValueError):
    """The model does something that a shared prefix would get wrong. The message says what."""


# Layer types in which a token learns of earlier ones only through attention, by their positions.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


def check_model(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError, with the reason, for a model whose result would not be exact."""
    name, config = type(model).__name__, model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder; a shared prefix needs a decoder")
    others = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if others:
        raise UnsupportedModelError(
            f"{name} has layers of type {', '.join(sorted(others))}: they carry a state along the sequence, or cut it "
            "in their own way, so that completions would see one another"
        )
    convolutions = [path for path, module in model.named_modules() if isinstance(module, nn.Conv1d)]
    if convolutions:
        raise UnsupportedModelError(
            f"{name} has convolutions over the sequence ({convolutions[0]}): completions would see one another"
        )
    if not model._supports_attention_backend:
        raise UnsupportedModelError(f"{name} does not call attention through transformers' AttentionInterface")
    check_head(model.get_output_embeddings())
    if not isinstance(model.get_decoder(), PreTrainedModel):
        raise UnsupportedModelError(f"{name} does not say where its layers are: get_decoder() is not a model")
    if getattr(config, "output_router_logits", False):
        raise UnsupportedModelError(
            f"{name}: output_router_logits asks for a router loss, which is not computed here; set it to False"
        )
    for key, value in config.to_dict().items():
        if (_is_dropout(key) or "jitter" in key) and isinstance(value, float) and value > 0:
            raise UnsupportedModelError(f"{name}: config.{key} is {value}, log-probabilities are random; set it to 0")
    check_modules(model.named_modules())


def check_head(head: nn.Module | None) -> nn.Linear:
    """The LM head; raise UnsupportedModelError for one whose logits are more than one product with its weight."""
    if not isinstance(head, nn.Linear):
        raise UnsupportedModelError(f"the LM head is {type(head).__name__}, not a linear layer (leave adapters off it)")
    return head


def check_modules(named_modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise UnsupportedModelError for dropout and for reentrant checkpoints, which adapters and trainers may add."""
    for path, module in named_modules:
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise UnsupportedModelError(
                f"{path} drops out with p = {module.p}: log-probabilities are random; set it to 0"
            )
        checkpoint = vars(module).get("_gradient_checkpointing_func")
        if checkpoint is not None and getattr(checkpoint, "keywords", {}).get("use_reentrant", False):
            raise UnsupportedModelError(
                "gradient checkpointing is reentrant; call "
                'model.gradient_checkpointing_enable({"use_reentrant": False})'
            )


def check_attention_arguments(name: str, arguments: Mapping[str, object]) -> None:
    """Raise UnsupportedModelError for tensors that a layer passes to attention beside q, k and v: position biases,
    sinks, indices of the keys to attend to."""
    for key, value in arguments.items():
        if isinstance(value, Tensor) and key not in ("position_ids", "cache_position"):
            raise UnsupportedModelError(f"{name} passes {key!r} to attention, which is not supported")


def window_of(module: nn.Module, layer: object, window: int | None) -> int | None:
    """The window of an attention layer, which some models apply by masks alone and do not pass to attention."""
    config = vars(module).get("config")
    size = getattr(config, "sliding_window", None)
    if window is not None or not size:
        return window
    kinds = getattr(config, "layer_types", None)
    if kinds and isinstance(layer, int):
        return size if kinds[layer] == "sliding_attention" else None
    if getattr(config, "use_sliding_window", True):
        raise UnsupportedModelError(
            f"{type(module).__name__} does not say whether config.sliding_window = {size} holds for it; set it to None "
            "if sequences are shorter"
        )
    return None


def check_batch(model: PreTrainedModel, batch: SharedPrefixBatch) -> None:
    """Raise ValueError for a stream in which rotary frequencies would differ from those of a sequence alone.

    longrope switches frequencies, and dynamic NTK scaling derives them from the longest position in a batch, once a
    sequence is longer than the pretraining context.
    """
    threshold = _rope_threshold(model.config.get_text_config())
    if threshold is None:
        return
    lengths = {offset + length for offset, length in zip(batch.plan.offsets, batch.plan.own.k_lens, strict=True)}
    lengths -= {batch.plan.offsets[segment] for segment in range(len(batch.plan.parents))}  # those that are continued
    lengths |= {len(batch.external_ids)} - {0}
    kind, limit = threshold
    if max(lengths) > limit and (kind == "dynamic" or min(lengths) <= limit):
        raise ValueError(
            f"this model's rotary frequencies ({kind}) depend on whether the longest sequence in a batch has more than "
            f"{limit} tokens; this batch has sequences of {min(lengths)} to {max(lengths)} tokens. "
            + ("Keep them shorter." if kind == "dynamic" else "Keep those on different sides in different batches.")
        )


def logit_transform(model: PreTrainedModel) -> LogitTransform:
    """What the model's forward does to the output of its LM head; the self-check would notice what is missing here."""
    config = model.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))


def _is_dropout(key: str) -> bool:
    named = "dropout" in key or key.endswith("pdrop")
    return named and "classifier" not in key and not key.startswith("summary")


def _rope_threshold(config: PreTrainedConfig) -> tuple[str, int] | None:
    """Kind of rotary embedding that depends on length, and the length above which it changes."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for rope in nested or [parameters]:
        kind = rope.get("rope_type", "default")
        if kind == "longrope":
            return kind, rope.get("original_max_position_embeddings", config.max_position_embeddings)
        if "dynamic" in kind:
            return "dynamic", rope.get("original_max_position_embeddings", config.max_position_embeddings)
    return None
