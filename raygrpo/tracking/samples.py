"""Which rollouts and groups of a step, or of an evaluation, are shown, and the rollouts' table.

What is drawn at random is what has the smallest random numbers, and these follow from seed, step and ticket. So each
learner can tell which of its groups may be shown, and of all of those the same are chosen as of the whole step.
"""

from __future__ import annotations

import heapq
import random
import statistics
from typing import Any

from raygrpo.tracking.journal import Item
from raygrpo.tracking.traces import readable
from raygrpo.types import ScoredGroup

FIRST_COLUMNS = ["prompt", "completion", "answer", "reward"]  # what one wants to see without scrolling
LAST_COLUMNS = [
    "finish_reason",
    "num_tokens",
    "num_prompt_tokens",
    "policy_version",
    "prompt_id",
    "sample",
    "generator",
    "error",
]


def shown_groups(step: int, groups: list[ScoredGroup], num_samples: int, num_traces: int, seed: int) -> list[int]:
    """Places of those groups, some of the step's, from which `sample_table` and `choose_groups` of the whole step may
    show something: a superset of what they show."""
    random_groups = heapq.nsmallest(num_traces, range(len(groups)), key=lambda g: _draw(seed, step, groups[g]))
    traced = [g for _, g in choose_groups(step, groups, min(num_traces, 2), seed)] + random_groups
    return sorted({g for g, _ in _drawn_rollouts(step, groups, num_samples, seed)}.union(traced))


def choose_groups(step: int, groups: list[ScoredGroup], num_traces: int, seed: int) -> list[tuple[str, int]]:
    """At most `num_traces` of (why, place in `groups`): best group by mean reward, worst, then others at random.

    A group that failed is the worst there is. The draw depends on `seed`, `step` and the tickets.
    """
    order = sorted(range(len(groups)), key=lambda g: (_mean_reward(groups[g]), -groups[g].group.ticket))
    chosen = [("best", order[-1])] if order else []
    chosen += [("worst", order[0])] if len(order) > 1 else []
    chosen += [("random", g) for g in sorted(order[1:-1], key=lambda g: _draw(seed, step, groups[g]))]
    return chosen[:num_traces]


def sample_table(
    step: int,
    groups: list[ScoredGroup],
    advantages: list[list[float]],
    components: list[str],
    num_samples: int,
    seed: int,
) -> Item | None:
    """A table of `num_samples` rollouts drawn uniformly from the step, those of one prompt together, best first.

    advantages: for each group one list with a value per rollout. components: names of the reward functions, in order.
    The draw depends on `seed`, `step` and the tickets. None where the step has no rollout at all.
    """
    chosen = _drawn_rollouts(step, groups, num_samples, seed)
    if not chosen:
        return None
    chosen.sort(key=lambda place: (place[0], -groups[place[0]].rewards[place[1]].total, place[1]))
    rows = []
    for g, r in chosen:
        first, rest = _facts(groups[g], r)
        rows.append([*first, readable(advantages[g][r]), *rest, step])
    columns = [*FIRST_COLUMNS, "advantage", *_components(components), *LAST_COLUMNS, "step"]
    return {"kind": "table", "artifact_file": f"samples/step_{step:06d}.json", "columns": columns, "data": rows}


def evaluation_table(version: int, name: str, groups: list[ScoredGroup], components: list[str]) -> Item | None:
    """A table of all completions of these groups of one set, in their order. components: names of the set's reward
    functions. None where there is no completion."""
    rows = []
    for scored in groups:
        for r in range(len(scored.group.rollouts)):
            first, rest = _facts(scored, r)
            rows.append([*first, *rest])
    columns = [*FIRST_COLUMNS, *_components(components), *LAST_COLUMNS]
    file = f"eval/{name}/step_{version:06d}.json"
    return {"kind": "table", "artifact_file": file, "columns": columns, "data": rows} if rows else None


def _drawn_rollouts(step: int, groups: list[ScoredGroup], num_samples: int, seed: int) -> list[tuple[int, int]]:
    """(place of the group, rollout) of at most `num_samples` rollouts."""
    places = [(g, r) for g, scored in enumerate(groups) for r in range(len(scored.group.rollouts))]
    return heapq.nsmallest(num_samples, places, key=lambda place: _draw(seed, step, groups[place[0]], place[1]))


def _draw(seed: int, step: int, scored: ScoredGroup, rollout: int | None = None) -> float:
    """A random number for the group or its rollout, uniform in [0, 1)."""
    return random.Random(f"{seed}/{step}/{scored.group.ticket}/{rollout}").random()


def _mean_reward(scored: ScoredGroup) -> float:
    return statistics.fmean(reward.total for reward in scored.rewards) if scored.rewards else float("-inf")


def _facts(scored: ScoredGroup, r: int) -> tuple[list[Any], list[Any]]:
    """Of one completion: the values of FIRST_COLUMNS, and those of the components and LAST_COLUMNS."""
    group, rollout, reward = scored.group, scored.group.rollouts[r], scored.rewards[r]
    prompt = group.prompt
    total = None if reward.error else readable(reward.total)
    lengths = [rollout.finish_reason, len(rollout.completion_ids), len(prompt.prompt_ids)]
    origin = [group.policy_version, prompt.prompt_id, r, group.generator, reward.error]
    return [prompt.text, rollout.text, prompt.answer, total], [*map(readable, reward.components), *lengths, *origin]


def _components(names: list[str]) -> list[str]:
    return [f"reward/{name}" for name in names]
