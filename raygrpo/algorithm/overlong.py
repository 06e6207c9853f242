"""Completions that reach the length limit: a soft penalty in the reward, or no loss (DAPO, arXiv:2503.14476,
section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from raygrpo.algorithm_config import AlgorithmConfig


def overlong_penalty(num_tokens: Tensor, max_tokens: int, settings: AlgorithmConfig) -> Tensor:
    """What to add to each rollout's reward, [R] float32, between -penalty and 0 (equation 13).

    num_tokens: [R]. The last `settings.overlong.buffer * max_tokens` tokens are the buffer: 0 up to its start, then
    a straight line to -settings.overlong.penalty at max_tokens and beyond.
    """
    buffer = settings.overlong.buffer * max_tokens
    if buffer == 0:
        return torch.zeros_like(num_tokens, dtype=torch.float32)
    excess = (num_tokens.double() - (max_tokens - buffer)) / buffer
    return (-settings.overlong.penalty * excess.clamp(0, 1)).float()


def rollout_loss_mask(
    rollout_index: Tensor, settings: AlgorithmConfig, *, failed: Tensor, truncated: Tensor, tokens: Tensor | None = None
) -> Tensor:
    """[S] bool: true where a token counts in the loss.

    rollout_index: [S]. failed: [R] bool, rollouts without a valid reward: never a loss, nor KL, nor entropy bonus.
    truncated: [R] bool, cut off at the length limit: no loss where settings.overlong.mask. tokens: [S] bool, tokens
    that may count (those the policy sampled); None: all.
    """
    excluded = failed | truncated if settings.overlong.mask else failed
    mask = ~excluded[rollout_index]
    return mask if tokens is None else mask & tokens
