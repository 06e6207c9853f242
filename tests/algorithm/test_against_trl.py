"""Values and gradients equal TRL 1.16's, in float64, for every variant both have."""

from __future__ import annotations

import pytest
import torch

from raygrpo.algorithm import Totals, batch_totals, compute_advantages, correction_weights, kl_reward, policy_loss
from raygrpo.config import AlgorithmConfig
from tests.algorithm import peers
from tests.algorithm.batches import random_batch

SEEDS = range(3)
EXACT = {"rtol": 1e-12, "atol": 1e-13}

# Our settings, TRL's. cap of TRL's CISPO is its epsilon_high: ours is 1 + clip_high.
LOSSES = {
    "grpo": ({"aggregation": "sequence_mean"}, {"loss_type": "grpo"}),
    "dapo": ({"clip_high": 0.28}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dr_grpo": (
        {"aggregation": "sequence_sum", "aggregation_length": 37},
        {"loss_type": "dr_grpo", "max_completion_length": 37},
    ),
    "dual clip": ({"dual_clip": 1.3}, {"loss_type": "dapo", "delta": 1.3}),
    "gspo": (
        {"preset": "gspo"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    ),
    "cispo": ({"loss": "cispo", "clip_low": 1.0, "clip_high": 0.2}, {"loss_type": "cispo", "epsilon_high": 1.2}),
    "sapo": ({"preset": "sapo"}, {"loss_type": "sapo"}),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", SEEDS)
def test_policy_loss_and_gradient(name: str, seed: int) -> None:
    ours, theirs = LOSSES[name]
    batch = random_batch(seed)
    mask = batch.padded(batch.loss_mask)
    expected, logged = peers.trl_grpo_loss(
        batch.padded(batch.logprobs), batch.padded(batch.old_logprobs), batch.advantages, mask, **theirs
    )
    loss, metrics = policy_loss(
        batch.logprobs,
        batch.old_logprobs,
        batch.advantages,
        batch.loss_mask,
        batch.rollout_index,
        AlgorithmConfig(**ours),
    )
    torch.testing.assert_close(loss, expected, **EXACT)
    (gradient,) = torch.autograd.grad(loss, batch.logprobs)
    (expected_gradient,) = torch.autograd.grad(expected, batch.logprobs)
    torch.testing.assert_close(gradient, expected_gradient, **EXACT)
    assert expected_gradient.norm() > 1e-3
    if (
        "clip_ratio/region_mean" in logged and name != "gspo"
    ):  # for sequences TRL counts each once, we count their tokens
        assert metrics["policy/clip_fraction"].item() == pytest.approx(logged["clip_ratio/region_mean"][0], rel=1e-6)
        assert metrics["policy/clip_fraction_low"].item() == pytest.approx(logged["clip_ratio/low_mean"][0], rel=1e-6)


@pytest.mark.parametrize("gradient, corrected", [("estimator", False), ("ratio", True)])
def test_kl_in_the_loss(gradient: str, corrected: bool) -> None:
    batch = random_batch(0)
    expected, logged = peers.trl_grpo_loss(
        batch.padded(batch.logprobs),
        batch.padded(batch.old_logprobs),
        batch.advantages,
        batch.padded(batch.loss_mask),
        beta=0.07,
        use_bias_correction_kl=corrected,
        ref_logprobs=batch.padded(batch.ref_logprobs),
    )
    settings = AlgorithmConfig(kl={"coef": 0.07, "gradient": gradient})
    loss, metrics = policy_loss(
        batch.logprobs,
        batch.old_logprobs,
        batch.advantages,
        batch.loss_mask,
        batch.rollout_index,
        settings,
        ref_logprobs=batch.ref_logprobs,
    )
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(
        torch.autograd.grad(loss, batch.logprobs), torch.autograd.grad(expected, batch.logprobs), **EXACT
    )
    if not corrected:
        assert metrics["policy/kl"].item() == pytest.approx(logged["kl"][0], rel=1e-6)


def test_entropy_bonus() -> None:
    batch = random_batch(1)
    expected, _ = peers.trl_grpo_loss(
        batch.padded(batch.logprobs),
        batch.padded(batch.old_logprobs),
        batch.advantages,
        batch.padded(batch.loss_mask),
        entropy=batch.padded(batch.entropy),
        entropy_coef=0.03,
    )
    loss, _ = policy_loss(
        batch.logprobs,
        batch.old_logprobs,
        batch.advantages,
        batch.loss_mask,
        batch.rollout_index,
        AlgorithmConfig(entropy_coef=0.03),
        entropy=batch.entropy,
    )
    torch.testing.assert_close(loss, expected, **EXACT)
    leaves = [batch.logprobs, batch.entropy]
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), **EXACT)


CORRECTIONS = {
    "token_truncate": ({"level": "token", "action": "truncate", "cap": 1.3}, None),
    "token_mask": ({"level": "token", "action": "mask", "floor": 0.6, "cap": 1.3}, 0.6),
    "sequence_truncate": ({"level": "sequence", "action": "truncate", "floor": 0.5, "cap": 1.3}, 0.5),
    "sequence_mask": ({"level": "sequence", "action": "mask", "cap": 1.3}, None),
}


@pytest.mark.parametrize("mode", CORRECTIONS)
@pytest.mark.parametrize("ratio_level", ["token", "sequence_mean"])
@pytest.mark.parametrize("seed", SEEDS)
def test_importance_weights_and_the_loss_they_weigh(mode: str, ratio_level: str, seed: int) -> None:
    correction, clip_min = CORRECTIONS[mode]
    batch = random_batch(seed)
    mask = batch.padded(batch.loss_mask)
    old, behaviour = batch.padded(batch.old_logprobs), batch.padded(batch.behaviour_logprobs)
    ratio = peers.trl_importance_ratio(old, behaviour, mask, mode=mode, clip_min=clip_min, clip_max=1.3)
    settings = AlgorithmConfig(correction=correction, aggregation="sequence_mean", ratio=ratio_level)
    counted = batch.loss_mask
    weights, _ = correction_weights(
        batch.old_logprobs[counted],
        batch.behaviour_logprobs[counted],
        batch.rollout_index[counted],
        settings,
        num_rollouts=batch.num_rollouts,
    )
    torch.testing.assert_close(weights, ratio.expand_as(old)[mask], **EXACT)
    assert 0 < (weights == (1.3 if "truncate" in mode else 0.0)).double().mean() < 1, "bounds that never or always bind"

    expected, _ = peers.trl_grpo_loss(
        batch.padded(batch.logprobs),
        old,
        batch.advantages,
        mask,
        loss_type="grpo",
        importance_sampling_level="token" if ratio_level == "token" else "sequence",
        importance_sampling_ratio=ratio,
    )
    loss, metrics = policy_loss(
        batch.logprobs,
        batch.old_logprobs,
        batch.advantages,
        batch.loss_mask,
        batch.rollout_index,
        settings,
        behaviour_logprobs=batch.behaviour_logprobs,
    )
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(
        torch.autograd.grad(loss, batch.logprobs), torch.autograd.grad(expected, batch.logprobs), **EXACT
    )
    difference = (batch.old_logprobs - batch.behaviour_logprobs)[counted].abs()
    assert metrics["sampling/logprob_diff"].item() == pytest.approx(difference.mean().item(), rel=1e-12)


def test_masked_completions_divide_as_trl_does_when_totals_count_them() -> None:
    # TRL's sequence mean counts completions without a loss token; ours does not, but takes totals from its caller.
    batch = random_batch(4)
    batch.loss_mask[batch.rollout_index == 2] = False
    expected, _ = peers.trl_grpo_loss(
        batch.padded(batch.logprobs),
        batch.padded(batch.old_logprobs),
        batch.advantages,
        batch.padded(batch.loss_mask),
        loss_type="grpo",
    )
    settings = AlgorithmConfig(aggregation="sequence_mean")
    arguments = (batch.logprobs, batch.old_logprobs, batch.advantages, batch.loss_mask, batch.rollout_index, settings)
    local = batch_totals(batch.loss_mask, batch.rollout_index, batch.num_rollouts)
    assert local.rollouts == batch.num_rollouts - 1
    with_all, _ = policy_loss(*arguments, totals=Totals(tokens=local.tokens, rollouts=batch.num_rollouts))
    torch.testing.assert_close(with_all, expected, **EXACT)
    ours, _ = policy_loss(*arguments)
    torch.testing.assert_close(ours * local.rollouts, expected * batch.num_rollouts, **EXACT)


@pytest.mark.parametrize("seed", SEEDS)
def test_rloo(seed: int) -> None:
    batch = random_batch(seed, spread=0.1)
    settings = AlgorithmConfig(preset="rloo", kl={"coef": 0.05})
    rewards = torch.rand(batch.num_rollouts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mask = batch.padded(batch.loss_mask)
    old, ref = batch.padded(batch.old_logprobs), batch.padded(batch.ref_logprobs)
    expected_advantages = peers.trl_rloo_advantages(rewards, 4, beta=0.05, old=old, ref=ref, mask=mask)
    penalised = rewards + kl_reward(
        batch.old_logprobs,
        batch.ref_logprobs,
        batch.loss_mask,
        batch.rollout_index,
        settings,
        num_rollouts=batch.num_rollouts,
    )
    advantages = compute_advantages(penalised, batch.group_index, settings)
    torch.testing.assert_close(advantages, expected_advantages, **EXACT)

    expected = peers.trl_rloo_loss(batch.padded(batch.logprobs), old, advantages, mask)
    loss, _ = policy_loss(
        batch.logprobs, batch.old_logprobs, advantages, batch.loss_mask, batch.rollout_index, settings
    )
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(
        torch.autograd.grad(loss, batch.logprobs), torch.autograd.grad(expected, batch.logprobs), **EXACT
    )


ADVANTAGES = {
    "group": ({}, "group", "sum_then_normalize"),
    "none": ({"scale": "none"}, "none", "sum_then_normalize"),
    "batch": ({"scale": "batch"}, "batch", "sum_then_normalize"),
    "gdpo": ({"per_reward": True, "whiten": "rollouts"}, "group", "normalize_then_sum"),
}


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("seed", SEEDS)
def test_advantages_of_weighted_rewards(name: str, seed: int) -> None:
    ours, scale, aggregation = ADVANTAGES[name]
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 4, (24, 3), generator=generator).double()
    weights = torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64)
    failed = torch.tensor([3, 17])
    rewards[failed] = torch.nan
    expected = peers.trl_grpo_advantages(rewards, weights, 6, scale=scale, aggregation=aggregation)
    settings = AlgorithmConfig(advantage={"eps": 1e-4, **ours})  # TRL's eps
    advantages = compute_advantages(rewards, torch.arange(24) // 6, settings, reward_weights=weights)
    # TRL forms n / (n - 1) of its variance in float32.
    torch.testing.assert_close(advantages, expected, **(EXACT if name == "none" else {"rtol": 1e-7, "atol": 1e-13}))
    assert (advantages[failed] == 0).all() and advantages.abs().max() > 0.5
