"""Every preset, driven as the package's docstring says, improves a policy whose expected reward is known exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raygrpo.algorithm import (
    batch_totals,
    compute_advantages,
    kl_reward,
    overlong_penalty,
    policy_loss,
    rollout_loss_mask,
)
from raygrpo.config import AlgorithmConfig
from raygrpo.presets import PRESETS

NUM_POSITIONS, NUM_TOKENS, END = 5, 4, 0
TARGET = torch.tensor([2, 1, 3, 2, 1])
GROUPS, GROUP_SIZE, STEPS = 4, 8, 40


def expected_reward(logits: Tensor) -> float:
    """Of: token t earns 1 where it is the target; END ends the completion."""
    probabilities = logits.softmax(1)
    total, alive = 0.0, 1.0
    for position in range(NUM_POSITIONS):
        total += alive * probabilities[position, TARGET[position]].item()
        alive *= 1 - probabilities[position, END].item()
    return total


def sample(logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Flat tokens and positions [S], and lengths [R]."""
    tokens = torch.multinomial(logits.softmax(1), GROUPS * GROUP_SIZE, replacement=True, generator=generator).T
    ended = (tokens == END).long().cumsum(1)
    inside = (ended == 0) | ((ended == 1) & (tokens == END))
    positions = torch.arange(NUM_POSITIONS).expand_as(tokens)
    return tokens[inside], positions[inside], inside.sum(1)


@pytest.mark.parametrize("preset", PRESETS)
def test_expected_reward_rises(preset: str) -> None:
    # A sampler with perturbed logits and one step behind, two mini-batches, two epochs: all parts are at work.
    settings = AlgorithmConfig(
        preset=preset, aggregation_length=NUM_POSITIONS, entropy_coef=1e-4, mini_batches=2, epochs=2
    )
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(NUM_POSITIONS, NUM_TOKENS, requires_grad=True)
    reference = logits.detach().clone()
    stale = logits.detach().clone()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    before = expected_reward(logits)
    for _ in range(STEPS):
        noise = 0.1 * torch.randn(logits.shape, generator=generator)
        behaviour, stale = stale + noise, logits.detach().clone()
        tokens, positions, lengths = sample(behaviour, generator)
        num_rollouts = len(lengths)
        rollout_index = torch.arange(num_rollouts).repeat_interleave(lengths)
        group_index = torch.arange(num_rollouts) // GROUP_SIZE

        def logprobs_of(table: Tensor, tokens: Tensor = tokens, positions: Tensor = positions) -> Tensor:
            return table.log_softmax(1)[positions, tokens]

        old, ref = logprobs_of(logits).detach(), logprobs_of(reference)
        hits = (tokens == TARGET[positions]).float()
        rewards = torch.zeros(num_rollouts).index_add(0, rollout_index, hits)
        rewards = rewards + overlong_penalty(lengths, NUM_POSITIONS, settings)
        mask = rollout_loss_mask(
            rollout_index,
            settings,
            failed=torch.zeros(num_rollouts, dtype=torch.bool),
            truncated=lengths == NUM_POSITIONS,
        )
        if settings.kl.placement == "reward":
            rewards = rewards + kl_reward(
                old, ref, mask, rollout_index, settings, num_rollouts=num_rollouts, kl_coef=0.01
            )
        advantages = compute_advantages(rewards, group_index, settings)
        for _ in range(settings.epochs):
            for mini_batch in range(settings.mini_batches):
                part = mask & (group_index[rollout_index] % settings.mini_batches == mini_batch)
                current = logits.log_softmax(1)
                loss, _ = policy_loss(
                    current[positions, tokens],
                    old,
                    advantages,
                    part,
                    rollout_index,
                    settings,
                    behaviour_logprobs=logprobs_of(behaviour),
                    ref_logprobs=ref,
                    entropy=-(current.exp() * current).sum(1)[positions],
                    totals=batch_totals(part, rollout_index, num_rollouts),
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    assert before == pytest.approx(sum(0.25 * 0.75**t for t in range(NUM_POSITIONS)))  # 0.76 of 5
    assert expected_reward(logits) > 4.0
