"""Which rollouts of a step, or of an evaluation, are shown, and as which table."""

from __future__ import annotations

import random
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
    The draw depends on `seed` and `step` alone. None where the step has no rollout at all.
    """
    places = [(g, r) for g, scored in enumerate(groups) for r in range(len(scored.group.rollouts))]
    if not places:
        return None
    chosen = random.Random(f"{seed}/{step}").sample(places, min(num_samples, len(places)))
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
