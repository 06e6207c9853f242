"""The cost model counts what streams hold, and reproduces published limits."""

import pytest
from hypothesis import given, settings
from transformers import AutoConfig, Gemma2Config, Qwen3Config, Qwen3MoeConfig

from raygrpo.shared_prefix import SharedPrefixBatch
from raygrpo.shared_prefix.cost import (
    ModelShape,
    forward_flops,
    num_head_rows,
    num_pairs,
    num_tokens,
    speedup_limit,
    training_flops,
)
from tests.shared_prefix.test_layout import groups_of_ids, seen_by_calls

QWEN3_8B = Qwen3Config(
    hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128, vocab_size=151936,
)  # fmt: skip
QWEN3_06B = Qwen3Config(
    hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
    head_dim=128, vocab_size=151936,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(groups_of_ids)
def test_counts_are_those_of_streams(groups):
    groups = [group for group in groups if any(group[1])]
    if not groups:
        return
    lengths = [(len(prompt), [len(member) for member in members]) for prompt, members in groups]
    shared = SharedPrefixBatch.from_groups(groups)
    assert sum(num_tokens(x, shared=True) for x in lengths) == shared.num_tokens
    assert sum(num_pairs(x, shared=True) for x in lengths) == seen_by_calls(shared).sum()
    assert sum(num_head_rows(x, shared=True) for x in lengths) == len(shared.token_rows.unique())
    repeated = SharedPrefixBatch.from_groups(groups, share=False)
    assert sum(num_tokens(x, shared=False) for x in lengths) == repeated.num_tokens
    assert sum(num_pairs(x, shared=False) for x in lengths) == seen_by_calls(repeated).sum()
    assert sum(num_head_rows(x, shared=False) for x in lengths) == len(repeated.token_rows.unique())


@pytest.mark.parametrize(
    ("config", "completion", "limits"),
    [
        (QWEN3_8B, 4096, (1.49, 1.63, 1.71)),
        (QWEN3_8B, 1024, (2.37, 3.06, 3.59)),
        (QWEN3_8B, 256, (3.32, 5.40, 7.88)),
        (QWEN3_06B, 4096, (1.34, 1.41, 1.46)),
        (QWEN3_06B, 1024, (2.11, 2.59, 2.93)),
        (QWEN3_06B, 256, (3.13, 4.86, 6.72)),
    ],
)
def test_limits_of_qwen3_at_a_prompt_of_4096(config, completion, limits):
    shape = ModelShape.from_config(config)
    for group_size, limit in zip((4, 8, 16), limits, strict=True):
        assert speedup_limit(shape, [(4096, [completion] * group_size)]) == pytest.approx(limit, abs=0.006)


def test_a_forward_is_two_flops_a_weight_and_four_a_pair():
    shape = ModelShape.from_config(QWEN3_06B)
    weights = 28 * (2 * 1024 * 2048 + 2 * 1024 * 1024 + 3 * 1024 * 3072)
    pairs, head = 28 * 2048 * 10 * 11 // 2, 1024 * 151936
    group = [(6, [4])]
    assert forward_flops(shape, group, shared=True) == 2 * weights * 10 + 4 * pairs + 2 * head * 4
    assert training_flops(shape, group, shared=True) == 6 * weights * 10 + 14 * pairs + 6 * head * 4
    extra = training_flops(shape, group, shared=True, checkpointing=True) - training_flops(shape, group, shared=True)
    assert extra == 2 * weights * 10 + 4 * pairs


def test_windows_and_experts():
    gemma = ModelShape.from_config(Gemma2Config(num_hidden_layers=4, sliding_window=8))
    assert sorted(gemma.windows, key=str) == [8, 8, None, None]
    assert num_pairs((10, [5, 3]), shared=True, window=8) == (36 + 2 * 8) + 5 * 8 + 3 * 8
    assert ModelShape.from_config(AutoConfig.for_model("mistral", sliding_window=16, num_hidden_layers=2)).windows == (
        16,
        16,
    )
    moe = Qwen3MoeConfig(hidden_size=64, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2, head_dim=16,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    assert ModelShape.from_config(moe).block_weights == 2 * 64 * 64 + 2 * 64 * 32 + 2 * 3 * 64 * 32 + 64 * 8
