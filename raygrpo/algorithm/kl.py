"""KL divergence of the policy from a frozen reference: estimators, penalty in the reward, adaptive coefficient."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from raygrpo.algorithm.segments import segment_sum
from raygrpo.algorithm_config import AlgorithmConfig

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: beyond it a ratio is an outlier, and in float32 its products would overflow


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Per-token estimate of KL(policy || reference), same shape as logprobs, differentiable in them.

    With d = ref_logprobs - logprobs (Schulman, "Approximating KL divergence", 2020): k1 = -d, unbiased, of either
    sign; k2 = d^2 / 2, biased, and its gradient is that of the KL; k3 = exp(d) - d - 1, unbiased and never
    negative. In the loss, k1's gradient has mean 0: use it in the reward. For k3, d is capped at 20; the capped
    token has no gradient.
    """
    difference = ref_logprobs - logprobs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    difference = difference.clamp(max=MAX_LOG_RATIO)
    return torch.expm1(difference) - difference


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, log_ratio: Tensor, settings: AlgorithmConfig) -> Tensor:
    """The penalty of each token in the loss, before its coefficient; same shape as logprobs.

    Its value is settings.kl.estimator (weighted for "ratio"), its gradient by settings.kl.gradient:
      estimator  the estimator's own; for k1 its mean is 0, for k3 it is that of KL(reference || policy)
      k2         that of k2 in place of the estimator's: on-policy that of KL(policy || reference)
      ratio      of the estimator times the policy ratio exp(log_ratio), through both: the same also after several
                 updates (DeepSeek-V3.2, arXiv:2512.02556, section 3.1)
    """
    estimate = kl_estimate(logprobs, ref_logprobs, settings.kl.estimator)
    if settings.kl.gradient == "k2":
        square = kl_estimate(logprobs, ref_logprobs, "k2")
        return estimate.detach() + square - square.detach()
    if settings.kl.gradient == "ratio":
        return estimate * log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return estimate


def kl_reward(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    loss_mask: Tensor,
    rollout_index: Tensor,
    settings: AlgorithmConfig,
    *,
    num_rollouts: int,
    kl_coef: float | None = None,
) -> Tensor:
    """What to add to each rollout's reward, [R]: minus the coefficient times the KL estimate summed over its tokens
    (Ouyang et al., arXiv:2203.02155, equation 2; RLOO and REINFORCE++ keep the KL there).

    logprobs, ref_logprobs, loss_mask, rollout_index: [S]. logprobs are those of the policy that sampled, in the
    learner's numerics. kl_coef: the steered coefficient (`adapt_kl_coef`); None: settings.kl.coef. No gradient flows.
    """
    counted = loss_mask.bool()
    estimate = kl_estimate(logprobs.detach()[counted].double(), ref_logprobs[counted].double(), settings.kl.estimator)
    summed = segment_sum(estimate, rollout_index[counted], num_rollouts)
    coef = settings.kl.coef if kl_coef is None else kl_coef
    return (-coef * summed).to(torch.float64 if logprobs.dtype == torch.float64 else torch.float32)


def adapt_kl_coef(kl_coef: float, mean_kl: float, num_rollouts: int, settings: AlgorithmConfig) -> float:
    """The coefficient for the next step, after `num_rollouts` completions whose tokens had `mean_kl` on average
    (`policy/kl`).

    Proportional control in log space (Ziegler et al., arXiv:1909.08593, section 2.2): error = clip(mean_kl / target
    - 1, -0.2, 0.2), coefficient *= 1 + error * num_rollouts / horizon. Unchanged where settings.kl.target is None.
    """
    if settings.kl.target is None:
        return kl_coef
    error = min(max(mean_kl / settings.kl.target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_rollouts / settings.kl.horizon)
