"""From token ids to the gradients of a model: what a step teaches does not depend on how it is computed.

Property-based, in float64, against one ordinary forward per completion and one call of policy_loss for the whole step.
Learners in processes of their own, under ZeRO 1 to 3, are in tests/roles/test_policy_update.py.
"""

from __future__ import annotations

from functools import cache
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raygrpo.algorithm import batch_totals, compute_advantages, policy_loss
from raygrpo.config import AlgorithmConfig
from raygrpo.shared_prefix import (
    Part,
    PassCounts,
    accumulate_gradients,
    enable_shared_prefix,
    head,
    plan_passes,
)
from tests.algorithm.test_invariance import NAMES, VARIANTS
from tests.shared_prefix.tiny import float64_norms, gradients, largest_difference, random_ids, reference, tiny_model

TEMPERATURE = 0.8
SHAPES = st.lists(  # of a step: prompt length, completion lengths
    st.tuples(st.integers(1, 12), st.lists(st.integers(0, 9), min_size=1, max_size=5)), min_size=1, max_size=4
).filter(lambda shapes: any(length for _, lengths in shapes for length in lengths))


@cache
def model() -> torch.nn.Module:
    built = tiny_model(num_hidden_layers=1)
    enable_shared_prefix(built)
    return built


class Step:
    """Random groups of given shape, and what goes with them."""

    def __init__(self, shapes: list[tuple[int, list[int]]], seed: int):
        g = torch.Generator().manual_seed(seed)
        self.groups = [(random_ids(p, g), [random_ids(c, g) for c in lengths]) for p, lengths in shapes]
        self.lengths = torch.tensor([c for _, lengths in shapes for c in lengths])
        self.group_index = torch.arange(len(shapes)).repeat_interleave(torch.tensor([len(c) for _, c in shapes]))
        self.rollout_index = torch.arange(len(self.lengths)).repeat_interleave(self.lengths)
        size = len(self.rollout_index)
        self.mask = torch.rand(size, generator=g) < 0.9
        self.rewards = torch.randint(0, 3, (len(self.lengths),), generator=g).double()
        with torch.no_grad(), float64_norms(model()):
            near = reference(model(), self.groups, TEMPERATURE)[0]
        noise = 0.4 * torch.randn(3, size, generator=g, dtype=torch.float64)
        self.old, self.behaviour, self.ref = near + noise

    def loss(
        self, logprobs: Tensor, entropy: Tensor, tokens: Tensor, rollouts: Tensor, algorithm: AlgorithmConfig
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of these tokens (indices into [S]) of these rollouts."""
        advantages = compute_advantages(self.rewards, self.group_index, algorithm, num_tokens=self.lengths)
        number = torch.full((len(self.lengths),), -1)
        number[rollouts] = torch.arange(len(rollouts))
        return policy_loss(
            logprobs,
            self.old[tokens],
            advantages[rollouts],
            self.mask[tokens],
            number[self.rollout_index[tokens]],
            algorithm,
            behaviour_logprobs=self.behaviour[tokens],
            ref_logprobs=self.ref[tokens],
            entropy=entropy,
            totals=batch_totals(self.mask, self.rollout_index, len(self.lengths)),
        )


def plain(step: Step, algorithm: AlgorithmConfig) -> tuple[float, dict[str, Tensor]]:
    logprobs, entropy = reference(model(), step.groups, TEMPERATURE)
    everything = torch.arange(len(logprobs)), torch.arange(len(step.lengths))
    loss, _ = step.loss(logprobs, entropy, *everything, algorithm)
    return loss.item(), gradients(model(), loss)


@pytest.mark.parametrize("algorithm", VARIANTS, ids=NAMES)
@given(shapes=SHAPES, seed=st.integers(0, 99), data=st.data())
@settings(max_examples=6, deadline=None)
def test_shared_prefix_order_token_budget_accumulation_padding_and_head_chunks(
    algorithm: AlgorithmConfig, shapes: list, seed: int, data: st.DataObject
) -> None:
    with float64_norms(model()):
        step = Step(shapes, seed)
        expected, wanted = plain(step, algorithm)

        order = data.draw(st.permutations(range(len(shapes))), label="order of groups")
        longest = max(p + max(lengths) for p, lengths in shapes)
        budget = data.draw(st.integers(longest, longest + 60), label="token budget")
        groups = [step.groups[index] for index in order]
        own = plan_passes(groups, budget).counts
        padded = PassCounts(own.streams + data.draw(st.integers(0, 2), label="padding"), own.split_parts)
        # Rollouts and tokens of the step, in the order of the groups.
        rollouts = torch.cat([(step.group_index == index).nonzero()[:, 0] for index in order])
        tokens = torch.cat([(step.rollout_index == rollout).nonzero()[:, 0] for rollout in rollouts])
        losses = []

        def loss_fn(logprobs: Tensor, part: Part) -> Tensor:
            loss, _ = step.loss(logprobs, part.entropy, tokens[part.tokens], rollouts[part.completions], algorithm)
            losses.append(loss.item())
            return loss

        model().zero_grad(set_to_none=True)
        with mock.patch.dict(head.CHUNK_ROWS, cpu=data.draw(st.integers(1, 40), label="rows of a chunk of the head")):
            accumulate_gradients(model(), groups, loss_fn, budget, temperature=TEMPERATURE, entropy=True, counts=padded)
        found = {name: p.grad.clone() for name, p in model().named_parameters() if p.grad is not None}
    assert sum(losses) == pytest.approx(expected, rel=1e-9, abs=1e-11)
    assert_close(found, wanted)


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """To 1e-9 of the largest gradient (of a step that teaches nothing, all are 0 but for rounding)."""
    assert found.keys() == wanted.keys()
    if max(gradient.abs().max() for gradient in wanted.values()) < 1e-12:
        assert max(gradient.abs().max() for gradient in found.values()) < 1e-12
    else:
        assert largest_difference(found, wanted) < 1e-9


@pytest.mark.parametrize("algorithm", VARIANTS, ids=NAMES)
@given(shapes=SHAPES, seed=st.integers(0, 99), world=st.integers(1, 3), data=st.data())
@settings(max_examples=6, deadline=None)
def test_number_of_learners(
    algorithm: AlgorithmConfig, shapes: list, seed: int, world: int, data: st.DataObject
) -> None:
    """Each learner has its own groups (some learners none) and only sums of the others'; gradients are added up."""
    with float64_norms(model()):
        step = Step(shapes, seed)
        expected, wanted = plain(step, algorithm)
        ranks = data.draw(st.lists(st.integers(0, world - 1), min_size=len(shapes), max_size=len(shapes)))
        budget = max(p + max(lengths) for p, lengths in shapes) + 10
        members = [[index for index, rank in enumerate(ranks) if rank == own] for own in range(world)]
        counts = PassCounts.maximum(
            [plan_passes([step.groups[index] for index in mine], budget).counts for mine in members]
        )
        model().zero_grad(set_to_none=True)
        loss = sum(run_rank(step, mine, algorithm, budget, counts) for mine in members)
        found = {name: p.grad.clone() for name, p in model().named_parameters() if p.grad is not None}
    assert loss == pytest.approx(expected, rel=1e-9, abs=1e-11)
    assert_close(found, wanted)


def run_rank(step: Step, members: list[int], algorithm: AlgorithmConfig, budget: int, counts: PassCounts) -> float:
    """Adds one learner's gradients to the model's; its loss."""
    rollouts = torch.cat(
        [torch.empty(0, dtype=torch.long)] + [(step.group_index == index).nonzero()[:, 0] for index in members]
    )
    tokens = torch.isin(step.rollout_index, rollouts).nonzero()[:, 0]

    def loss_fn(logprobs: Tensor, part: Part) -> Tensor:
        return step.loss(logprobs, part.entropy, tokens[part.tokens], rollouts[part.completions], algorithm)[0]

    groups = [step.groups[index] for index in members]
    return accumulate_gradients(
        model(), groups, loss_fn, budget, temperature=TEMPERATURE, entropy=True, counts=counts
    ).loss
