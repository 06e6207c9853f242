"""Sampling groups with an engine in this process: what a generator does, for runs and evaluations without Ray."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from raygrpo.types import GroupRequest, RolloutGroup

if TYPE_CHECKING:
    from raygrpo.engines.sampling import SamplingEngine

GENERATOR = "local"


def sample_groups(
    engine: SamplingEngine, requests: Sequence[GroupRequest], *, version: int, at_a_time: int | None
) -> list[RolloutGroup]:
    """One group for each request, in their order, by the weights that the engine has, which are called `version`.

    at_a_time: groups in the engine; None: one, with nothing cached from groups before it, so that its tokens depend on
    nothing else (`deterministic`).
    """
    groups: list[RolloutGroup] = []
    size = at_a_time or 1
    for start in range(0, len(requests), size):
        if at_a_time is None:
            engine.reset_prefix_cache()
        groups += _sample(engine, requests[start : start + size], version)
    return groups


def _sample(engine: SamplingEngine, requests: Sequence[GroupRequest], version: int) -> list[RolloutGroup]:
    start_s = time.time()
    rollouts, end_s, errors = {}, dict.fromkeys(range(len(requests)), start_s), {}
    for place, request in enumerate(requests):
        try:
            engine.add_group(str(place), request.prompt.prompt_ids, request.seeds, request.sampling)
        except ValueError as error:
            errors[place] = str(error)
    while engine.num_unfinished:
        for group_id, index, rollout in engine.step():
            rollouts[int(group_id), index] = rollout
            end_s[int(group_id)] = time.time()
    return [
        RolloutGroup(
            ticket=request.ticket,
            prompt=request.prompt,
            policy_version=version,
            rollouts=[] if place in errors else [rollouts[place, i] for i in range(len(request.seeds))],
            generator=GENERATOR,
            generate_start_s=start_s,
            generate_end_s=end_s[place],
            error=errors.get(place, ""),
            replacement=request.replacement,
        )
        for place, request in enumerate(requests)
    ]
