"""The loss of a step, its gradients and its metrics do not depend on how the step is cut, ordered or padded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raygrpo.algorithm import (
    Totals,
    batch_totals,
    combine_metrics,
    compute_advantages,
    finish_metrics,
    policy_loss,
)
from raygrpo.config import AlgorithmConfig
from raygrpo.presets import PRESETS
from tests.algorithm.batches import Batch, random_batch

VARIANTS = [AlgorithmConfig(preset=name, aggregation_length=9, entropy_coef=0.01) for name in PRESETS] + [
    AlgorithmConfig(
        kl={"coef": 0.1, "estimator": "k2"},
        dual_clip=2.0,
        aggregation=aggregation,
        aggregation_length=5,
        correction={"level": level, "action": action, "floor": 0.7, "cap": 1.3},
    )
    for aggregation, level, action in [
        ("token_mean", "sequence", "mask"),
        ("sequence_mean", "sequence_mean", "truncate"),
        ("sequence_sum", "token", "mask"),
    ]
]
NAMES = [*PRESETS, "sequence mask", "geometric truncation", "icepop"]
LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=10)


def loss_of(
    batch: Batch, tokens: Tensor, rollouts: Tensor, algorithm: AlgorithmConfig, totals: Totals | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The part of a batch with these tokens, in this order, of these rollouts, numbered as they come."""
    number = torch.empty(batch.num_rollouts, dtype=torch.long)
    number[rollouts] = torch.arange(len(rollouts))
    return policy_loss(
        batch.logprobs[tokens],
        batch.old_logprobs[tokens],
        batch.advantages[rollouts],
        batch.loss_mask[tokens],
        number[batch.rollout_index[tokens]],
        algorithm,
        behaviour_logprobs=batch.behaviour_logprobs[tokens],
        ref_logprobs=batch.ref_logprobs[tokens],
        entropy=batch.entropy[tokens],
        totals=totals,
    )


def whole(batch: Batch, algorithm: AlgorithmConfig) -> tuple[Tensor, tuple[Tensor, ...], dict[str, float]]:
    loss, metrics = loss_of(
        batch, torch.arange(len(batch.logprobs)), torch.arange(batch.num_rollouts), algorithm, totals=None
    )
    gradients = torch.autograd.grad(loss, [batch.logprobs, batch.entropy], materialize_grads=True)
    return loss.detach(), gradients, finish_metrics(metrics)


@pytest.mark.parametrize("algorithm", VARIANTS, ids=NAMES)
@given(lengths=LENGTHS, seed=st.integers(0, 99), data=st.data())
@settings(max_examples=20, deadline=None)
def test_ranks_micro_batches_and_order(
    algorithm: AlgorithmConfig, lengths: list[int], seed: int, data: st.DataObject
) -> None:
    batch = random_batch(seed, lengths=lengths)
    loss, gradients, metrics = whole(batch, algorithm)

    # Every rollout goes to a (rank, micro-batch) at random; some stay empty; within one, rollouts come in any order.
    places = data.draw(st.lists(st.integers(0, 5), min_size=len(lengths), max_size=len(lengths)))
    order = torch.tensor(data.draw(st.permutations(range(len(lengths)))))
    parts = [order[torch.tensor(places)[order] == place] for place in range(6)]
    tokens = [
        torch.cat([torch.empty(0, dtype=torch.long)] + [(batch.rollout_index == r).nonzero()[:, 0] for r in part])
        for part in parts
    ]
    totals = Totals(0, 0)
    for part in tokens:
        totals += batch_totals(batch.loss_mask[part], batch.rollout_index[part], batch.num_rollouts)
    assert totals == batch_totals(batch.loss_mask, batch.rollout_index, batch.num_rollouts)

    computed = [loss_of(batch, *part, algorithm, totals) for part in zip(tokens, parts, strict=True)]
    summed = [torch.zeros_like(gradient) for gradient in gradients]
    for part_loss, _ in computed:
        for total, gradient in zip(
            summed, torch.autograd.grad(part_loss, [batch.logprobs, batch.entropy], materialize_grads=True), strict=True
        ):
            total += gradient
    torch.testing.assert_close(sum(part_loss.detach() for part_loss, _ in computed), loss, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(tuple(summed), gradients, rtol=1e-10, atol=1e-13)

    ranks = [combine_metrics(metrics for _, metrics in computed[rank::2]) for rank in range(2)]
    assert finish_metrics(combine_metrics(ranks)) == pytest.approx(metrics, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("algorithm", VARIANTS, ids=NAMES)
@given(lengths=LENGTHS, seed=st.integers(0, 99), padding=st.integers(1, 5))
@settings(max_examples=10, deadline=None)
def test_padding(algorithm: AlgorithmConfig, lengths: list[int], seed: int, padding: int) -> None:
    batch = random_batch(seed, lengths=lengths)
    loss, gradients, metrics = whole(batch, algorithm)
    tail = torch.full((padding,), torch.nan, dtype=torch.float64)
    for name in ("old_logprobs", "behaviour_logprobs", "ref_logprobs"):
        setattr(batch, name, torch.cat([getattr(batch, name), tail]))
    leaves = batch.logprobs, batch.entropy
    batch.logprobs, batch.entropy = (torch.cat([leaf, tail]) for leaf in leaves)
    batch.loss_mask = torch.cat([batch.loss_mask, torch.zeros(padding, dtype=torch.bool)])
    batch.rollout_index = torch.cat([batch.rollout_index, torch.zeros(padding, dtype=torch.long)])
    padded_loss, padded_metrics = loss_of(
        batch, torch.arange(len(batch.logprobs)), torch.arange(batch.num_rollouts), algorithm, None
    )
    assert padded_loss == loss and finish_metrics(padded_metrics) == metrics
    padded_gradients = torch.autograd.grad(padded_loss, leaves, materialize_grads=True)
    assert all(map(torch.equal, padded_gradients, gradients))


def test_effective_sample_size_and_shares() -> None:
    behaviour = torch.tensor([-1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    ratios = torch.tensor([1.0, 3.0, 0.5, 0.5], dtype=torch.float64)
    algorithm = AlgorithmConfig(correction={"cap": 2.0, "floor": 0.6})
    _, metrics = policy_loss(
        behaviour + ratios.log(),
        None,
        torch.ones(1),
        torch.ones(4, dtype=torch.bool),
        torch.zeros(4, dtype=torch.long),
        algorithm,
        behaviour_logprobs=behaviour,
    )
    finished = finish_metrics(metrics)
    assert finished["sampling/is_ratio_mean"] == pytest.approx(5 / 4)
    assert finished["sampling/is_ratio_max"] == pytest.approx(3)
    assert finished["sampling/is_clipped_fraction"] == 0.75
    assert finished["sampling/effective_sample_size"] == pytest.approx(5**2 / (4 * (1 + 9 + 0.5)))
    assert finished["sampling/logprob_diff_max"] == pytest.approx(torch.tensor(3.0).log().item())
    assert "sampling/is_ratio_square_mean" not in finished


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("algorithm", VARIANTS, ids=NAMES)
def test_device(algorithm: AlgorithmConfig) -> None:
    batch = random_batch(1)
    loss, gradients, metrics = whole(batch, algorithm)
    rewards = batch.advantages[:, None]
    expected = compute_advantages(rewards, batch.group_index, algorithm, num_tokens=batch.lengths)
    for name, value in vars(batch).items():
        setattr(batch, name, value.detach().cuda().requires_grad_(value.requires_grad))
    advantages = compute_advantages(batch.advantages[:, None], batch.group_index, algorithm, num_tokens=batch.lengths)
    torch.testing.assert_close(advantages.cpu(), expected, rtol=1e-12, atol=1e-13)
    cuda_loss, cuda_metrics = policy_loss(
        batch.logprobs,
        batch.old_logprobs,
        batch.advantages,
        batch.loss_mask,
        batch.rollout_index,
        algorithm,
        behaviour_logprobs=batch.behaviour_logprobs,
        ref_logprobs=batch.ref_logprobs,
        entropy=batch.entropy,
    )
    torch.testing.assert_close(cuda_loss.cpu(), loss, rtol=1e-12, atol=1e-13)
    computed = torch.autograd.grad(cuda_loss, [batch.logprobs, batch.entropy], materialize_grads=True)
    torch.testing.assert_close(tuple(g.cpu() for g in computed), gradients, rtol=1e-11, atol=1e-13)
    assert finish_metrics(cuda_metrics) == pytest.approx(metrics, rel=1e-9, abs=1e-12)
