"""How much work a step is, with and without sharing: the yardstick for "near the limit", and what packing balances.

For one group, with S_i = Lp + Lr_i and pairs(S) = S (S + 1) / 2:

                     repeated            shared
    tokens T         sum S_i             Lp + sum Lr_i
    attended pairs A sum pairs(S_i)      pairs(Lp) + sum (pairs(S_i) - pairs(Lp))
    LM-head rows R   sum Lr_i            sum max(Lr_i - 1, 0) + 1 (if any token at all)

and FLOPs, with N_b the weights of the blocks that a token meets, L layers, d hidden size, V vocabulary:

    forward               2 N_b T +  4 L Hq D A + 2 d V R
    forward and backward  6 N_b T + 14 L Hq D A + 6 d V R     (flash recomputes the scores in backward: 14, not 12)
    full checkpointing   +2 N_b T +  4 L Hq D A
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

Lengths = tuple[int, Sequence[int]]  # of the prompt, and of each completion


@dataclass(frozen=True)
class ModelShape:
    """What the cost of a decoder depends on. windows: each layer's attention window, None where it has none."""

    hidden: int
    heads: int
    head_dim: int
    vocabulary: int
    block_weights: int  # of one layer; of the experts only those that a token meets
    windows: tuple[int | None, ...]

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> ModelShape:
        """Read a Hugging Face config (gated MLPs, as all decoders of the Llama family have)."""
        config = config.get_text_config()
        d, heads = config.hidden_size, config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or d // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        experts = getattr(config, "num_experts_per_tok", None)
        if experts:
            mlp = 3 * d * experts * (getattr(config, "moe_intermediate_size", None) or config.intermediate_size)
            mlp += d * (getattr(config, "num_experts", None) or config.num_local_experts)
        else:
            mlp = 3 * d * config.intermediate_size
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        window = getattr(config, "sliding_window", None)
        if not getattr(config, "layer_types", None) and window and getattr(config, "use_sliding_window", True):
            kinds = ["sliding_attention"] * config.num_hidden_layers
        return cls(
            hidden=d,
            heads=heads,
            head_dim=head_dim,
            vocabulary=config.vocab_size,
            block_weights=2 * d * heads * head_dim + 2 * d * kv_heads * head_dim + mlp,
            windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
        )


def num_tokens(lengths: Lengths, *, shared: bool) -> int:
    """T: tokens that the model encodes for one group."""
    prompt, completions = lengths
    return prompt + sum(completions) if shared else sum(prompt + length for length in completions)


def num_pairs(lengths: Lengths, *, shared: bool, window: int | None = None) -> int:
    """A: (query, key) pairs that one layer attends to for one group."""
    prompt, completions = lengths
    whole = sum(_causal_pairs(prompt + length, window) for length in completions)
    return whole - (len(completions) - 1) * _causal_pairs(prompt, window) if shared else whole


def num_head_rows(lengths: Lengths, *, shared: bool) -> int:
    """R: rows for which the LM head computes logits; completions of one prompt share the row of their first token."""
    filled = [length for length in lengths[1] if length]
    return sum(filled) - len(filled) + bool(filled) if shared else sum(filled)


def forward_flops(shape: ModelShape, groups: Sequence[Lengths], *, shared: bool) -> float:
    """Floating-point operations of one forward pass over all groups."""
    blocks, attention, head = _parts(shape, groups, shared)
    return 2 * blocks + 4 * attention + 2 * head


def training_flops(shape: ModelShape, groups: Sequence[Lengths], *, shared: bool, checkpointing: bool = False) -> float:
    """Floating-point operations of one forward and backward pass; checkpointing: every layer is computed again."""
    blocks, attention, head = _parts(shape, groups, shared)
    return (8 if checkpointing else 6) * blocks + (18 if checkpointing else 14) * attention + 6 * head


def speedup_limit(shape: ModelShape, groups: Sequence[Lengths], *, checkpointing: bool = False) -> float:
    """How many times faster sharing can make a training step at equal hardware efficiency."""
    repeated = training_flops(shape, groups, shared=False, checkpointing=checkpointing)
    return repeated / training_flops(shape, groups, shared=True, checkpointing=checkpointing)


def _parts(shape: ModelShape, groups: Sequence[Lengths], shared: bool) -> tuple[float, float, float]:
    """Multiplications by weights of the blocks, of one attention product over all layers, and of the LM head."""
    tokens = sum(num_tokens(group, shared=shared) for group in groups)
    rows = sum(num_head_rows(group, shared=shared) for group in groups)
    pairs = {w: sum(num_pairs(group, shared=shared, window=w) for group in groups) for w in set(shape.windows)}
    return (
        float(len(shape.windows) * shape.block_weights * tokens),
        float(shape.heads * shape.head_dim * sum(pairs[window] for window in shape.windows)),
        float(shape.hidden * shape.vocabulary * rows),
    )


def _causal_pairs(length: int, window: int | None) -> int:
    """Pairs of a sequence whose tokens see themselves and the window - 1 tokens before them."""
    if window is None or length <= window:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window
