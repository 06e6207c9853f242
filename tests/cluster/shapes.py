"""Shapes of the models that cluster/runs names, as their configurations say: no hub is asked in tests."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedConfig, Qwen2Config, Qwen3Config

CLUSTER = Path(__file__).parents[2] / "cluster"
SIZES = ("1.5b", "8b", "32b")
PROMPT_TOKENS = 300  # GSM8K's longest question in Qwen's tokens is shorter
SHAPES: dict[str, PreTrainedConfig] = {
    "1.5b": Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "8b": Qwen3Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
    ),
    "32b": Qwen3Config(
        vocab_size=151936, hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
    ),
}  # fmt: skip
