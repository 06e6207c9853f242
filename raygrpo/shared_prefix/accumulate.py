"""Gradients of any number of groups of any size, within a token budget.

Groups that fit share streams. A group that does not fit is split by phase, exactly: its prompt is encoded once, with
its graph; parts of its completions run against the prompt's keys and values, held as leaves whose gradients add up;
then one backward pass goes through the prompt. That is the same work as one stream, not a token more.

Works through whatever wraps the model: every pass is one call of it, and one call of `backward`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raygrpo.shared_prefix.layout import Group, SharedPrefixBatch
from raygrpo.shared_prefix.model import CompletionScores, PrefixState, Request, run_request
from raygrpo.shared_prefix.packing import PassCounts, plan_passes


@dataclass(frozen=True)
class Part:
    """The completions whose log-probabilities loss_fn is given. No completion is ever cut.

    tokens [s]: index of each token among all completion tokens of all groups, in order: per_token_values[part.tokens].
    completions: index of each completion among those of all groups. lengths: their lengths, sum s.
    entropy [s], if it was asked for.
    """

    tokens: Tensor
    completions: Tensor
    lengths: tuple[int, ...]
    entropy: Tensor | None


LossFn = Callable[[Tensor, Part], Tensor]


@dataclass(frozen=True)
class Accumulated:
    """Sum of all losses, and what they were computed from, without gradient: [S] each, all completions in order.

    Tokens of skipped groups are NaN. num_tokens: that went through the model, whatever is shared once, padding left
    out."""

    loss: float
    logprobs: Tensor
    entropy: Tensor | None
    num_tokens: int


def accumulate_gradients(
    model: nn.Module,
    groups: Sequence[Group],
    loss_fn: LossFn,
    max_tokens: int,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    skip: Collection[int] = (),
    min_shared_head: int | None = None,
    backward: Callable[[Tensor], object] = Tensor.backward,
    counts: PassCounts | None = None,
    at_least_one: bool = False,
) -> Accumulated:
    """Add the gradient of sum over parts of loss_fn(logprobs, part) to the parameters.

    loss_fn must be additive: the sum of its values must not depend on how completions are cut into parts (divide by
    totals that are known beforehand, not by what a part holds).
    skip: indices of groups that are left out, such as those whose advantages are all zero: exact if their loss has no
    gradient (no KL, entropy or router term); they still count in loss_fn's own totals.
    min_shared_head: groups whose prompts begin with so many equal tokens share these too.
    backward: DeepSpeed users pass engine.backward. counts: passes to make at least, so that all ranks make equally many
    (PassCounts.maximum over the ranks' plan_passes(groups, max_tokens).counts); the rest run padding.
    at_least_one: run padding once also where no rank has anything to run (DeepSpeed needs a backward before a step).
    """
    run = _Run(model, groups, loss_fn, temperature, entropy, min_shared_head, backward)
    wanted = [index for index in range(len(groups)) if index not in skip]
    passes = plan_passes([groups[index] for index in wanted], max_tokens, min_shared_head=min_shared_head)
    own = passes.counts
    if counts is None:
        counts = own
    elif PassCounts.maximum([own, counts]) != counts:
        raise ValueError(f"this rank needs {own}, but only {counts} were asked for")

    for stream in passes.streams:
        run.stream([wanted[index] for index in stream])
    for _ in range(counts.streams - own.streams):
        run.pad()
    if at_least_one and not counts.streams and not counts.split_parts:
        run.pad(check=False)
    for (index, parts), total in zip(passes.splits, counts.split_parts, strict=False):
        run.split(wanted[index], parts, total)
    for total in counts.split_parts[len(passes.splits) :]:
        run.split(None, (), total)
    return run.result()


class _Run:
    """One call of accumulate_gradients: what it was given, and what has been scored so far."""

    def __init__(self, model, groups, loss_fn, temperature, entropy, min_shared_head, backward):
        self.model, self.groups, self.loss_fn = model, groups, loss_fn
        self.temperature, self.entropy, self.backward = temperature, entropy, backward
        self.min_shared_head = min_shared_head
        self.first_completion, self.first_token = [0], [0]  # of each group
        for _, completions in groups:
            self.first_completion.append(self.first_completion[-1] + len(completions))
            self.first_token.append(self.first_token[-1] + sum(len(completion) for completion in completions))
        self.scored: list[tuple[Tensor, CompletionScores]] = []
        self.loss = 0.0
        self.num_tokens = 0

    def stream(self, indices: Sequence[int]) -> None:
        """One stream of whole groups."""
        groups = [self.groups[index] for index in indices]
        batch = SharedPrefixBatch.from_groups(groups, min_shared_head=self.min_shared_head)
        members = [(index, member) for index in indices for member in range(len(self.groups[index][1]))]
        self._backward(batch, members)

    def pad(self, *, check: bool = True) -> None:
        self._backward(SharedPrefixBatch.padding(), [], check=check)

    def split(self, index: int | None, parts: Sequence[Sequence[int]], total: int) -> None:
        """One group in parts, then padding up to `total` parts; index None: padding only."""
        prompt, completions = ([0], []) if index is None else self.groups[index]
        request = Request(SharedPrefixBatch.from_groups([(prompt, [])]), encode_only=True)
        self.num_tokens += 0 if index is None else len(prompt)
        encoded = _flat(PrefixState(*run_request(self.model, request)))
        leaves = [tensor.detach().requires_grad_() for tensor in encoded]
        for part in parts:
            assert index is not None
            batch = SharedPrefixBatch.continuing(prompt, [completions[member] for member in part])
            self._backward(batch, [(index, member) for member in part], _unflat(leaves))
        for _ in range(total - len(parts)):
            self._backward(SharedPrefixBatch.continuing(prompt, [[0]]), [], _unflat(leaves))
        self.backward(_GradientsOf.apply(leaves, *encoded))

    def _backward(self, batch: SharedPrefixBatch, members: Sequence[tuple[int, int]], prefix=None, check=True) -> None:
        """Score a batch and backpropagate its loss; without members it is padding, and its loss is zero."""
        request = Request(batch, self.temperature, self.entropy, prefix, check=check)
        scores = CompletionScores(*run_request(self.model, request))
        if not members:
            self.backward(0.0 * scores.logprobs.sum())
            return
        device = scores.logprobs.device
        part = Part(
            tokens=torch.cat([self._tokens(*member) for member in members]).to(device),
            completions=torch.tensor([self.first_completion[index] + member for index, member in members]).to(device),
            lengths=batch.lengths,
            entropy=scores.entropy,
        )
        loss = self.loss_fn(scores.logprobs, part)
        self.loss += float(loss.detach())
        self.num_tokens += batch.num_tokens
        entropy = None if scores.entropy is None else scores.entropy.detach()
        self.scored.append((part.tokens, CompletionScores(scores.logprobs.detach(), entropy)))
        self.backward(loss)

    def _tokens(self, index: int, member: int) -> Tensor:
        completions = self.groups[index][1]
        first = self.first_token[index] + sum(len(completion) for completion in completions[:member])
        return torch.arange(first, first + len(completions[member]))

    def result(self) -> Accumulated:
        if not self.scored:
            empty = torch.full((self.first_token[-1],), torch.nan)
            return Accumulated(self.loss, empty, empty.clone() if self.entropy else None, self.num_tokens)
        logprobs = self._gathered([(tokens, scores.logprobs) for tokens, scores in self.scored])
        entropy = [(tokens, scores.entropy) for tokens, scores in self.scored if scores.entropy is not None]
        return Accumulated(self.loss, logprobs, self._gathered(entropy) if entropy else None, self.num_tokens)

    def _gathered(self, pieces: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Values of all completion tokens, [S], from (which tokens, their values)."""
        values = pieces[0][1].new_full((self.first_token[-1],), torch.nan)
        for tokens, piece in pieces:
            values[tokens] = piece
        return values


class _GradientsOf(torch.autograd.Function):
    """A zero whose backward hands each tensor the gradient that its leaf has gathered.

    The incoming gradient is ignored: whatever factor a trainer applies to losses (fp16 loss scaling, accumulation
    steps) is in the leaves' gradients already.
    """

    @staticmethod
    def forward(ctx, leaves: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.leaves = leaves
        return tensors[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, _):
        return None, *(leaf.grad for leaf in ctx.leaves)


def _flat(state: PrefixState) -> list[Tensor]:
    return [state.last_hidden, *state.keys, *state.values]


def _unflat(tensors: Sequence[Tensor]) -> PrefixState:
    layers = (len(tensors) - 1) // 2
    return PrefixState(tensors[0], tuple(tensors[1 : 1 + layers]), tuple(tensors[1 + layers :]))
