from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raygrpo.algorithm import compute_advantages, reward_metrics, zero_spread
from raygrpo.config import AlgorithmConfig

WITH_BASELINE = [
    {},
    {"scale": "none"},
    {"scale": "batch"},
    {"baseline": "leave_one_out", "scale": "none"},
    {"baseline": "leave_one_out", "scale": "group"},
    {"scale": "none", "whiten": "rollouts"},
    {"scale": "none", "whiten": "tokens"},
    {"per_reward": True, "whiten": "rollouts"},
]
ALL = [*WITH_BASELINE, {"baseline": "none", "scale": "none", "whiten": "rollouts"}]


def advantages(rewards: list, groups: list[int] | None = None, **config: object) -> Tensor:
    values = torch.tensor(rewards, dtype=torch.float64)
    index = torch.zeros(len(values), dtype=torch.long) if groups is None else torch.tensor(groups)
    lengths = torch.arange(1, len(values) + 1)
    return compute_advantages(values, index, AlgorithmConfig(advantage=config), num_tokens=lengths)


def close(actual: Tensor, expected: list[float] | Tensor, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=rtol, atol=1e-13)


def test_group_of_two_right_and_two_wrong_by_the_conventions_of_the_field() -> None:
    close(advantages([1, 0, 0, 1]), [0.8660239, -0.8660239, -0.8660239, 0.8660239], rtol=1e-7)  # verl, SkyRL, slime
    close(advantages([1, 0, 0, 1], eps=1e-4), [0.8658754, -0.8658754, -0.8658754, 0.8658754], rtol=1e-7)  # TRL
    close(advantages([1, 0, 0, 1], scale="none"), [0.5, -0.5, -0.5, 0.5])  # Dr. GRPO


def test_leave_one_out_compares_with_the_mean_of_the_others() -> None:
    close(advantages([3, 0, 6], baseline="leave_one_out", scale="none"), [3 - 3, 0 - 4.5, 6 - 1.5])


def test_reinforce_pp_whitens_over_the_step() -> None:
    rewards = [1.0, 0.0, 4.0, 5.0]
    mean, deviation = 2.5, math.sqrt((1.5**2 + 2.5**2 + 1.5**2 + 2.5**2) / 3)
    expected = [(r - mean) / (deviation + 1e-6) for r in rewards]
    close(advantages(rewards, [0, 0, 1, 1], baseline="none", scale="none", whiten="rollouts"), expected)
    # With the group as baseline: centred to +-0.5, of which the unbiased deviation is sqrt(1 / 3).
    unit = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    close(advantages(rewards, [0, 0, 1, 1], scale="none", whiten="rollouts"), [unit, -unit, -unit, unit])


def test_batch_scale_divides_by_the_deviation_of_all_rewards() -> None:
    deviation = math.sqrt((1.5**2 + 2.5**2 + 1.5**2 + 2.5**2) / 3) + 1e-6
    close(advantages([1, 0, 4, 5], [0, 0, 1, 1], scale="batch"), [x / deviation for x in (0.5, -0.5, -0.5, 0.5)])


def test_gdpo_gives_a_rare_reward_the_same_voice() -> None:
    rewards = [[1.0, 100.0], [0.0, 100.0], [1.0, 0.0], [0.0, 0.0]]
    unit = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    scaled = 50 / (100 * math.sqrt(1 / 3) + 1e-6)
    total = torch.tensor([unit + scaled, scaled - unit, unit - scaled, -unit - scaled], dtype=torch.float64)
    close(advantages(rewards, per_reward=True, whiten="rollouts"), total / (total.std() + 1e-6))
    summed = advantages(rewards)  # added first, the small reward hardly counts
    assert summed[0] - summed[1] < 0.02 * (summed[0] - summed[2])


def test_reward_weights_act_before_or_after_normalising() -> None:
    rewards = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 2.0]], dtype=torch.float64)
    weights = torch.tensor([2.0, -1.0], dtype=torch.float64)
    index = torch.zeros(3, dtype=torch.long)
    summed = compute_advantages(rewards, index, AlgorithmConfig(), reward_weights=weights)
    close(summed, compute_advantages(rewards @ weights, index, AlgorithmConfig()))
    config = AlgorithmConfig(advantage={"per_reward": True})
    each = [compute_advantages(rewards[:, k], index, AlgorithmConfig()) for k in range(2)]
    close(compute_advantages(rewards, index, config, reward_weights=weights), 2 * each[0] - each[1])


@pytest.mark.parametrize("config", WITH_BASELINE)
def test_group_of_one_and_group_of_equal_rewards_give_exactly_zero(config: dict) -> None:
    # Three times 0.1 has a mean that differs from 0.1 in the last digit.
    result = advantages([0.1, 0.1, 0.1, 7.0, 1.0, 0.0, 2.0], [5, 5, 5, -2, 9, 9, 9], **config)
    assert result[:4].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert result[4:].abs().max() > 0.1


@pytest.mark.parametrize("config", ALL)
def test_a_step_of_equal_rewards_gives_exactly_zero(config: dict) -> None:
    assert advantages([0.3] * 6, [0, 0, 1, 1, 2, 2], **config).tolist() == [0.0] * 6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("config", ALL)
def test_failed_rewards_get_zero_and_leave_the_others_as_if_they_were_not_there(config: dict, bad: float) -> None:
    rewards, groups = [1.0, bad, 0.0, 3.0, bad, 2.0], [0, 0, 0, 1, 2, 1]
    result = advantages(rewards, groups, **config)
    kept = [0, 2, 3, 5]
    values = torch.tensor(rewards, dtype=torch.float64)[kept]
    index, lengths = torch.tensor(groups)[kept], torch.arange(1, 7)[kept]
    expected = compute_advantages(values, index, AlgorithmConfig(advantage=config), num_tokens=lengths)
    close(result[kept], expected)
    assert result[[1, 4]].tolist() == [0.0, 0.0]


def test_one_failed_reward_function_fails_the_rollout() -> None:
    result = advantages([[1.0, 0.0], [0.0, math.nan], [0.0, 0.0]])
    unit = 0.5 / (math.sqrt(0.5) + 1e-6)
    close(result, [unit, 0.0, -unit])


@pytest.mark.parametrize("config", ALL)
def test_no_rollouts_or_only_failed_ones(config: dict) -> None:
    assert advantages([], [], **config).shape == (0,)
    assert advantages([math.nan, math.inf], **config).tolist() == [0.0, 0.0]


def test_large_rewards_lose_no_digits_and_dtypes_are_kept() -> None:
    close(advantages([1e8 + 1, 1e8, 1e8, 1e8 + 1]), advantages([1, 0, 0, 1]), rtol=1e-7)
    index = torch.zeros(4, dtype=torch.long)
    for dtype, result in [
        (torch.float32, torch.float32),
        (torch.int64, torch.float32),
        (torch.bfloat16, torch.float32),
    ]:
        computed = compute_advantages(torch.tensor([1, 0, 0, 1], dtype=dtype), index, AlgorithmConfig())
        assert computed.dtype == result and computed[0].item() == pytest.approx(0.8660239, rel=1e-7)


def test_whitening_over_tokens_needs_their_number() -> None:
    config = AlgorithmConfig(advantage={"whiten": "tokens"})
    with pytest.raises(ValueError, match="num_tokens"):
        compute_advantages(torch.tensor([1.0, 0.0]), torch.zeros(2, dtype=torch.long), config)


def test_length_mismatch_is_refused() -> None:
    with pytest.raises(ValueError, match="3 rewards but 2 group indices"):
        compute_advantages(torch.zeros(3), torch.zeros(2, dtype=torch.long), AlgorithmConfig())


STEPS = st.lists(st.tuples(st.integers(0, 3), st.integers(-4, 4)), min_size=1, max_size=16)


@pytest.mark.parametrize("config", ALL)
@given(step=STEPS, seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_order_of_rollouts_and_names_of_groups_do_not_matter(config: dict, step: list, seed: int) -> None:
    groups, rewards = torch.tensor(step).T
    order = torch.randperm(len(step), generator=torch.Generator().manual_seed(seed))
    lengths = torch.arange(1, len(step) + 1)
    algorithm = AlgorithmConfig(advantage=config)
    straight = compute_advantages(rewards.double(), groups, algorithm, num_tokens=lengths)
    renamed = 1000 - 7 * groups[order]
    shuffled = compute_advantages(rewards[order].double(), renamed, algorithm, num_tokens=lengths[order])
    torch.testing.assert_close(shuffled, straight[order], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("config", ALL)
@given(step=STEPS)
@settings(max_examples=25, deadline=None)
def test_groups_apart_give_the_same_unless_the_whole_step_is_needed(config: dict, step: list) -> None:
    groups, rewards = torch.tensor(step).T
    algorithm = AlgorithmConfig(advantage=config)
    if algorithm.advantage.needs_whole_step:
        return
    whole = compute_advantages(rewards.double(), groups, algorithm)
    for group in groups.unique():
        alone = compute_advantages(rewards[groups == group].double(), groups[groups == group], algorithm)
        torch.testing.assert_close(alone, whole[groups == group], rtol=1e-12, atol=1e-12)


def test_what_needs_the_whole_step_says_so() -> None:
    needs = [AlgorithmConfig(advantage=config).advantage.needs_whole_step for config in ALL]
    assert needs == [False, False, True, False, False, True, True, True, True]


@given(rewards=st.lists(st.sampled_from([0.0, 0.1, 1.0, math.nan, math.inf]), max_size=6))
@settings(max_examples=100, deadline=None)
def test_a_group_without_spread_is_one_whose_advantages_are_all_zero(rewards: list[float]) -> None:
    assert zero_spread(rewards) == (not advantages(rewards, [0] * len(rewards)).any())


def test_reward_metrics_count_dead_groups_and_failures() -> None:
    rewards = torch.tensor([1.0, 0.0, 2.0, 2.0, math.nan, 5.0, math.inf])
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 3])  # one with spread; equal; one valid reward; none
    metrics = reward_metrics(rewards, groups)
    assert metrics["reward/num_failed"] == 2
    assert metrics["reward/mean"] == pytest.approx(2.0)
    assert metrics["reward/std"] == pytest.approx(torch.tensor([1.0, 0, 2, 2, 5]).std().item())
    assert metrics["reward/frac_zero_std"] == 0.75
    dead = reward_metrics(torch.tensor([math.nan]), torch.tensor([0]))
    assert dead == {"reward/num_failed": 1, "reward/mean": 0, "reward/std": 0, "reward/frac_zero_std": 1}
