"""Sampler/learner mismatch and staleness: weights that make samples of another policy count as the learner's own.

The sampler's probabilities differ from the learner's for two reasons: another engine computes them (kernels,
precision), and its weights may be some versions older. Decoupled PPO (Hilton et al., arXiv:2110.00641) keeps the
two questions apart: the clip compares the policy with the learner's own snapshot (`old_logprobs`), and the weight
old / behaviour, without gradient, makes the expectation right.
"""

from __future__ import annotations

from torch import Tensor

from raygrpo.algorithm.kl import MAX_LOG_RATIO
from raygrpo.algorithm.segments import log_ratio_at_level
from raygrpo.algorithm_config import AlgorithmConfig


def correction_weights(
    old_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    rollout_index: Tensor,
    settings: AlgorithmConfig,
    *,
    num_rollouts: int,
) -> tuple[Tensor, Tensor]:
    """The weight of each token's loss, [S], and the ratio before its bounds were applied, [S]; no gradient.

    old_logprobs, behaviour_logprobs, rollout_index: [S], tokens that count only. By settings.correction:
      level token      the ratio old / behaviour of the token
      sequence         of its whole completion (Liu et al. 2025, "When Speed Kills Stability")
      sequence_mean    the geometric mean over its completion
      none             weight 1
      action truncate  moved into [floor, cap] (truncated importance sampling, Ionides 2008; Yao et al. 2025)
      mask             0 outside [floor, cap] (for tokens IcePop, arXiv:2510.18855)
    A log ratio beyond +-20 counts as +-20.
    """
    config = settings.correction
    log_ratio = (old_logprobs - behaviour_logprobs).detach()
    level = "token" if config.level == "none" else config.level
    log_ratio = log_ratio_at_level(log_ratio, rollout_index, num_rollouts, level)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if config.level == "none":
        return ratio.new_ones(ratio.shape), ratio
    if config.action == "truncate":
        return ratio.clamp(config.floor, config.cap), ratio
    return ratio.masked_fill((ratio < config.floor) | (ratio > config.cap), 0.0), ratio
