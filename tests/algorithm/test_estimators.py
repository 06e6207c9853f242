"""KL estimators and importance weights, by exact expectations over a small vocabulary: no sampling noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from raygrpo.algorithm import (
    adapt_kl_coef,
    correction_weights,
    kl_estimate,
    kl_reward,
    overlong_penalty,
    rollout_loss_mask,
)
from raygrpo.algorithm.kl import kl_penalty
from raygrpo.config import AlgorithmConfig

GENERATOR = torch.Generator().manual_seed(0)
POLICY_LOGITS = torch.randn(7, generator=GENERATOR, dtype=torch.float64)
REF = torch.randn(7, generator=GENERATOR, dtype=torch.float64).log_softmax(0)
OLD = torch.randn(7, generator=GENERATOR, dtype=torch.float64).log_softmax(0)


def expected_gradient(gradient: str, estimator: str, sampled_from: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean value of the penalty over tokens of the sampling policy, and mean gradient in the policy's logits."""
    logits = POLICY_LOGITS.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    old = logprobs.detach() if sampled_from is None else sampled_from
    settings = AlgorithmConfig(kl={"coef": 1.0, "estimator": estimator, "gradient": gradient})
    mean = (old.exp() * kl_penalty(logprobs, REF, logprobs - old, settings)).sum()
    return mean.detach(), torch.autograd.grad(mean, logits)[0]


def true_kl(forward: bool) -> tuple[Tensor, Tensor]:
    """KL(policy || reference), or the other way round, and its gradient in the policy's logits."""
    logits = POLICY_LOGITS.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    kl = (logprobs.exp() * (logprobs - REF)).sum() if forward else (REF.exp() * (REF - logprobs)).sum()
    return kl.detach(), torch.autograd.grad(kl, logits)[0]


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator: str) -> None:
    torch.testing.assert_close(expected_gradient("estimator", estimator, None)[0], true_kl(True)[0], rtol=1e-12, atol=0)


def test_gradients_are_what_the_docs_say() -> None:
    close = {"rtol": 1e-10, "atol": 1e-12}
    kl_gradient, reverse_gradient = true_kl(True)[1], true_kl(False)[1]
    torch.testing.assert_close(expected_gradient("estimator", "k1", None)[1], torch.zeros(7).double(), **close)
    torch.testing.assert_close(expected_gradient("estimator", "k2", None)[1], kl_gradient, **close)
    torch.testing.assert_close(expected_gradient("estimator", "k3", None)[1], reverse_gradient, **close)
    for estimator in ("k1", "k3"):
        torch.testing.assert_close(expected_gradient("k2", estimator, None)[1], kl_gradient, **close)
        value, gradient = expected_gradient("ratio", estimator, OLD)  # sampled from a policy some updates back
        torch.testing.assert_close(value, true_kl(True)[0], **close)
        torch.testing.assert_close(gradient, kl_gradient, **close)


def test_k3_is_never_negative_exact_near_zero_and_capped_far_away() -> None:
    logprobs = torch.tensor([-1.0, -1.0, -1.0, -50.0, -0.001], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.0, -1.0 + 1e-9, -3.0, -1.0, -80.0], dtype=torch.float64)
    values = kl_estimate(logprobs, ref, "k3")
    expected = [0.0, 5e-19, math.exp(-2) + 2 - 1, math.exp(20) - 21, 78.999]
    assert values.tolist() == pytest.approx(expected, rel=1e-6)
    (gradient,) = torch.autograd.grad(values.sum(), logprobs)
    assert gradient[3] == 0 and gradient[4] == pytest.approx(1.0)


def test_kl_in_the_reward_is_the_sum_over_a_completion_and_steerable() -> None:
    settings = AlgorithmConfig(kl={"coef": 0.5, "estimator": "k1", "placement": "reward"})
    logprobs = torch.tensor([-1.0, -2.0, -3.0, -4.0], requires_grad=True)
    ref = torch.tensor([-2.0, -2.5, math.nan, -3.0])
    arguments = (logprobs, ref, torch.tensor([True, True, False, True]), torch.tensor([0, 0, 2, 2]), settings)
    assert kl_reward(*arguments, num_rollouts=3).tolist() == [-0.75, 0.0, 0.5]
    assert kl_reward(*arguments, num_rollouts=3, kl_coef=0.1).tolist() == pytest.approx([-0.15, 0.0, 0.1])
    assert not kl_reward(*arguments, num_rollouts=3).requires_grad


def test_kl_coefficient_is_steered_towards_the_target() -> None:
    settings = AlgorithmConfig(kl={"coef": 0.1, "target": 0.05, "horizon": 100})
    assert adapt_kl_coef(0.1, 0.055, 10, settings) == pytest.approx(0.1 * 1.01)
    assert adapt_kl_coef(0.1, 9.0, 10, settings) == pytest.approx(0.1 * 1.02)  # error clipped at 0.2
    assert adapt_kl_coef(0.1, 0.0, 10, settings) == pytest.approx(0.1 * 0.98)
    assert adapt_kl_coef(0.1, 9.0, 10, AlgorithmConfig(kl={"coef": 0.1})) == 0.1


def weights_of(behaviour: Tensor, learner: Tensor, **correction: object) -> Tensor:
    settings = AlgorithmConfig(correction=correction)
    weights, _ = correction_weights(learner, behaviour, torch.arange(len(learner)), settings, num_rollouts=len(learner))
    return weights


def test_token_weights_make_expectations_those_of_the_learner() -> None:
    behaviour, learner = OLD, POLICY_LOGITS.log_softmax(0)
    value = torch.arange(7).double()
    assert (learner - behaviour).exp().max() > 2, "nothing to truncate"
    wide = weights_of(behaviour, learner, cap=1e6)
    torch.testing.assert_close((behaviour.exp() * wide * value).sum(), (learner.exp() * value).sum())
    cut = weights_of(behaviour, learner, cap=2.0)
    assert (behaviour.exp() * cut).sum() < 1 - 1e-3  # truncation trades bias for variance


def test_weights_of_a_nucleus_sampler_restore_the_policy_on_the_nucleus() -> None:
    learner = POLICY_LOGITS.log_softmax(0)
    kept = torch.topk(learner, 3).indices
    behaviour = learner[kept].log_softmax(0)  # what processed log-probabilities of a top-k sampler are
    weights = weights_of(behaviour, learner[kept])
    assert (weights < 1).all()
    torch.testing.assert_close(behaviour.exp() * weights, learner[kept].exp())


def test_levels_and_bounds_of_the_weights() -> None:
    old = torch.log(torch.tensor([0.5, 0.9, 0.4, 0.2], dtype=torch.float64))
    behaviour = torch.log(torch.tensor([0.25, 0.9, 0.8, 0.1], dtype=torch.float64))  # ratios 2, 1, 0.5, 2
    index = torch.tensor([0, 0, 1, 1])

    def weights(**correction: object) -> list[float]:
        settings = AlgorithmConfig(correction=correction)
        return correction_weights(old, behaviour, index, settings, num_rollouts=2)[0].tolist()

    approx = lambda values: pytest.approx(values, rel=1e-12)  # noqa: E731
    assert weights(cap=1.5) == approx([1.5, 1, 0.5, 1.5])
    assert weights(cap=1.5, floor=0.8) == approx([1.5, 1, 0.8, 1.5])
    assert weights(action="mask", cap=1.5) == approx([0, 1, 0.5, 0])
    assert weights(action="mask", cap=5.0, floor=0.6) == approx([2, 1, 0, 2])
    assert weights(level="sequence", cap=1.5) == approx([1.5, 1.5, 1, 1])
    assert weights(level="sequence", action="mask", cap=1.5) == approx([0, 0, 1, 1])
    assert weights(level="sequence_mean", cap=1.5) == approx([2**0.5, 2**0.5, 1, 1])
    assert weights(level="none") == [1, 1, 1, 1]


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mean", "none"])
def test_weights_carry_no_gradient(level: str) -> None:
    policy = OLD.clone().requires_grad_()
    settings = AlgorithmConfig(correction={"level": level})
    weights, ratio = correction_weights(policy, REF, torch.arange(7), settings, num_rollouts=7)
    assert not weights.requires_grad and not ratio.requires_grad


def test_overlong_penalty_is_a_ramp_at_the_end() -> None:
    settings = AlgorithmConfig(overlong={"buffer": 0.25, "penalty": 0.5})
    penalties = overlong_penalty(torch.tensor([0, 300, 301, 350, 400, 450]), 400, settings)
    assert penalties.tolist() == pytest.approx([0, 0, -0.005, -0.25, -0.5, -0.5])
    assert not overlong_penalty(torch.tensor([400]), 400, AlgorithmConfig()).any()


def test_failed_and_truncated_completions_leave_the_loss() -> None:
    index = torch.tensor([0, 0, 1, 2, 2])
    failed, truncated = torch.tensor([True, False, False]), torch.tensor([False, False, True])
    sampled = torch.tensor([True, True, True, False, True])
    arguments = {"failed": failed, "truncated": truncated}
    off, on = AlgorithmConfig(), AlgorithmConfig(overlong={"mask": True})
    assert rollout_loss_mask(index, off, **arguments).tolist() == [False, False, True, True, True]
    assert rollout_loss_mask(index, on, **arguments).tolist() == [False, False, True, False, False]
    assert rollout_loss_mask(index, off, **arguments, tokens=sampled).tolist() == [False, False, True, False, True]
