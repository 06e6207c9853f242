"""GRPO and its relatives as pure tensor functions: no Ray, no engine, no collective, no state.

Shapes: R rollouts and S completion tokens of one batch, flat and without padding. `rollout_index` [S] says which
rollout a token belongs to (0 .. R-1), `group_index` [R] which group a rollout belongs to (any integers). `settings`
is always `AlgorithmConfig`: AlgorithmConfig() for the defaults, AlgorithmConfig(preset="dapo", clip_high=0.3), sections
as mappings or objects (`raygrpo.algorithm_config`).

What a learner does in a step, in this order:

1.  Rewards of the step, [R] (or [R, K] with reward_weights), NaN for a rollout whose reward failed, and penalties [R]:
        rewards = rewards + overlong_penalty(num_tokens, max_tokens, settings)
        rewards = rewards + kl_reward(...)                  # where kl.placement is reward and kl.coef > 0
        advantages = compute_advantages(rewards, group_index, settings)
    With [R, K] rewards a penalty is one more column, of weight 1. A rank may do this for its own groups alone, unless
    `settings.advantage.needs_whole_step`: then gather rewards and group indices of all ranks first.
2.  The tokens that count:
        loss_mask = rollout_loss_mask(rollout_index, settings, failed=..., truncated=...)
3.  The denominators of one optimizer update, over all its micro-batches and ranks:
        local = batch_totals(loss_mask, rollout_index, num_rollouts)
        totals = Totals(*all_reduced_sum([local.tokens, local.rollouts]))
4.  For each micro-batch, which holds whole rollouts:
        loss, metrics = policy_loss(logprobs, old_logprobs, advantages, ..., settings, totals=totals)
        loss.backward()
    The *sum* of these losses over micro-batches and ranks is the loss of the update, and so are their gradients: an
    engine that averages gradients over ranks must be given loss * number of ranks, and no division by accumulation.
    A micro-batch without a token that counts is fine: its loss is 0 and can be backpropagated.
5.  metrics = finish_metrics(combine_metrics(metrics of every micro-batch and rank))

`old_logprobs` is the learner's own snapshot before the first of several updates, never the sampler's log-probabilities;
None means logprobs.detach(), right for the only update of a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raygrpo.algorithm_config import AlgorithmConfig

if TYPE_CHECKING:
    from raygrpo.algorithm.advantages import compute_advantages, reward_metrics
    from raygrpo.algorithm.importance import correction_weights
    from raygrpo.algorithm.kl import adapt_kl_coef, kl_estimate, kl_reward
    from raygrpo.algorithm.losses import Totals, batch_totals, policy_loss
    from raygrpo.algorithm.metrics import combine_metrics, finish_metrics
    from raygrpo.algorithm.overlong import overlong_penalty, rollout_loss_mask
    from raygrpo.algorithm.sampling import zero_spread

__all__ = [
    "AlgorithmConfig",
    "Totals",
    "adapt_kl_coef",
    "batch_totals",
    "combine_metrics",
    "compute_advantages",
    "correction_weights",
    "finish_metrics",
    "kl_estimate",
    "kl_reward",
    "overlong_penalty",
    "policy_loss",
    "reward_metrics",
    "rollout_loss_mask",
    "zero_spread",
]

_HOME = {
    "compute_advantages": "advantages",
    "reward_metrics": "advantages",
    "correction_weights": "importance",
    "adapt_kl_coef": "kl",
    "kl_estimate": "kl",
    "kl_reward": "kl",
    "Totals": "losses",
    "batch_totals": "losses",
    "policy_loss": "losses",
    "combine_metrics": "metrics",
    "finish_metrics": "metrics",
    "overlong_penalty": "overlong",
    "rollout_loss_mask": "overlong",
    "zero_spread": "sampling",
}


def __getattr__(name: str) -> Any:
    # Resolved on first use, so that the pipeline's stages can ask zero_spread without importing torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
