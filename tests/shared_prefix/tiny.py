"""Tiny decoders of many architectures, random groups, and the independent reference: one sequence at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 97
_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # so that log-probabilities depend on what attention sees
}
_MIXED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
ARCHITECTURES = {
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": 5},
    "phi3": {},
    "gemma2": {
        **_MIXED, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {**_MIXED, "query_pre_attn_scalar": 8},
    "olmo2": {},
    "granite": {
        "logits_scaling": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5, "embedding_multiplier": 2.0,
    },
    "glm4": {},
    "cohere2": {**_MIXED, "logit_scale": 0.25},
    "smollm3": {"no_rope_layers": [0, 1]},
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1,
    },
}  # fmt: skip
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_NO_DROPOUT = {
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "head_dim": 4, "num_key_value_heads": 4}  # fmt: skip
OTHER_ARCHITECTURES = {  # biases, layer norms, parallel residuals, learned positions, latent attention, routed experts
    "apertus": {},
    "deepseek_v3": {**_MOE, **_MLA, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "ernie4_5": {},
    "exaone4": _MIXED,
    "gemma": {},
    "gpt2": {**_NO_DROPOUT, "n_embd": 32, "n_head": 4, "n_layer": 2},
    "gpt_neox": {},
    "granitemoe": _MOE,
    "helium": {},
    "hunyuan_v1_dense": {},
    "mixtral": {**_MOE, "sliding_window": 5},
    "olmo3": _MIXED,
    "opt": {"dropout": 0.0, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": {"hidden_dropout": 0.0},
    "phi": {},
    "qwen2_moe": {  # its windows are in its masks alone
        **_MOE, **_MIXED, "use_sliding_window": True, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1,
    },
    "seed_oss": _NO_DROPOUT,
    "starcoder2": {**_NO_DROPOUT, "embedding_dropout": 0.0, "sliding_window": 5},
}  # fmt: skip


def tiny_model(
    architecture: str = "qwen3", dtype: torch.dtype = torch.float64, *, seed: int = 0, **options
) -> PreTrainedModel:
    """A random decoder in training mode. gemma2 uses eager attention: transformers' sdpa leaves softcaps out."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        architecture, **{**_BASE, **(ARCHITECTURES | OTHER_ARCHITECTURES).get(architecture, {}), **options}
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype).train()
    if architecture == "gemma2":
        model.set_attn_implementation("eager")
    if "num_experts_per_tok" in config.to_dict():
        model.set_experts_implementation("eager")  # the grouped kernel has no float64
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start at constants, which hide mistakes
                parameter += 0.1 * torch.randn_like(parameter)
    return model


@contextmanager
def float64_norms(model: PreTrainedModel) -> Iterator[None]:
    """The model's own code with float64 wherever it says float32 (norms, rotary embeddings, softmax, routers)."""

    class WideTorch:
        float32 = float = torch.float64

        def __getattr__(self, name):
            return getattr(torch, name)

    module = sys.modules[type(model).__module__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "torch", WideTorch())
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def random_ids(length: int, generator: torch.Generator) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()


def ragged_groups(seed: int = 0) -> list:
    """Every awkward kind of group at once: ragged, one-token prompt, G = 1, empty and duplicate completions, none."""
    g = torch.Generator().manual_seed(seed)
    twin = random_ids(4, g)
    lengths = [(7, (3, 15, 0, 5, 1)), (1, (4, 6)), (9, (6,)), (5, (0, 0)), (4, ()), (12, (3, 3, 9)), (6, (0, 8))]
    groups = [(random_ids(p, g), [random_ids(c, g) for c in completions]) for p, completions in lengths]
    return [*groups, (random_ids(8, g), [twin, list(twin), random_ids(5, g)])]


def reference(model: PreTrainedModel, groups, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [S] of all completion tokens, by one ordinary forward per completion."""
    logprobs, entropies = [], []
    for prompt, completions in groups:
        for completion in completions:
            if not completion:
                continue
            ids = torch.tensor([[*prompt, *completion]])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            log_p = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
            logprobs.append(log_p.gather(-1, torch.tensor(completion)[:, None])[:, 0])
            entropies.append(-(log_p.exp() * log_p).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of every parameter that the loss reaches."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def largest_difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest entry of any gradient's difference, relative to that parameter's largest expected entry.

    A gradient that is zero but for rounding (a key bias shifts all scores alike) is compared with the largest of all.
    """
    assert actual.keys() == expected.keys()
    overall = max(gradient.abs().max().item() for gradient in expected.values())
    worst = 0.0
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        scale = scale if scale > 1e-6 * overall else overall
        worst = max(worst, (actual[name] - gradient).abs().max().item() / scale)
    return worst


def weighted(values: tuple[Tensor, Tensor], seed: int = 7) -> Tensor:
    """A scalar that gives every log-probability and every entropy a different weight."""
    g = torch.Generator().manual_seed(seed)
    return sum((x * torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype)).sum() for x in values)
