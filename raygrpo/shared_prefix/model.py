"""Teaching a Hugging Face decoder one more keyword: model(shared_prefix=request).

`enable_shared_prefix` changes a model in place and leaves its ordinary forward and generate as they were. The new
keyword goes through the model's `__call__`, so whatever wraps the model (DeepSpeed, DDP, FSDP, PEFT) sees an ordinary
forward and gathers, casts and reduces as it always does. The LM head runs inside its own module for the same reason.

During such a call the model's attention implementation is switched to ours, under a name for which transformers builds
no mask; activation checkpoints switch it again while they recompute.

Shapes: T tokens in the stream, S completion tokens, d hidden size, E tokens of an external prefix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from raygrpo.shared_prefix.backends import BackendChoice
from raygrpo.shared_prefix.head import HeadRequest, token_logprobs
from raygrpo.shared_prefix.last_layer import LastLayer, narrow_last_layer
from raygrpo.shared_prefix.layout import AttentionPlan, SharedPrefixBatch
from raygrpo.shared_prefix.self_check import check_attention, check_logprobs
from raygrpo.shared_prefix.supported import (
    UnsupportedModelError,
    check_attention_arguments,
    check_batch,
    check_head,
    check_model,
    check_modules,
    logit_transform,
    window_of,
)

IMPLEMENTATION = "raygrpo_shared_prefix"


class CompletionScores(NamedTuple):
    """logprobs, entropy: [S] each, float32 (float64 for float64 models), completions in order without padding."""

    logprobs: Tensor
    entropy: Tensor | None


class PrefixState(NamedTuple):
    """What completions need of a prefix that was encoded before: its last hidden state [d], and the keys and values
    [E, Hk, D] of every layer."""

    last_hidden: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


@dataclass(frozen=True)
class Request:
    """One shared-prefix pass: scores the completions of a batch; with encode_only, returns its prompt's PrefixState."""

    batch: SharedPrefixBatch
    temperature: float = 1.0
    entropy: bool = False
    prefix: PrefixState | None = None
    encode_only: bool = False
    check: bool = True  # false: a pass of padding on every rank, which leaves the self-check to a later one


def enable_shared_prefix(model: nn.Module, attention: str = "auto", *, self_check: bool = True) -> None:
    """Make `completion_logprobs` work on a Hugging Face decoder, in place. Ordinary forward and generate are unchanged.

    model: the model itself or a PEFT model; call this before DeepSpeed, DDP or FSDP wrap it.
    attention: a backend's name (backends/), or "auto" for the best one for each layer on the device at hand.
    self_check: compare the first micro-batch with the model's ordinary forward, and raise if they disagree.
    Raises UnsupportedModelError for what would not be exact.
    """
    decoder_lm = _pretrained(model)
    check_model(decoder_lm)
    backend = BackendChoice(attention)
    if "_shared_prefix" not in vars(decoder_lm):
        decoder_lm.forward = MethodType(_with_keyword(type(decoder_lm).forward, _run), decoder_lm)
    vars(decoder_lm)["_shared_prefix"] = _State(backend, unchecked=self_check)


def completion_logprobs(model: nn.Module, batch: SharedPrefixBatch, temperature: float = 1.0) -> Tensor:
    """log-probability of every completion token, [S]; completions in order, without padding. Differentiable.

    model: one that enable_shared_prefix was called on, or what wraps it (a DeepSpeed engine, DDP, FSDP, PEFT).
    """
    return score_completions(model, batch, temperature=temperature).logprobs


def score_completions(
    model: nn.Module, batch: SharedPrefixBatch, *, temperature: float = 1.0, entropy: bool = False
) -> CompletionScores:
    """Like completion_logprobs, and the entropy of each token's distribution at that temperature if asked for."""
    return CompletionScores(*run_request(model, Request(batch, temperature, entropy)))


def run_request(model: nn.Module, request: Request) -> tuple:
    """Call a model, or what wraps it, with a request."""
    if not request.temperature > 0:
        raise ValueError(f"temperature is {request.temperature}; it must be positive")
    if not any("_shared_prefix" in vars(module) for module in model.modules()):
        raise ValueError("this model was not prepared: call enable_shared_prefix(model) before it is wrapped")
    return model(shared_prefix=request)


@dataclass
class _State:
    """What enable_shared_prefix leaves on a model."""

    backend: BackendChoice
    unchecked: bool


class _Pass:
    """What the attention layers of one pass share; travels to them as the keyword argument `shared_prefix`.

    Not a dataclass: FSDP copies those on their way into every layer.
    """

    def __init__(self, plan: AttentionPlan, state: _State, request: Request):
        self.plan, self.backend, self.check = plan, state.backend, state.unchecked and request.check
        self.prefix, self.keeps_layers = request.prefix, request.encode_only
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values by layer, if they are kept
        self.returned_rows: Tensor | None = None  # rows that the last layer returns, ascending, if not all
        self.num_calls = 0
        self.finished = False  # what a checkpoint recomputes afterwards is not counted


def _with_keyword(ordinary: Callable, special: Callable) -> Callable:
    """A forward that passes its keyword `shared_prefix` to `special` and otherwise is the ordinary one."""

    @functools.wraps(ordinary)
    def forward(self, *args, **kwargs):
        request = kwargs.pop("shared_prefix", None)
        return ordinary(self, *args, **kwargs) if request is None else special(self, *args, request)

    return forward


def _head(model: PreTrainedModel) -> nn.Linear:
    """The LM head, taught the keyword too. Looked up in every pass: adapters and a resized vocabulary replace it."""
    head = check_head(model.get_output_embeddings())
    if "forward" not in vars(head):
        head.forward = MethodType(_with_keyword(type(head).forward, _run_head), head)
    return head


def _run_head(head: nn.Linear, hidden: Tensor, request: HeadRequest) -> tuple[Tensor, Tensor | None]:
    return token_logprobs(hidden, head.weight, head.bias, request)


def _run(model: PreTrainedModel, request: Request) -> tuple:
    """model(shared_prefix=request), inside the model's own forward."""
    state: _State = vars(model)["_shared_prefix"]
    check_batch(model, request.batch)
    device = next(model.get_input_embeddings().parameters()).device
    batch = request.batch.to(device)
    if model.training:
        check_modules(model.named_modules())
    run = _Pass(batch.plan, state, request)
    decoder, expected = model.get_decoder(), model.config.get_text_config().num_hidden_layers
    narrow_last_layer(decoder, expected)
    with _our_attention(model):
        hidden = decoder(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            shared_prefix=run,
        ).last_hidden_state[0]
    run.finished = True
    if run.num_calls != expected:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {expected} layers but made {run.num_calls} calls to transformers' attention "
            "interface: some of its layers mix tokens in another way, which a shared prefix would get wrong"
        )
    if request.encode_only:
        if run.layers.keys() != set(range(expected)):
            raise UnsupportedModelError(
                f"the attention of {type(model).__name__} does not say which layer it is in, so that a group with more "
                "than max_tokens cannot be split"
            )
        layers = [run.layers[index] for index in range(expected)]
        return PrefixState(hidden[-1], *(tuple(tensors) for tensors in zip(*layers, strict=True)))

    token_rows = batch.token_rows
    if request.prefix is not None:  # its last row predicts the first token of every completion
        hidden = torch.cat([hidden, request.prefix.last_hidden[None]])
        token_rows = torch.where(token_rows == -1, hidden.shape[0] - 1, token_rows)
    elif run.returned_rows is not None:
        token_rows = torch.searchsorted(run.returned_rows, token_rows)
    rows, token_rows = token_rows.unique(return_inverse=True)
    head_request = HeadRequest(token_rows, batch.targets, request.temperature, request.entropy, logit_transform(model))
    logprobs, entropy = _head(model)(hidden[rows], shared_prefix=head_request)
    if run.check:
        state.unchecked = False
        # transformers' sdpa leaves attention softcaps out; eager, which is slower, has them.
        plain = "eager" if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) else None
        with _switch(_configs(model), plain):
            check_logprobs(functools.partial(type(model).forward, model), batch, logprobs, request.temperature)
    return CompletionScores(logprobs, entropy)


@contextmanager
def _our_attention(model: PreTrainedModel) -> Iterator[None]:
    """Attention layers call ours meanwhile, and again whenever a checkpoint recomputes a layer."""
    configs = _configs(model)
    checkpointing = [module for module in model.modules() if "_gradient_checkpointing_func" in vars(module)]
    functions = [vars(module)["_gradient_checkpointing_func"] for module in checkpointing]

    def through(checkpoint: Callable) -> Callable:
        return lambda layer, *args: checkpoint(functools.partial(_switched, configs, layer), *args)

    for module, checkpoint in zip(checkpointing, functions, strict=True):
        vars(module)["_gradient_checkpointing_func"] = through(checkpoint)
    try:
        with _switch(configs, IMPLEMENTATION):
            yield
    finally:
        for module, checkpoint in zip(checkpointing, functions, strict=True):
            vars(module)["_gradient_checkpointing_func"] = checkpoint


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs in which attention layers look up their implementation."""
    configs = {id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)}
    return list(configs.values())


@contextmanager
def _switch(configs: list[PreTrainedConfig], implementation: str | None) -> Iterator[None]:
    """Another attention implementation meanwhile; None changes nothing. (set_attn_implementation would validate it,
    and set it on the whole tree of configs.)"""
    before = [config._attn_implementation_internal for config in configs]
    for config in configs:
        config._attn_implementation_internal = implementation or config._attn_implementation_internal
    try:
        yield
    finally:
        for config, original in zip(configs, before, strict=True):
            config._attn_implementation_internal = original


def _switched(configs: list[PreTrainedConfig], layer: Callable, *args):
    with _switch(configs, IMPLEMENTATION):
        return layer(*args)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    shared_prefix: _Pass | LastLayer | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **others: object,
) -> tuple[Tensor, None]:
    """What transformers' AttentionInterface calls: query [1, Hq, T, D], key and value [1, Hk, T, D]."""
    name = type(module).__name__
    if shared_prefix is None:
        raise UnsupportedModelError(f"{name} does not pass keyword arguments on to attention")
    if attention_mask is not None:
        raise UnsupportedModelError(f"{name} makes its own masks")
    if query.shape[1] % key.shape[1]:
        raise UnsupportedModelError(
            f"{name} has {query.shape[1]} query heads for {key.shape[1]} key heads; they must be a multiple"
        )
    if dropout:
        raise UnsupportedModelError(f"{name} drops out attention with p = {dropout}; set it to 0 in the config")
    check_attention_arguments(name, others)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if torch.is_autocast_enabled(q.device.type):  # it casts what stock attention is given, which ours has to do itself
        q, k, v = (x.to(torch.get_autocast_dtype(x.device.type)) for x in (q, k, v))
    if isinstance(shared_prefix, LastLayer):
        run: _Pass = shared_prefix.run
        if shared_prefix.is_first_run:
            shared_prefix.keep(k, v)
            return q.new_zeros(1, *q.shape[:2], v.shape[-1]), None  # nothing reads it
        k, v = shared_prefix.join(k, v)
    else:
        run = shared_prefix
    layer = vars(module).get("layer_idx", name)
    external = None if run.prefix is None else (run.prefix.keys[layer], run.prefix.values[layer])
    kind = {
        "plan": shared_prefix.plan,
        "scale": q.shape[-1] ** -0.5 if scaling is None else scaling,
        "window": window_of(module, layer, sliding_window),
        "softcap": softcap,
        "external": external,
    }
    out = run.backend.attend(q, k, v, **kind)
    if not run.finished:
        run.num_calls += 1
        if run.keeps_layers:
            run.layers[layer] = (k, v)
        if run.check:
            check_attention(out, q, k, v, layer=layer, **kind)
    return out[None], None


AttentionInterface.register(IMPLEMENTATION, _attention)


def _pretrained(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model, or the model itself."""
    for adapter in getattr(model, "peft_config", {}).values():
        if getattr(adapter, "is_prompt_learning", False):
            raise UnsupportedModelError(f"{adapter.peft_type} puts virtual tokens before every sequence; use LoRA")
    inner = getattr(model, "get_base_model", lambda: model)()
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers model (nor a PEFT model of one); "
            "call enable_shared_prefix before DeepSpeed, DDP or FSDP wrap it"
        )
    return inner
