"""What of a run waits for a machine: actors and learners that Ray cannot place, as its autoscaler sees them.

On a cluster that grows with its load, or that others use too, they may wait for a long time. That is not a failure, but
must not look like a run that is starting.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from raygrpo.config import RunConfig
from raygrpo.placement import missing_nodes

logger = logging.getLogger(__name__)

PERIOD_S = 5.0  # between looks
PATIENCE_S = 15.0  # until something that waits for a machine is said; then again after twice as long


@dataclass(frozen=True, slots=True, kw_only=True)
class Unplaced:
    """Of a run, at one moment."""

    generators: int = 0
    scorers: int = 0
    learners: int = 0
    text: str = ""  # for a person: which roles, how many, what each asks for, what is free

    def __bool__(self) -> bool:
        return bool(self.generators or self.scorers or self.learners)


class Complaint:
    """When to tell a person that something waits for a machine: less and less often."""

    def __init__(self) -> None:
        self._since_s, self._patience_s = math.inf, PATIENCE_S

    def about(self, unplaced: Unplaced, now_s: float) -> str:
        """What to say now; "" for nothing."""
        if not unplaced:
            was_told = self._patience_s > PATIENCE_S
            self._since_s, self._patience_s = math.inf, PATIENCE_S
            return "nothing waits for a machine any more" if was_told else ""
        self._since_s = min(self._since_s, now_s)
        if now_s - self._since_s < self._patience_s:
            return ""
        self._patience_s *= 2
        return f"for {now_s - self._since_s:.0f} s {unplaced.text}"


@dataclass(frozen=True, slots=True)
class UnplacedFinder:
    """Asks Ray; the controller takes it along."""

    config: RunConfig

    def __call__(self) -> Unplaced:
        """Raises what Ray raises when its head does not answer."""
        import ray
        from ray.autoscaler.v2.sdk import get_cluster_status

        demands = get_cluster_status(ray.get_runtime_context().gcs_address).resource_demands
        actors = [pair for demand in demands.ray_task_actor_demand for pair in demand.bundles_by_count]
        gangs = [pair for demand in demands.placement_group_demand for pair in demand.bundles_by_count]
        config = self.config
        generator = shape(config.generator.num_cpus, config.generator.num_gpus)
        scorer = shape(config.reward.num_cpus, 0)
        learner = shape(config.learner.num_cpus, config.learner.num_gpus)

        def waiting(pairs: list, of: dict[str, float]) -> int:
            return sum(pair.count for pair in pairs if of and _without_labels(pair.bundle) == of)

        num_generators = waiting(actors, generator)
        # Of one shape, actors cannot be told apart.
        num_scorers = waiting(actors, scorer) if scorer != generator else 0
        num_learners = min(waiting(gangs, learner), config.learner.num_workers)
        roles = [(num_generators, "generator", generator), (num_scorers, "reward worker", scorer)]
        roles.append((num_learners, "learner", learner))
        asked = [f"{num} x {name} ({_said(needs)} each)" for num, name, needs in roles if num]
        total, free = ray.cluster_resources(), ray.available_resources()
        kinds = [kind for kind in ("CPU", "GPU") if any(kind in needs for num, _, needs in roles if num)]
        rest = ", ".join(f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind}" for kind in kinds)
        hopeless = [f"; {sentence}, as long as no other joins" for sentence in missing_nodes(config, ray.nodes())]
        return Unplaced(
            generators=num_generators,
            scorers=num_scorers,
            learners=num_learners,
            text=f"no machine has room for {', '.join(asked)}; free in the whole cluster: {rest}" + "".join(hopeless),
        )


async def look_again_and_again(
    find: Callable[[], Unplaced], found: Callable[[Unplaced], None], tell: Callable[[str], None]
) -> None:
    """find: asks Ray, and may block or raise. found: is given each answer. tell: a person."""
    complaint = Complaint()
    while True:
        await asyncio.sleep(PERIOD_S)
        try:
            unplaced = await asyncio.to_thread(find)
        except Exception as error:  # of a head that is busy; the next look is soon
            logger.warning("cannot see what waits for a machine: %s", error)
            continue
        found(unplaced)
        if text := complaint.about(unplaced, time.monotonic()):
            tell(text)


def shape(num_cpus: float, num_gpus: float) -> dict[str, float]:
    """What Ray is asked for."""
    return {kind: num for kind, num in (("CPU", num_cpus), ("GPU", num_gpus)) if num}


def _without_labels(bundle: dict[str, float]) -> dict[str, float]:
    return {kind: num for kind, num in bundle.items() if kind in ("CPU", "GPU") and num}


def _said(needs: dict[str, float]) -> str:
    return ", ".join(f"{num:g} {kind}" for kind, num in needs.items())
