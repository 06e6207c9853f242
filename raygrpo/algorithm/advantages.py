"""Rewards -> advantages: each completion relative to its group, or to the step."""

from __future__ import annotations

import torch
from torch import Tensor

from raygrpo.algorithm.segments import segment_counts, segment_sum
from raygrpo.algorithm_config import AdvantageConfig, AlgorithmConfig


def compute_advantages(
    rewards: Tensor,
    group_index: Tensor,
    settings: AlgorithmConfig,
    *,
    reward_weights: Tensor | None = None,
    num_tokens: Tensor | None = None,
) -> Tensor:
    """The advantage of each rollout, [R], by `settings.advantage`.

    rewards: [R], or [R, K] for K reward functions, whose values are multiplied by reward_weights [K] (1 where None)
    and added: before anything else, or after each has been given advantages of its own (per_reward: GDPO,
    arXiv:2601.05242). group_index: [R], equal for completions of one prompt. num_tokens: [R], loss tokens, needed
    for whiten "tokens" only.

    baseline, scale:
      group, group           (r - mean) / (std + eps) within the group         GRPO, arXiv:2402.03300, section 4.1.2
      group, none            r - mean                                          Dr. GRPO, arXiv:2503.20783
      group, batch           (r - group mean) / (std of the step's r + eps)    Lite PPO, arXiv:2508.08221
      leave_one_out, none    r - mean of the group's others                    RLOO, arXiv:2402.14740
      none, none             r, to be whitened                                 REINFORCE++, arXiv:2501.03262
    whiten: then (a - mean) / (std + eps) over the step. Standard deviations are unbiased.

    With a baseline, a group of one and a group of equal rewards give exactly 0. A rollout with a reward that is NaN
    or infinite takes no part in any mean or deviation and gets 0. Computed in float64, returned in rewards' dtype
    (float32 for integers and half precisions).
    """
    _check_shapes(rewards, group_index, reward_weights, num_tokens)
    dtype = rewards.dtype if rewards.dtype in (torch.float32, torch.float64) else torch.float32
    config = settings.advantage
    values = rewards.double() if rewards.ndim == 2 else rewards.double()[:, None]  # [R, K]
    weights = values.new_ones(values.shape[1]) if reward_weights is None else reward_weights.to(values)
    valid = values.isfinite().all(dim=1)
    values = values[valid]
    if not config.per_reward:
        # Not a matrix product, which may round equal rows differently.
        values, weights = (values * weights).sum(dim=1, keepdim=True), weights.new_ones(1)
    _, index = group_index[valid].unique(return_inverse=True)
    advantages = (_relative_to_baseline(values, index, config) * weights).sum(dim=1)
    if config.whiten != "none":
        shares = torch.ones_like(advantages)
        if config.whiten == "tokens":
            if num_tokens is None:
                raise ValueError("advantage.whiten is tokens: compute_advantages needs num_tokens")
            shares = num_tokens[valid].double()
        advantages = _whitened(advantages, shares, config.eps)
        if config.baseline != "none":
            advantages = advantages.masked_fill(_constant(values, index).all(dim=1), 0.0)
    return advantages.new_zeros(len(rewards)).masked_scatter(valid, advantages).to(dtype)


def _check_shapes(
    rewards: Tensor, group_index: Tensor, reward_weights: Tensor | None, num_tokens: Tensor | None
) -> None:
    if rewards.ndim not in (1, 2):
        raise ValueError(f"rewards are [R] or [R, K] for K reward functions; got {list(rewards.shape)}")
    if group_index.ndim != 1 or (group_index.is_floating_point() and len(group_index)):  # torch.tensor([]) is float
        raise ValueError(
            f"group_index is [R], integers; got {list(group_index.shape)}, {group_index.dtype}: for rewards in rows of "
            "one group each, flatten them and repeat each row's number"
        )
    num_rollouts, num_functions = len(rewards), rewards.shape[1] if rewards.ndim == 2 else 1
    if len(group_index) != num_rollouts:
        raise ValueError(f"{num_rollouts} rewards but {len(group_index)} group indices")
    if reward_weights is not None and reward_weights.shape != (num_functions,):
        raise ValueError(f"{num_functions} reward functions but reward_weights is {list(reward_weights.shape)}")
    if num_tokens is not None and num_tokens.shape != (num_rollouts,):
        raise ValueError(f"{num_rollouts} rewards but num_tokens is {list(num_tokens.shape)}")


def _relative_to_baseline(values: Tensor, index: Tensor, config: AdvantageConfig) -> Tensor:
    """[R, K] -> [R, K], each column by itself."""
    if config.baseline == "none" or len(values) == 0:
        return values
    counts = segment_counts(index, int(index.max()) + 1)[:, None].to(values)
    centred = values - (segment_sum(values, index, len(counts)) / counts)[index]
    result = centred
    if config.baseline == "leave_one_out":
        # r_i - (sum - r_i) / (n - 1) = (r_i - mean) * n / (n - 1)
        result = centred * (counts / (counts - 1).clamp(min=1))[index]
    if config.scale == "group":
        variance = segment_sum(centred.square(), index, len(counts)) / (counts - 1).clamp(min=1)
        result = result / (variance.sqrt()[index] + config.eps)
    elif config.scale == "batch":
        deviation = values.std(dim=0) if len(values) > 1 else values.new_zeros(values.shape[1])
        result = result / (deviation + config.eps)
    # Exactly: a mean of equal numbers may differ from them in the last digit, and eps would magnify that.
    return result.masked_fill(_constant(values, index), 0.0)


def _constant(values: Tensor, index: Tensor) -> Tensor:
    """[R, K]: whether all values of the element's group and column are the same."""
    num_groups = int(index.max()) + 1 if len(index) else 0
    where = index[:, None].expand_as(values)
    empty = values.new_zeros(num_groups, values.shape[1])
    highest = empty.scatter_reduce(0, where, values, "amax", include_self=False)
    lowest = empty.scatter_reduce(0, where, values, "amin", include_self=False)
    return (highest == lowest)[index]


def _whitened(advantages: Tensor, shares: Tensor, eps: float) -> Tensor:
    """Mean 0 and unbiased standard deviation 1, where each element counts `shares` times."""
    if len(advantages) == 0 or advantages.max() == advantages.min():
        return torch.zeros_like(advantages)
    total = shares.sum()
    centred = advantages - (shares * advantages).sum() / total.clamp(min=1)
    deviation = ((shares * centred.square()).sum() / (total - 1).clamp(min=1)).sqrt()
    return centred / (deviation + eps)


def reward_metrics(rewards: Tensor, group_index: Tensor) -> dict[str, float]:
    """What a step's total rewards [R] say, over all ranks: `reward/mean`, `reward/std` (over rollouts),
    `reward/frac_zero_std` (share of groups without spread: they teach nothing) and `reward/num_failed` (NaN or
    infinite rewards, left out of the others)."""
    values = rewards.double()
    valid = values.isfinite()
    groups, index = group_index.unique(return_inverse=True)
    metrics = {"reward/num_failed": float((~valid).sum())}
    if not valid.any():
        return metrics | {"reward/mean": 0.0, "reward/std": 0.0, "reward/frac_zero_std": 1.0}
    spread = segment_sum((~_constant(values[valid][:, None], index[valid])[:, 0]).long(), index[valid], len(groups))
    deviation = values[valid].std().item() if valid.sum() > 1 else 0.0
    return metrics | {
        "reward/mean": values[valid].mean().item(),
        "reward/std": deviation,
        "reward/frac_zero_std": (spread == 0).double().mean().item(),
    }
