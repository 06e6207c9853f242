"""What an evaluation is: which prompts are sampled how, and what the scored groups say of a policy.

The same in a run (roles/evaluator.py), in a local run (local.py) and offline (evaluate.py). A row is a prompt of one of
the sets; its group has the set's `samples` completions. Rows, seeds and sampling do not depend on the policy.

n: completions of a prompt, c: how many of them pass; G completions of a group.
"""

from __future__ import annotations

import bisect
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raygrpo.config import RewardConfig, RunConfig
from raygrpo.data import PromptSet, evaluation_seed
from raygrpo.eval_config import EvalSetConfig
from raygrpo.rewards import Scorer
from raygrpo.types import GroupRequest, ScoredGroup, StepMetrics


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that of k of the n completions at least one passes: over all draws, without replacement.

    The unbiased estimate of the chance that one of k new completions passes (Chen et al., arXiv:2107.03374, equation
    1). Raises ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass@{k} cannot be estimated from {c} of {n} completions")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSet:
    """Prompts with the settings by which they are evaluated."""

    name: str
    settings: EvalSetConfig
    prompts: PromptSet


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The rows of one evaluation: the prompts of the first set, then those of the second, and so on."""

    sets: list[EvaluationSet]
    seed: int  # of the run

    @property
    def sizes(self) -> list[int]:
        return [len(part.prompts) for part in self.sets]

    def __len__(self) -> int:
        return sum(self.sizes)

    def request(self, row: int) -> GroupRequest:
        """What the row's group is sampled from; the same for every policy."""
        index = set_of_row(row, self.sizes)
        part, place = self.sets[index], row - sum(self.sizes[:index])
        return GroupRequest(
            ticket=row,
            prompt=part.prompts[place],
            seeds=[evaluation_seed(self.seed, part.name, place, i) for i in range(part.settings.samples)],
            sampling=part.settings.sampling,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedSet:
    """What one set of prompts says of a policy."""

    name: str
    settings: EvalSetConfig
    groups: list[ScoredGroup]  # one for each prompt, in the order of the source

    @property
    def metrics(self) -> StepMetrics:
        return evaluation_metrics(self.name, self.settings, self.groups)


def findings(
    sets: Sequence[EvaluatedSet], seconds: float, table_prompts: int
) -> tuple[StepMetrics, dict[str, list[ScoredGroup]]]:
    """What Tracker.log_evaluation takes: the metrics of all sets, and by set the groups to show."""
    metrics = {name: value for evaluated in sets for name, value in evaluated.metrics.items()}
    return metrics | {"eval/seconds": seconds}, {e.name: list(e.groups[:table_prompts]) for e in sets}


def set_of_row(row: int, sizes: Sequence[int]) -> int:
    """Index of the set that a row belongs to. sizes: prompts of each set."""
    return bisect.bisect_right(list(itertools.accumulate(sizes)), row)


def make_scorers(config: RunConfig, make: Callable[[RewardConfig], Scorer]) -> dict[str, Scorer]:
    """The scorer of each set, by name. Sets that have no functions of their own share one."""
    assert config.eval is not None
    common = None
    scorers = {}
    for name, settings in config.eval.sets.items():
        if settings.functions is not None:
            scorers[name] = make(config.reward.model_copy(update={"functions": settings.functions}))
        else:
            scorers[name] = common = common or make(config.reward)
    return scorers


def evaluation_metrics(name: str, settings: EvalSetConfig, groups: Sequence[ScoredGroup]) -> StepMetrics:
    """The figures of one set, `eval/<name>/...`. groups: one for each of its prompts.

    A completion that got no reward, or was not sampled at all, counts as 0 and as not passed, and in num_failed.
    """
    n = settings.samples
    totals = [[reward.total for reward in scored.rewards] or [0.0] * n for scored in groups]
    passed = [
        sum(not reward.error and reward.total >= settings.pass_reward for reward in scored.rewards) for scored in groups
    ]
    rollouts = [rollout for scored in groups for rollout in scored.group.rollouts]
    means = [statistics.fmean(rewards) for rewards in totals]
    failed = sum(bool(reward.error) for scored in groups for reward in scored.rewards)
    metrics = {
        "reward": statistics.fmean(means),
        "standard_error": statistics.pstdev(means) / math.sqrt(len(means)),
        **{f"pass_at_{k}": statistics.fmean(pass_at_k(n, c, k) for c in passed) for k in settings.pass_at},
        "mean_length": statistics.fmean(len(r.completion_ids) for r in rollouts) if rollouts else 0.0,
        "clipped_ratio": statistics.fmean(r.finish_reason == "length" for r in rollouts) if rollouts else 0.0,
        "num_failed": float(failed + n * sum(not scored.group.rollouts for scored in groups)),
    }
    return {f"eval/{name}/{metric}": value for metric, value in metrics.items()}
