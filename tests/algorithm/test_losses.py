"""The policy loss against the papers, written out token by token in Python, and against numbers worked out by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from raygrpo.algorithm import Totals, policy_loss
from raygrpo.config import AlgorithmConfig
from tests.algorithm.batches import Batch, random_batch


def paper_loss(batch: Batch, settings: AlgorithmConfig) -> Tensor:
    """The formulas of docs/algorithms.md, one completion and one token at a time; no code shared with the package."""
    rollouts = []
    for i in range(batch.num_rollouts):
        positions = [t for t in range(len(batch.rollout_index)) if batch.rollout_index[t] == i and batch.loss_mask[t]]
        if positions:
            rollouts.append((batch.advantages[i], positions))
    num_tokens = sum(len(positions) for _, positions in rollouts)

    def at_level(values: list[Tensor], t: int, level: str) -> Tensor:
        if level == "token":
            return values[t]
        return sum(values) / (len(values) if level == "sequence_mean" else 1)

    loss = torch.zeros((), dtype=torch.float64)
    for advantage, positions in rollouts:
        log_ratios = [batch.logprobs[p] - batch.old_logprobs[p] for p in positions]
        mismatches = [batch.old_logprobs[p] - batch.behaviour_logprobs[p] for p in positions]
        summed = torch.zeros((), dtype=torch.float64)
        for t, p in enumerate(positions):
            r = at_level(log_ratios, t, settings.ratio).exp()
            clipped = min(max(r.item(), 1 - settings.clip_low), 1 + settings.clip_high)
            if settings.loss == "cispo":
                token = -clipped * advantage * batch.logprobs[p]
            elif settings.loss == "sapo":
                tau = settings.sapo_temperature_positive if advantage > 0 else settings.sapo_temperature_negative
                token = -4 / tau / (1 + (-tau * (r - 1)).exp()) * advantage
            else:
                token = -(r * advantage if r * advantage <= clipped * advantage else clipped * advantage)
                if settings.dual_clip is not None and advantage < 0 and r > settings.dual_clip:
                    token = -settings.dual_clip * advantage
            if settings.correction.level != "none":
                weight = at_level(mismatches, t, settings.correction.level).exp().item()
                low, high = settings.correction.floor, settings.correction.cap
                if settings.correction.action == "mask":
                    weight = weight if low <= weight <= high else 0.0
                else:
                    weight = min(max(weight, low), high)
                token = weight * token
            d = batch.ref_logprobs[p] - batch.logprobs[p]
            kl = {"k1": -d, "k2": d * d / 2, "k3": d.exp() - d - 1}[settings.kl.estimator]
            token = token + settings.kl.coef * kl - settings.entropy_coef * batch.entropy[p]
            summed = summed + token
        if settings.aggregation == "token_mean":
            loss = loss + summed / num_tokens
        elif settings.aggregation == "sequence_mean":
            loss = loss + summed / len(positions) / len(rollouts)
        else:
            loss = loss + summed / settings.aggregation_length / len(rollouts)
    return loss


def our_loss(batch: Batch, settings: AlgorithmConfig) -> tuple[Tensor, dict[str, Tensor]]:
    return policy_loss(
        batch.logprobs,
        batch.old_logprobs,
        batch.advantages,
        batch.loss_mask,
        batch.rollout_index,
        settings,
        behaviour_logprobs=batch.behaviour_logprobs,
        ref_logprobs=batch.ref_logprobs,
        entropy=batch.entropy,
    )


SURROGATES = [
    {"loss": "ppo_clip", "clip_high": 0.28},
    {"loss": "ppo_clip", "dual_clip": 1.5},
    {"loss": "cispo", "clip_low": 0.3},
    {"loss": "sapo", "sapo_temperature_positive": 0.7, "sapo_temperature_negative": 1.9},
]
LEVELS = ["token", "sequence", "sequence_mean"]
REST = [
    {"aggregation": "token_mean", "correction": {"level": "none"}, "kl": {"coef": 0.3, "estimator": "k1"}},
    {"aggregation": "sequence_mean", "correction": {"level": "token", "cap": 1.2}, "kl": {"coef": 0.3}},
    {
        "aggregation": "sequence_sum",
        "aggregation_length": 50,
        "correction": {"level": "sequence", "action": "mask", "floor": 0.5, "cap": 1.5},
        "kl": {"coef": 0.3, "estimator": "k2"},
    },
    {
        "aggregation": "sequence_sum",
        "aggregation_length": 3,
        "correction": {"level": "sequence_mean", "action": "truncate", "floor": 0.9, "cap": 1.1},
        "entropy_coef": 0.2,
    },
]


@pytest.mark.parametrize("surrogate, level, rest", list(itertools.product(SURROGATES, LEVELS, REST)))
def test_loss_and_gradients_are_those_of_the_formulas(surrogate: dict, level: str, rest: dict) -> None:
    batch = random_batch(11, lengths=[3, 0, 5, 1, 2, 4], spread=0.6)
    batch.loss_mask[batch.rollout_index == 3] = False
    settings = AlgorithmConfig(ratio=level, **surrogate, **rest)
    expected = paper_loss(batch, settings)
    loss, _ = our_loss(batch, settings)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    for leaf in (batch.logprobs, batch.entropy):
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True, materialize_grads=True)
        (expected_gradient,) = torch.autograd.grad(expected, leaf, retain_graph=True, materialize_grads=True)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-13)


def one_token(ratio: float, advantage: float, **config: object) -> tuple[float, float]:
    """Loss and its derivative in the log-probability log(0.5), of a single token with this ratio."""
    logprobs = torch.tensor([math.log(0.5)], dtype=torch.float64, requires_grad=True)
    loss, _ = policy_loss(
        logprobs,
        logprobs.detach() - math.log(ratio),
        torch.tensor([advantage], dtype=torch.float64),
        torch.tensor([True]),
        torch.tensor([0]),
        AlgorithmConfig(**config),
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.item(), gradient.item()


@pytest.mark.parametrize(
    "ratio, advantage, config, loss, gradient",
    [
        (1.1, 2.0, {}, -2.2, -2.2),  # inside the clip: d/dx of exp(x - old) A is the ratio itself
        (1.5, 2.0, {}, -2.4, 0.0),  # above, pushed further up: clipped
        (1.5, -2.0, {}, 3.0, 3.0),  # above, pulled back: not clipped
        (0.5, 2.0, {}, -1.0, -1.0),
        (0.5, -2.0, {}, 1.6, 0.0),
        (1.25, 2.0, {"clip_high": 0.28}, -2.5, -2.5),  # clip-higher
        (5.0, -2.0, {"dual_clip": 3.0}, 6.0, 0.0),
        (2.0, -2.0, {"dual_clip": 3.0}, 4.0, 4.0),
        (5.0, 2.0, {"dual_clip": 3.0}, -2.4, 0.0),
        (3.0, 2.0, {"loss": "cispo", "clip_high": 0.5}, -1.5 * 2 * math.log(0.5), -3.0),
        (0.1, -2.0, {"loss": "cispo", "clip_low": 1.0}, 0.1 * 2 * math.log(0.5), 0.2),
        (0.1, -2.0, {"loss": "cispo", "clip_low": 0.2}, 0.8 * 2 * math.log(0.5), 1.6),
        (1.0, 2.0, {"loss": "sapo"}, -4.0, -2.0),  # on-policy: slope 1 times A, as PPO
        (1.0, -2.0, {"loss": "sapo"}, 4 / 1.05, 2.0),
    ],
)
def test_numbers_by_hand(ratio: float, advantage: float, config: dict, loss: float, gradient: float) -> None:
    assert one_token(ratio, advantage, **config) == (pytest.approx(loss, rel=1e-12), pytest.approx(gradient, rel=1e-12))


def test_gspo_ratio_is_the_geometric_mean_and_rloo_ratio_the_product() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    old = logprobs - torch.tensor([0.3, 0.0, 0.0], dtype=torch.float64)
    arguments = (logprobs, old, torch.ones(1), torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.long))
    wide = {"clip_low": 1.0, "clip_high": 9.0}
    assert policy_loss(*arguments, AlgorithmConfig(ratio="sequence_mean", **wide))[0].item() == -math.exp(0.3 / 3)
    assert policy_loss(*arguments, AlgorithmConfig(ratio="sequence", **wide))[0].item() == -math.exp(0.3)
    token = policy_loss(*arguments, AlgorithmConfig(**wide))[0].item()
    assert token == pytest.approx(-(math.exp(0.3) + 2) / 3, rel=1e-15)


@pytest.mark.parametrize("loss", ["ppo_clip", "cispo", "sapo"])
@pytest.mark.parametrize("level", LEVELS)
def test_the_only_update_of_a_step_has_the_gradient_of_reinforce(loss: str, level: str) -> None:
    # At ratio 1 every surrogate's slope is A grad log p; a whole-sequence ratio repeats a sequence's sum on each token.
    batch = random_batch(5)
    settings = AlgorithmConfig(loss=loss, ratio=level, aggregation="sequence_mean")
    arguments = (batch.advantages, batch.loss_mask, batch.rollout_index, settings)
    value, metrics = policy_loss(batch.logprobs, None, *arguments)
    (gradient,) = torch.autograd.grad(value, batch.logprobs)
    counts = torch.bincount(batch.rollout_index[batch.loss_mask], minlength=batch.num_rollouts)
    scale = torch.ones_like(batch.advantages) if level == "sequence" and loss != "cispo" else 1 / counts.double()
    expected = -(batch.advantages * scale)[batch.rollout_index] * batch.loss_mask / batch.num_rollouts
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
    assert metrics["policy/approx_kl"] == 0 and metrics["policy/ratio_max"] == 1


def test_what_is_masked_is_never_looked_at() -> None:
    batch = random_batch(6)
    settings = AlgorithmConfig(kl={"coef": 0.1}, entropy_coef=0.1, ratio="sequence_mean")
    expected, expected_metrics = our_loss(batch, settings)
    (expected_gradient,) = torch.autograd.grad(expected, batch.logprobs)
    with torch.no_grad():
        for values in (batch.logprobs, batch.old_logprobs, batch.behaviour_logprobs, batch.ref_logprobs, batch.entropy):
            values[~batch.loss_mask] = math.nan
    loss, metrics = our_loss(batch, settings)
    (gradient,) = torch.autograd.grad(loss, batch.logprobs)
    assert loss == expected and torch.equal(gradient, expected_gradient) and metrics == expected_metrics


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum"])
def test_a_step_where_nothing_counts_has_loss_zero_and_gradient_zero(aggregation: str) -> None:
    settings = AlgorithmConfig(aggregation=aggregation, aggregation_length=8, kl={"coef": 0.1}, entropy_coef=0.1)
    filtered = random_batch(7)
    filtered.loss_mask[:] = False
    for batch in (filtered, random_batch(8, lengths=[0, 0, 0])):
        loss, metrics = our_loss(batch, settings)
        assert loss.item() == 0.0
        (gradient,) = torch.autograd.grad(loss, batch.logprobs)
        assert gradient.shape == batch.logprobs.shape and not gradient.any()
        assert all(value == 0 for value in metrics.values())


def test_an_empty_micro_batch_of_a_full_step_contributes_nothing() -> None:
    batch = random_batch(9, lengths=[0, 0])
    loss, metrics = policy_loss(
        batch.logprobs,
        None,
        batch.advantages,
        batch.loss_mask,
        batch.rollout_index,
        AlgorithmConfig(),
        totals=Totals(99, 7),
    )
    assert loss.item() == 0.0 and loss.requires_grad and metrics["policy/loss"] == 0


def test_one_token_in_all() -> None:
    batch = random_batch(10, lengths=[0, 1, 0])
    batch.advantages[1] = 1.5
    for aggregation in ("token_mean", "sequence_mean"):
        loss, _ = policy_loss(
            batch.logprobs,
            None,
            batch.advantages,
            batch.loss_mask,
            batch.rollout_index,
            AlgorithmConfig(aggregation=aggregation),
        )
        assert loss.item() == -1.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", LEVELS)
def test_ratios_that_overflow_half_precision_stay_finite(dtype: torch.dtype, level: str) -> None:
    logprobs = torch.tensor([-0.1, -0.2, -90.0, -0.3], dtype=dtype, requires_grad=True)
    old = torch.tensor([-100.0, -0.2, -0.1, -0.3], dtype=dtype)
    for loss_name in ("ppo_clip", "cispo", "sapo"):
        settings = AlgorithmConfig(loss=loss_name, ratio=level, kl={"coef": 0.1}, correction={"cap": 5.0})
        loss, metrics = policy_loss(
            logprobs,
            old,
            torch.tensor([-1.0, 1.0]),
            torch.ones(4, dtype=torch.bool),
            torch.tensor([0, 0, 1, 1]),
            settings,
            behaviour_logprobs=old - 60,
            ref_logprobs=old,
        )
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert loss.dtype == torch.float32 and loss.isfinite() and gradient.isfinite().all()
        assert all(value.isfinite() for value in metrics.values())
        if level == "token":
            assert metrics["policy/ratio_max"].item() == pytest.approx(math.exp(20), rel=1e-6)
        assert metrics["sampling/logprob_diff"].item() == pytest.approx(60, rel=0.02)


def test_half_precision_costs_only_the_rounding_of_its_inputs() -> None:
    batch = random_batch(12, dtype=torch.bfloat16)
    double = random_batch(12, dtype=torch.bfloat16)
    for name in ("logprobs", "old_logprobs", "behaviour_logprobs", "ref_logprobs", "entropy", "advantages"):
        setattr(double, name, getattr(double, name).detach().double())
    settings = AlgorithmConfig(kl={"coef": 0.1})
    loss, expected = our_loss(batch, settings)[0], our_loss(double, settings)[0]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_what_a_setting_needs_is_asked_for() -> None:
    batch = random_batch(0)
    arguments = (batch.logprobs, None, batch.advantages, batch.loss_mask, batch.rollout_index)
    with pytest.raises(ValueError, match=r"kl\.coef is 0\.04 .* ref_logprobs"):
        policy_loss(*arguments, AlgorithmConfig(preset="grpo"))
    with pytest.raises(ValueError, match=r"entropy_coef is 0\.1: policy_loss needs entropy"):
        policy_loss(*arguments, AlgorithmConfig(entropy_coef=0.1))
    with pytest.raises(ValueError, match="set aggregation_length"):
        policy_loss(*arguments, AlgorithmConfig(preset="dr_grpo"))


def test_a_steered_coefficient_replaces_the_configured_one() -> None:
    batch = random_batch(0)
    arguments = (batch.logprobs, None, batch.advantages, batch.loss_mask, batch.rollout_index)
    steered, _ = policy_loss(
        *arguments, AlgorithmConfig(kl={"coef": 0.1}), ref_logprobs=batch.ref_logprobs, kl_coef=0.5
    )
    configured, _ = policy_loss(*arguments, AlgorithmConfig(kl={"coef": 0.5}), ref_logprobs=batch.ref_logprobs)
    assert steered == configured
