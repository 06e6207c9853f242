"""What a learner needs of the run around it, and how it reaches that through Ray.

The learner knows one small interface, so that the same learner runs in a gang (RayLink) and in one process with
everything else (local.py). Only the learner of rank 0 calls it, except for `stop`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from raygrpo.gauges import Gauges
from raygrpo.types import RunInfo, ScoredGroup, StepMetrics

if TYPE_CHECKING:
    import ray
    from ray.actor import ActorHandle

    from raygrpo.direct_transfer import Offer
    from raygrpo.roles.reports import PublishReport
    from raygrpo.weights import PackedWeights

logger = logging.getLogger(__name__)

EVICTION_POLL_S = 2.0


class RunLink(Protocol):
    def begin_attempt(self, at_least: int) -> int:
        """The learners have started (again); returns the number of this attempt."""
        ...

    def begin_segment(self, name: str, first_ticket: int, num_tickets: int) -> None:
        """The first rows of the dataset `name` are the tickets from first_ticket on; the others stand for nothing."""

    def publish(self, version: int, weights: PackedWeights | Offer) -> None:
        """Hand over the weights; `published` says what became of it."""

    def published(self) -> PublishReport | None:
        """Wait for the acknowledgements of the last `publish`; None where that was reported before."""

    def evaluated(self) -> None:
        """Wait until no evaluation is under way."""

    def evaluations(self) -> dict[int, StepMetrics]:
        """What evaluations found so far, by version."""
        ...

    def learners_do(self, what: str) -> None: ...

    def log_step(self, step: int, metrics: StepMetrics) -> None: ...

    def log_samples(self, step: int, groups: list[ScoredGroup], advantages: list[list[float]]) -> None: ...

    def log_checkpoint(self, step: int, path: str, digest: str, mean_reward: float, kept: list[int]) -> None:
        """See Tracker.log_checkpoint; called from a thread."""

    def warn(self, text: str) -> None: ...

    def stop(self, reason: str) -> None:
        """Starting again would not help: end the run."""


@dataclass(slots=True)
class RayLink:
    """To the controller and the tracker, which are actors."""

    controller: ActorHandle
    tracker: ActorHandle
    run: RunInfo
    _publishing: ray.ObjectRef | None = None
    _gauges: Gauges | None = None

    def begin_attempt(self, at_least: int) -> int:
        import ray

        attempt: Any = ray.get(self.controller.begin_attempt.remote(at_least))
        return attempt

    def begin_segment(self, name: str, first_ticket: int, num_tickets: int) -> None:
        import ray

        ray.get(self.controller.begin_segment.remote(name, first_ticket, num_tickets))

    def publish(self, version: int, weights: PackedWeights | Offer) -> None:
        import ray

        self._publishing = self.controller.publish.remote(version, [ray.put(weights)])

    def published(self) -> PublishReport | None:
        import ray

        if self._publishing is None:
            return None
        report = ray.get(self._publishing)
        self._publishing = None
        return report

    def evaluated(self) -> None:
        import ray

        ray.get(self.controller.evaluated.remote())

    def evaluations(self) -> dict[int, StepMetrics]:
        import ray

        evaluations: Any = ray.get(self.tracker.evaluations.remote())
        return evaluations

    def learners_do(self, what: str) -> None:
        self.controller.learners_do.remote(what)

    def log_step(self, step: int, metrics: StepMetrics) -> None:
        self.tracker.log_step.remote(step, metrics)
        self._gauges = self._gauges or Gauges(self.run.name)
        self._gauges.set_step(step, metrics)

    def log_samples(self, step: int, groups: list[ScoredGroup], advantages: list[list[float]]) -> None:
        self.tracker.log_samples.remote(step, groups, advantages)

    def log_checkpoint(self, step: int, path: str, digest: str, mean_reward: float, kept: list[int]) -> None:
        self.tracker.log_checkpoint.remote(step, path, digest, mean_reward, kept)

    def warn(self, text: str) -> None:
        self.controller.warn.remote(text)

    def stop(self, reason: str) -> None:
        import ray

        ray.get(self.controller.stop.remote(reason))

    def stop_reason(self) -> str | None:
        """Why learners that start now must not go on."""
        import ray

        status: Any = ray.get(self.controller.status.remote())
        return status.stop_reason

    def leave_when_evicted(self) -> None:
        """From now on, end this process when the watchdog says so: one that hangs in a collective cannot do it
        itself. Ray Train then starts the gang again."""
        import ray
        import ray.exceptions

        def num_evictions() -> int:
            status: Any = ray.get(self.controller.status.remote(), timeout=30)
            return status.num_evictions

        first = num_evictions()

        def watch() -> None:
            while True:
                time.sleep(EVICTION_POLL_S)
                try:
                    now = num_evictions()
                except ray.exceptions.RayError:  # a controller that is away; the learner's own calls will notice
                    continue
                if now > first:
                    logger.error("the watchdog restarts the learners: this process ends")
                    os._exit(1)

        threading.Thread(target=watch, name="eviction", daemon=True).start()
