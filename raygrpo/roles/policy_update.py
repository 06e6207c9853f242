"""What a learner does with the scored groups of one step: advantages, gradients, optimizer updates, and their metrics.

One object on each rank; ranks talk through torch.distributed only, in the same order on all of them. No Ray, no
streaming: learner.py feeds it. Everything that is divided by a denominator is divided by that of the whole update over
all ranks, so how groups fall on ranks and micro-batches changes nothing but the last digits.

Shapes: R rollouts of this rank's groups, S their completion tokens, K reward functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raygrpo.algorithm import (
    Totals,
    adapt_kl_coef,
    batch_totals,
    combine_metrics,
    compute_advantages,
    finish_metrics,
    kl_reward,
    overlong_penalty,
    policy_loss,
    reward_metrics,
    rollout_loss_mask,
)
from raygrpo.config import AlgorithmConfig, RewardConfig
from raygrpo.engines.deepspeed import DeepSpeedEngine
from raygrpo.roles.ranks import gather
from raygrpo.shared_prefix import (
    Part,
    PassCounts,
    SharedPrefixBatch,
    accumulate_gradients,
    pack,
    plan_passes,
    score_completions,
)
from raygrpo.types import RunStopped, ScoredGroup, StepMetrics

TokenGroup = tuple[list[int], list[list[int]]]  # prompt_ids, [completion_ids]


@dataclass(frozen=True)
class StepBatch:
    """The groups of one rank as flat tensors, on the learner's device."""

    groups: list[TokenGroup]
    group_index: Tensor  # [R] int64: the ticket
    local_group: Tensor  # [R] int64: position in `groups`
    lengths: Tensor  # [R] int64: completion tokens
    rewards: Tensor  # [R, K] float64; NaN where a reward function failed
    truncated: Tensor  # [R] bool: cut off at the length limit
    rollout_index: Tensor  # [S] int64, into R
    behaviour_logprobs: Tensor  # [S] float32
    error: str = ""  # of the first group that could not be generated

    @classmethod
    def from_groups(cls, scored: Sequence[ScoredGroup], num_components: int, device: torch.device) -> StepBatch:
        rollouts = [rollout for s in scored for rollout in s.group.rollouts]
        rewards = [r.components if not r.error else [torch.nan] * num_components for s in scored for r in s.rewards]
        sizes = torch.tensor([len(s.group.rollouts) for s in scored], dtype=torch.int64)
        tickets = torch.tensor([s.group.ticket for s in scored], dtype=torch.int64)
        lengths = torch.tensor([len(rollout.completion_ids) for rollout in rollouts], dtype=torch.int64)
        behaviour = [value for rollout in rollouts for value in rollout.behaviour_logprobs]
        batch = cls(
            groups=[(s.group.prompt.prompt_ids, [r.completion_ids for r in s.group.rollouts]) for s in scored],
            group_index=tickets.repeat_interleave(sizes),
            local_group=torch.arange(len(scored)).repeat_interleave(sizes),
            lengths=lengths,
            rewards=torch.tensor(rewards, dtype=torch.float64).reshape(-1, num_components),
            truncated=torch.tensor([rollout.finish_reason == "length" for rollout in rollouts], dtype=torch.bool),
            rollout_index=torch.arange(len(rollouts)).repeat_interleave(lengths),
            behaviour_logprobs=torch.tensor(behaviour, dtype=torch.float32),
            error=next((s.group.error for s in scored if s.group.error), ""),
        )
        tensors = {name: value.to(device) for name, value in vars(batch).items() if isinstance(value, Tensor)}
        return replace(batch, **tensors)

    def tokens_of(self, groups: Tensor) -> Tensor:
        """[s] indices of the completion tokens of these groups (positions in `groups`, ascending)."""
        return torch.isin(self.local_group, groups)[self.rollout_index].nonzero()[:, 0]


class PolicyUpdater:
    """Turns groups into updates of the policy.

    engine: the policy behind DeepSpeed, prepared by enable_shared_prefix. reference: the frozen policy, prepared too;
    needed when settings.kl.coef > 0. max_tokens: budget of a micro-batch. max_completion_tokens: the sampler's limit,
    for overlong penalties.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        reference: nn.Module | None,
        settings: AlgorithmConfig,
        reward: RewardConfig,
        *,
        max_tokens: int,
        temperature: float,
        max_completion_tokens: int,
        skip_zero_advantages: bool,
        min_shared_head: int | None,
        device: torch.device,
        adapters_off: Callable[[], AbstractContextManager[Any]] | None = None,
    ):
        """adapters_off: within it the policy is its own reference, in place of `reference`."""
        self._engine = engine
        self._reference = reference
        self._adapters_off = adapters_off if settings.kl.coef > 0 else None
        self._has_reference = reference is not None or self._adapters_off is not None
        self._settings = settings
        self._reward = reward
        self._weights = torch.tensor([function.weight for function in reward.functions], dtype=torch.float64)
        self._max_tokens = max_tokens
        self._min_shared_head = min_shared_head
        self._temperature = temperature
        self._max_completion_tokens = max_completion_tokens
        # Exact only where nothing but the advantage gives a token a gradient.
        penalty = settings.kl.coef > 0 and settings.kl.placement == "loss"
        self._skip = skip_zero_advantages and not penalty and settings.entropy_coef == 0
        self._device = device
        self.kl_coef = settings.kl.coef  # moves when settings.kl.target is set

    def update(self, scored: Sequence[ScoredGroup], step: int) -> tuple[StepMetrics, list[list[float]]]:
        """Train on this rank's groups of one step; all ranks call it together.

        Returns the metrics of the whole step, the same on every rank, and the advantages of this rank's rollouts by
        group. Raises RunStopped when the loss is not finite, and when more rollouts failed to get a reward than
        `reward.max_error_share` allows.
        """
        batch = StepBatch.from_groups(scored, len(self._weights), self._device)
        failed = batch.rewards.isnan().any(dim=1)
        old_logprobs = ref_logprobs = None
        if self._settings.updates_per_step > 1 or (self._has_reference and self._kl_in_reward):
            old_logprobs = self._score(self._engine.module, batch.groups)
        if self._adapters_off is not None:
            with self._adapters_off():
                ref_logprobs = self._score(self._engine.module, batch.groups)
        elif self._reference is not None:
            ref_logprobs = self._score(self._reference, batch.groups)

        mask = rollout_loss_mask(batch.rollout_index, self._settings, failed=failed, truncated=batch.truncated)
        advantages, metrics = self._advantages(batch, mask, old_logprobs, ref_logprobs)
        parts = []
        for epoch in range(self._settings.epochs):
            for mini_batch in range(self._settings.mini_batches):
                update = (step * self._settings.epochs + epoch) * self._settings.mini_batches + mini_batch
                # Consecutive groups: the stream deals tickets round robin, so they are the same on any number of ranks.
                size = len(batch.groups) // self._settings.mini_batches
                members = list(range(mini_batch * size, (mini_batch + 1) * size))
                parts.append(self._one_update(update, members, batch, mask, advantages, old_logprobs, ref_logprobs))
        for name in dict.fromkeys(name for part in parts for name in part):
            values = [part[name] for part in parts if name in part]
            metrics.setdefault(name, max(values) if name.endswith("_max") else sum(values) / len(values))
        if self._settings.kl.target is not None:
            metrics["policy/kl_coef"] = self.kl_coef
        if self._settings.kl.target is not None and "policy/kl" in metrics:  # not where no token counted
            num_rollouts = int(metrics["completions/num"])
            self.kl_coef = adapt_kl_coef(self.kl_coef, metrics["policy/kl"], num_rollouts, self._settings)
        sizes = [len(s.group.rollouts) for s in scored]
        return metrics, [part.tolist() for part in advantages.cpu().split(sizes)]

    @property
    def _kl_in_reward(self) -> bool:
        return self._settings.kl.placement == "reward"

    def _advantages(
        self, batch: StepBatch, mask: Tensor, old_logprobs: Tensor | None, ref_logprobs: Tensor | None
    ) -> tuple[Tensor, StepMetrics]:
        """[R] of this rank, from the rewards of the whole step, and what those rewards say."""
        num_rollouts = len(batch.lengths)
        extra = overlong_penalty(batch.lengths, self._max_completion_tokens, self._settings).double()
        kl_sum = torch.zeros(num_rollouts, dtype=torch.float64)
        if ref_logprobs is not None and self._kl_in_reward:
            assert old_logprobs is not None
            penalty = kl_reward(
                old_logprobs,
                ref_logprobs,
                mask,
                batch.rollout_index,
                self._settings,
                num_rollouts=num_rollouts,
                kl_coef=self.kl_coef,
            )
            extra = extra + penalty.double()
            kl_sum = -penalty.double().cpu() / self.kl_coef
        counted_tokens = torch.zeros(num_rollouts, dtype=torch.int64, device=self._device)
        counted_tokens.index_add_(0, batch.rollout_index, mask.long())
        # Scalars of each rollout from all ranks: small, and the same code for every kind of advantage.
        columns = [batch.rewards, extra[:, None], batch.group_index[:, None], batch.lengths[:, None]]
        columns += [counted_tokens[:, None], batch.truncated[:, None], kl_sum[:, None].to(self._device)]
        local = torch.cat([column.double() for column in columns], dim=1).cpu()
        gathered = _all_gather(local)
        whole = torch.cat(gathered)
        num_components = batch.rewards.shape[1]
        rewards, (extra_w, tickets, lengths, counted, truncated, kl_w) = (
            whole[:, :num_components],
            whole[:, num_components:].T,
        )
        weighted, weights = rewards, self._weights
        if extra_w.any():  # with advantages per reward, a column without penalties would be one more to normalise
            weighted = torch.cat([rewards, extra_w[:, None]], dim=1)
            weights = torch.cat([weights, weights.new_ones(1)])
        advantages = compute_advantages(
            weighted,
            tickets.long(),
            self._settings,
            reward_weights=weights,
            num_tokens=counted.long(),
        )
        totals = rewards @ self._weights
        metrics = reward_metrics(totals, tickets.long())
        for k, function in enumerate(self._reward.functions):
            valid = rewards[:, k][rewards[:, k].isfinite()]
            metrics[f"reward/{function.metric_name}"] = float(valid.mean()) if len(valid) else 0.0
        if not len(totals):
            raise RunStopped("no group of the step could be generated" + f": {batch.error}" * bool(batch.error))
        share = float(totals.isnan().double().mean())
        if share > self._reward.max_error_share:
            raise RunStopped(
                f"{share:.0%} of the step's {len(totals)} rollouts failed to get a reward, more than "
                f"reward.max_error_share ({self._reward.max_error_share:.0%})"
            )
        metrics |= {
            "faults/reward_failed": float(totals.isnan().sum()),
            "completions/num": float(len(totals)),
            "completions/mean_length": float(lengths.mean()),
            "completions/max_length": float(lengths.max()),
            "completions/clipped_ratio": float(truncated.mean()),
        }
        if ref_logprobs is not None and self._kl_in_reward and counted.any():
            metrics["policy/kl"] = float(kl_w.sum() / counted.sum())
        rank = dist.get_rank()
        first = sum(len(part) for part in gathered[:rank])
        return advantages[first : first + num_rollouts].float().to(self._device), metrics

    def _one_update(
        self,
        update: int,
        members: list[int],
        batch: StepBatch,
        mask: Tensor,
        advantages: Tensor,
        old_logprobs: Tensor | None,
        ref_logprobs: Tensor | None,
    ) -> StepMetrics:
        """One optimizer update on some of the groups (positions in batch.groups)."""
        chosen = torch.tensor(members, dtype=torch.int64, device=self._device)
        tokens = batch.tokens_of(chosen)  # [s] where the update's tokens stand in the step's
        rollouts = torch.isin(batch.local_group, chosen).nonzero()[:, 0]  # [r] likewise
        local = batch_totals(mask[tokens], batch.rollout_index[tokens], len(batch.lengths))
        totals = Totals(*_all_sum([local.tokens, local.rollouts]))
        skip = self._without_gradient(batch, members, advantages)
        groups = [batch.groups[index] for index in members]
        kept = [group for index, group in enumerate(groups) if index not in skip]
        passes = plan_passes(kept, self._max_tokens, min_shared_head=self._min_shared_head)
        counts = PassCounts.maximum(gather(passes.counts))
        parts: list[dict[str, Any]] = []

        def loss_fn(logprobs: Tensor, part: Part) -> Tensor:
            index = tokens[part.tokens]
            rollout_index = torch.repeat_interleave(
                torch.arange(len(part.lengths), device=self._device),
                torch.tensor(part.lengths, device=self._device),
            )
            loss, metrics = policy_loss(
                logprobs,
                None if old_logprobs is None else old_logprobs[index],
                advantages[rollouts[part.completions]],
                mask[index],
                rollout_index,
                self._settings,
                behaviour_logprobs=batch.behaviour_logprobs[index],
                ref_logprobs=None if ref_logprobs is None else ref_logprobs[index],
                entropy=part.entropy,
                totals=totals,
                kl_coef=self.kl_coef,
            )
            if not torch.isfinite(loss):
                raise RunStopped(f"the loss of update {update} is {float(loss)}")
            parts.append(metrics)
            return loss

        accumulated = accumulate_gradients(
            self._engine.module,
            groups,
            loss_fn,
            self._max_tokens,
            temperature=self._temperature,
            entropy=True,
            skip=skip,
            min_shared_head=self._min_shared_head,
            backward=self._engine.backward,
            counts=counts,
            at_least_one=True,
        )
        norm, rate = self._engine.step(update)
        combined = {name: float(value) for name, value in combine_metrics(parts).items()}
        metrics = finish_metrics(combine_metrics(gather(combined)))
        seen = batch.tokens_of(chosen[[i for i in range(len(members)) if i not in skip]])
        local = batch_totals(mask[seen], batch.rollout_index[seen], len(batch.lengths))
        *trained, tokens_run = _all_sum([local.tokens, local.rollouts, accumulated.num_tokens])
        trained = Totals(*trained)
        return _over_what_was_seen(metrics, totals, trained, self._settings) | {
            "policy/grad_norm": norm,
            "policy/lr": rate,
            "policy/skipped_token_fraction": 1 - trained.tokens / max(totals.tokens, 1),
            "prefix/tokens_run": float(tokens_run),
        }

    def _without_gradient(self, batch: StepBatch, members: list[int], advantages: Tensor) -> set[int]:
        """Positions in `members` of groups that need no pass: no advantage, and nothing else that has a gradient."""
        if not self._skip:
            return set()
        active = set(batch.local_group[advantages != 0].tolist())
        return {position for position, index in enumerate(members) if index not in active}

    def _score(self, model: nn.Module, groups: Sequence[TokenGroup]) -> Tensor:
        """[S] log-probabilities without gradient, in streams of at most max_tokens; as many passes on every rank."""
        pieces = [piece for group in groups for piece in _pieces(group, self._max_tokens)]
        streams = pack(pieces, self._max_tokens, min_shared_head=self._min_shared_head)
        lengths = torch.tensor([sum(len(completion) for completion in piece[1]) for piece in pieces], dtype=torch.int64)
        starts = lengths.cumsum(0) - lengths
        result = torch.empty(int(lengths.sum()), device=self._device)
        most = max(gather(len(streams)))
        with torch.no_grad():
            for stream in streams:
                members = [pieces[index] for index in stream]
                shared = SharedPrefixBatch.from_groups(members, min_shared_head=self._min_shared_head)
                scores = score_completions(model, shared, temperature=self._temperature).logprobs
                index = torch.cat([torch.arange(int(starts[i]), int(starts[i] + lengths[i])) for i in stream])
                result[index.to(self._device)] = scores.float()
            for _ in range(most - len(streams)):
                score_completions(model, SharedPrefixBatch.padding(), temperature=self._temperature)
        return result


def _pieces(group: TokenGroup, max_tokens: int) -> list[TokenGroup]:
    """The group, or its completions in several groups where it exceeds the budget. Without a gradient that is exact,
    and only the prompt's forward pass is repeated."""
    prompt, completions = group
    pieces: list[TokenGroup] = []
    used = max_tokens + 1
    for completion in completions:
        if used + len(completion) > max_tokens:
            pieces.append((prompt, []))
            used = len(prompt)
        pieces[-1][1].append(completion)
        used += len(completion)
    return pieces


_SHARES_OF_THE_LOSS = ("policy/loss", "policy/surrogate")


def _over_what_was_seen(
    metrics: StepMetrics, totals: Totals, trained: Totals, settings: AlgorithmConfig
) -> StepMetrics:
    """Means over the tokens (or rollouts) that went through the model: skipped groups count in the loss's denominators,
    but nothing is known of their tokens. Without any, only the loss is left."""
    kept = {name: metrics.get(name, 0.0) for name in _SHARES_OF_THE_LOSS}
    if not trained.tokens:
        return kept
    per_rollout = settings.correction.level in ("sequence", "sequence_mean")
    for name, value in metrics.items():
        if name.endswith("_max"):
            kept[name] = value
        elif name not in kept:
            by_rollout = per_rollout and name.startswith(("sampling/is_", "sampling/effective"))
            kept[name] = value * (totals.rollouts / trained.rollouts if by_rollout else totals.tokens / trained.tokens)
    return kept


def _all_sum(values: list[int]) -> list[int]:
    total = torch.tensor(values, dtype=torch.int64)
    if dist.get_backend() == "nccl":
        total = total.cuda()
    dist.all_reduce(total)
    return total.tolist()


def _all_gather(rows: Tensor) -> list[Tensor]:
    """Tensors [r, c] of all ranks, which may differ in r."""
    return [torch.as_tensor(part) for part in gather(rows)]
