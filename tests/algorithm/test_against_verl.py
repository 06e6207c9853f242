"""Values and gradients equal verl 0.9.1's pure functions, in float64, for every variant both have."""

from __future__ import annotations

import pytest
import torch

from raygrpo.algorithm import (
    adapt_kl_coef,
    compute_advantages,
    correction_weights,
    kl_estimate,
    overlong_penalty,
    policy_loss,
)
from raygrpo.algorithm.kl import kl_penalty
from raygrpo.config import AlgorithmConfig
from tests.algorithm import peers
from tests.algorithm.batches import Batch, random_batch

SEEDS = range(3)
EXACT = {"rtol": 1e-12, "atol": 1e-13}
EIGHT_DIGITS = {"rtol": 1e-7, "atol": 1e-9}  # where verl adds 1e-8 to a denominator

AGGREGATIONS = {
    "token_mean": ("token-mean", EXACT),
    "sequence_mean": ("seq-mean-token-mean", EIGHT_DIGITS),
    "sequence_sum": ("seq-mean-token-sum-norm", EXACT),
}
LOSSES = {
    "clip and dual clip": ("compute_policy_loss_vanilla", {"clip_high": 0.28, "dual_clip": 1.5}),
    "gspo": ("compute_policy_loss_gspo", {"ratio": "sequence_mean", "clip_low": 0.03, "clip_high": 0.04}),
    "cispo": ("compute_policy_loss_cispo", {"loss": "cispo", "clip_low": 0.1, "clip_high": 0.3}),
    "sapo": ("compute_policy_loss_sapo", {"loss": "sapo"}),
}
CASES = [
    (name, aggregation)
    for name in LOSSES
    for aggregation in AGGREGATIONS
    if name != "sapo" or aggregation == "sequence_mean"  # verl's SAPO knows no other
]


def verl_config(settings: AlgorithmConfig) -> peers.VerlConfig:
    return peers.VerlConfig(
        clip_ratio=0.2,
        clip_ratio_low=settings.clip_low,
        clip_ratio_high=settings.clip_high,
        clip_ratio_c=settings.dual_clip,
        tau_pos=settings.sapo_temperature_positive,
        tau_neg=settings.sapo_temperature_negative,
        global_batch_info={"loss_scale_factor": settings.aggregation_length},
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name, aggregation", CASES)
@pytest.mark.parametrize("seed", SEEDS)
def test_policy_loss_and_gradient(name: str, aggregation: str, weighted: bool, seed: int) -> None:
    function, ours = LOSSES[name]
    mode, tolerance = AGGREGATIONS[aggregation]
    # With a weight for each token verl's GSPO weighs that token's part of the gradient, TRL's and ours the sequence's.
    correction = {"level": "sequence" if name == "gspo" else "token", "cap": 1.2}
    settings = AlgorithmConfig(aggregation=aggregation, aggregation_length=23, correction=correction, **ours)
    batch = random_batch(seed, spread=1.0)
    batch.loss_mask[batch.rollout_index == 3] = False  # neither library counts a completion without tokens
    mask = batch.padded(batch.loss_mask)
    behaviour = batch.behaviour_logprobs if weighted else None
    log_ratio = torch.where(batch.loss_mask, batch.old_logprobs - batch.behaviour_logprobs, 0.0)
    if name == "gspo":
        log_ratio = batch.padded(log_ratio).sum(1)[batch.rollout_index]
    weights = log_ratio.exp().clamp(max=1.2)
    expected, logged = getattr(peers.verl().core, function)(
        batch.padded(batch.old_logprobs),
        batch.padded(batch.logprobs),
        batch.advantages[:, None].expand(mask.shape),
        mask.double(),
        loss_agg_mode=mode,
        config=verl_config(settings),
        rollout_is_weights=batch.padded(weights) if weighted else None,
    )
    loss, metrics = policy_loss(
        batch.logprobs,
        batch.old_logprobs,
        batch.advantages,
        batch.loss_mask,
        batch.rollout_index,
        settings,
        behaviour_logprobs=behaviour,
    )
    torch.testing.assert_close(loss, expected, **tolerance)
    (gradient,) = torch.autograd.grad(loss, batch.logprobs)
    (expected_gradient,) = torch.autograd.grad(expected, batch.logprobs)
    torch.testing.assert_close(gradient, expected_gradient, **tolerance)
    assert expected_gradient.norm() > 1e-3
    if name != "sapo":
        assert metrics["policy/clip_fraction"].item() == pytest.approx(logged["actor/pg_clipfrac"], abs=1e-6)
    if name == "clip and dual clip":
        lower = metrics["policy/dual_clip_fraction"].item()
        assert lower == pytest.approx(logged["actor/pg_clipfrac_lower"], abs=1e-6) and lower > 0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("gradient", ["estimator", "k2"])
def test_kl_values_and_gradients(estimator: str, gradient: str) -> None:
    batch = random_batch(0)
    theirs = estimator + ("+" if gradient == "k2" else "")
    expected = peers.verl().core.kl_penalty(batch.logprobs, batch.ref_logprobs, theirs)
    settings = AlgorithmConfig(kl={"coef": 1.0, "estimator": estimator, "gradient": gradient})
    penalty = kl_penalty(batch.logprobs, batch.ref_logprobs, torch.zeros(()), settings)
    torch.testing.assert_close(penalty, expected, **EXACT)
    torch.testing.assert_close(kl_estimate(batch.logprobs, batch.ref_logprobs, estimator), expected, **EXACT)
    torch.testing.assert_close(
        torch.autograd.grad(penalty.sum(), batch.logprobs), torch.autograd.grad(expected.sum(), batch.logprobs), **EXACT
    )


def test_adaptive_kl_coefficient_over_a_run() -> None:
    settings = AlgorithmConfig(kl={"coef": 0.1, "target": 0.05, "horizon": 1000})
    controller = peers.verl().core.AdaptiveKLController(0.1, 0.05, 1000)
    coef = settings.kl.coef
    for observed in [0.2, 0.06, 0.051, 0.0, 0.04, 0.05, 3.0]:
        controller.update(observed, 64)
        coef = adapt_kl_coef(coef, observed, 64, settings)
        assert coef == pytest.approx(controller.value, rel=1e-14)
    assert coef != 0.1


def rewards_at_last_token(batch: Batch, rewards: torch.Tensor) -> torch.Tensor:
    values = torch.zeros(len(batch.rollout_index), dtype=torch.float64)
    values[batch.lengths.cumsum(0) - 1] = rewards
    return batch.padded(values)


ADVANTAGES = {
    "grpo": ("compute_grpo_outcome_advantage", {}, {}),
    "dr_grpo": ("compute_grpo_outcome_advantage", {"scale": "none"}, {"norm_adv_by_std_in_grpo": False}),
    "rloo": ("compute_rloo_outcome_advantage", {"baseline": "leave_one_out", "scale": "none"}, {}),
    "reinforce++": (
        "compute_reinforce_plus_plus_outcome_advantage",
        {"baseline": "none", "scale": "none", "whiten": "tokens", "eps": 0.0},
        {"config": peers.VerlConfig(gamma=1.0)},
    ),
    "reinforce++ baseline": (
        "compute_reinforce_plus_plus_baseline_outcome_advantage",
        {"scale": "none", "whiten": "tokens", "eps": 0.0},
        {},
    ),
}


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("seed", SEEDS)
def test_advantages(name: str, seed: int) -> None:
    function, ours, theirs = ADVANTAGES[name]
    batch = random_batch(seed, holes=False)
    mask = batch.padded(batch.loss_mask).double()
    # Large, so that verl's 1e-8 under the root of a whitening has no part in the first eight digits.
    rewards = 100 * torch.rand(batch.num_rollouts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    arguments = {"token_level_rewards": rewards_at_last_token(batch, rewards), "response_mask": mask} | theirs
    if name != "reinforce++":
        arguments["index"] = batch.group_index.numpy()
    expected, _ = getattr(peers.verl().core, function)(**arguments)
    settings = AlgorithmConfig(advantage=ours)
    advantages = compute_advantages(rewards, batch.group_index, settings, num_tokens=batch.lengths)
    tolerance = EIGHT_DIGITS if "reinforce" in name else EXACT
    torch.testing.assert_close(batch.padded(advantages[batch.rollout_index]), expected, **tolerance)
    assert advantages.abs().max() > 0.5


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("action, threshold", [("truncate", 1.4), ("mask", "0.7_1.4")])
def test_importance_weights(level: str, action: str, threshold: float | str) -> None:
    batch = random_batch(2)
    mask = batch.padded(batch.loss_mask)
    expected, _ = peers.verl().correction.compute_rollout_correction_weights(
        batch.padded(batch.old_logprobs - batch.behaviour_logprobs), mask.double(), level, threshold
    )
    floor = 0.7 if action == "mask" else 0.0
    settings = AlgorithmConfig(correction={"level": level, "action": action, "floor": floor, "cap": 1.4})
    counted = batch.loss_mask
    weights, _ = correction_weights(
        batch.old_logprobs[counted],
        batch.behaviour_logprobs[counted],
        batch.rollout_index[counted],
        settings,
        num_rollouts=batch.num_rollouts,
    )
    torch.testing.assert_close(weights, expected[mask], **EXACT)
    assert (weights != (batch.old_logprobs - batch.behaviour_logprobs)[counted].exp()).double().mean() > 0.1


def test_mismatch_metrics() -> None:
    batch = random_batch(3)
    mask = batch.padded(batch.loss_mask).double()
    expected = peers.verl().correction.compute_offpolicy_metrics(
        batch.padded(batch.old_logprobs), batch.padded(batch.behaviour_logprobs), mask
    )
    _, metrics = policy_loss(
        batch.logprobs,
        batch.old_logprobs,
        batch.advantages,
        batch.loss_mask,
        batch.rollout_index,
        AlgorithmConfig(),
        behaviour_logprobs=batch.behaviour_logprobs,
    )
    assert metrics["sampling/kl"].item() == pytest.approx(expected["k3_kl"], rel=1e-7)
    assert metrics["sampling/is_ratio_square_mean"].item() == pytest.approx(expected["chi2_token"] + 1, rel=1e-7)


def test_overlong_penalty() -> None:
    # The expression stands in verl/workers/reward_manager/dapo.py, inside a method that decodes text.
    lines = (peers.VERL / "workers" / "reward_manager" / "dapo.py").read_text().splitlines() if peers.verl() else []
    expression = next(line.split("=", 1)[1] for line in lines if line.strip().startswith("overlong_reward ="))
    settings = AlgorithmConfig(preset="dapo", overlong={"penalty": 0.7})
    lengths = [0, 1, 79, 80, 81, 95, 100]
    penalties = overlong_penalty(torch.tensor(lengths), 100, settings)
    for length, penalty in zip(lengths, penalties, strict=True):
        names = {"exceed_len": length - 80, "overlong_buffer_len": 20, "overlong_penalty_factor": 0.7}
        assert penalty.item() == pytest.approx(eval(expression, names), abs=1e-7)
