"""Which rollouts of a step are shown, and as which table."""

from __future__ import annotations

import random

from raygrpo.tracking.journal import Item
from raygrpo.tracking.traces import readable
from raygrpo.types import ScoredGroup

FIRST_COLUMNS = ["prompt", "completion", "answer", "reward", "advantage"]  # what one wants to see without scrolling
LAST_COLUMNS = [
    "finish_reason",
    "num_tokens",
    "num_prompt_tokens",
    "policy_version",
    "prompt_id",
    "sample",
    "step",
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
        group, rollout, reward = groups[g].group, groups[g].group.rollouts[r], groups[g].rewards[r]
        prompt = group.prompt
        total = None if reward.error else readable(reward.total)
        first = [prompt.text, rollout.text, prompt.answer, total, readable(advantages[g][r])]
        lengths = [rollout.finish_reason, len(rollout.completion_ids), len(prompt.prompt_ids)]
        origin = [group.policy_version, prompt.prompt_id, r, step, group.generator, reward.error]
        rows.append([*first, *map(readable, reward.components), *lengths, *origin])
    columns = [*FIRST_COLUMNS, *(f"reward/{name}" for name in components), *LAST_COLUMNS]
    return {"kind": "table", "artifact_file": f"samples/step_{step:06d}.json", "columns": columns, "data": rows}
