"""Tiny randomly initialised causal language models, with a real tokenizer and chat template, for tests.

Everything is written to a directory as `save_pretrained` does it, so that transformers, vLLM and the learner load it
like any other model. The weights are drawn from `seed`; their scale is large enough for the next-token distribution to
be far from uniform, so that a wrong weight, position or mask shows in the log-probabilities.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


def tiny_model(
    directory: str | Path,
    architecture: str = "qwen3",
    *,
    tie: bool = True,
    seed: int = 0,
    vocab_size: int = 320,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    max_positions: int = 512,
    dtype: str = "float32",
    **config: Any,
) -> Path:
    """Write a model and its tokenizer into `directory` and return the directory.

    architecture: a `model_type` of transformers ("qwen3", "llama", "qwen2", "gemma3_text", ...); `config` adds settings
    of its own.
    tie: whether the output head shares the embedding's weight.
    head_dim: a multiple of 32, for vLLM's CPU attention.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    tokenizer = tiny_tokenizer(vocab_size)
    settings = dict(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tie,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if architecture == "qwen2":  # has no head_dim of its own: vLLM derives it from the hidden size
        settings["hidden_size"] = num_heads * head_dim
        del settings["head_dim"]
    model_config = AutoConfig.for_model(architecture, **settings | config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms' weights start at one (or zero) and biases at zero: make them matter
                torch.nn.init.normal_(parameter, mean=parameter.detach().mean().item(), std=0.1)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)


def tiny_tokenizer(vocab_size: int = MIN_VOCAB_SIZE) -> Any:
    """A byte-level tokenizer: every text has a spelling, one token per byte. Ids above the bytes and special tokens are
    fillers that decode to `<filler_i>`, so that a model of `vocab_size` can never sample an id that the tokenizer does
    not know.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size must be at least {MIN_VOCAB_SIZE} (bytes and special tokens), got {vocab_size}")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fillers = [f"<filler_{i}>" for i in range(vocab_size - MIN_VOCAB_SIZE)]
    vocab = {token: i for i, token in enumerate([*alphabet, *SPECIAL_TOKENS, *fillers])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
