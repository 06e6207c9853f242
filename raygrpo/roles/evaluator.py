"""The evaluator: has the generators sample an evaluation's rows, scores them, and hands the figures to the tracker.

A Ray actor beside the stream, so that neither the learners nor the controller wait for a reward function. It claims
rows as the rollout stage does (stream.py), from the stream that the controller opened for this evaluation: what becomes
of generators that fail, hang or die is decided there. What is sampled and how stands in raygrpo/evaluation.py.
"""

from __future__ import annotations

import logging
import queue
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from raygrpo.config import RunConfig
from raygrpo.evaluation import EvaluatedSet, findings, make_scorers
from raygrpo.gauges import EVAL_REWARD, Gauges
from raygrpo.logs import about_group, open_log
from raygrpo.rewards import Scorer
from raygrpo.stream import RolloutStage
from raygrpo.types import FENCED, RunInfo, ScoredGroup

logger = logging.getLogger(__name__)

MAX_CALLS = 256  # threads, each of which waits for one group


class Evaluator:
    """Evaluates one version at a time."""

    def __init__(
        self,
        config: RunConfig,
        sizes: list[int],
        import_paths: list[str],
        controller: str,
        tracker: str,
        run: RunInfo | None = None,
    ):
        """sizes: prompts of each set of config.eval, in its order. controller, tracker: the actors' names; Ray does not
        promise to keep handles for the time that it starts this anew. run: whose log and gauges this writes."""
        if run is not None:
            open_log(run, "evaluator")
        self._gauges = Gauges(run.name) if run else None
        assert config.eval is not None
        self._settings = config.eval
        self._set_of_row = [name for name, size in zip(config.eval.sets, sizes, strict=True) for _ in range(size)]
        self._controller = controller
        self._tracker = tracker
        generator = config.generator
        # Enough to keep the generators busy.
        groups = 1 if config.deterministic else generator.max_groups
        calls = 2 * groups * (generator.max_actors or generator.num_actors)
        self._threads = ThreadPoolExecutor(min(calls, MAX_CALLS, len(self._set_of_row)))
        self._scorers: queue.SimpleQueue[dict[str, Scorer]] = queue.SimpleQueue()
        for _ in range(config.reward.num_workers):
            self._scorers.put(make_scorers(config, lambda reward: Scorer(reward, import_paths)))

    def evaluate(self, stream: int, version: int, only_if_unknown: bool) -> None:
        """Returns when the tracker has what was found, or when the stream was closed meanwhile.

        only_if_unknown: do nothing where the tracker has an evaluation of this version.
        """
        import ray

        tracker, controller = ray.get_actor(self._tracker), ray.get_actor(self._controller)
        if only_if_unknown:
            known: Any = ray.get(tracker.evaluations.remote(version))
            if version in known:
                return
        start_s = time.time()
        stage = RolloutStage(controller, stream)
        rows = range(len(self._set_of_row))
        groups = list(self._threads.map(lambda row: self._evaluate_row(stage, row, version), rows))
        if any(scored.group.ticket == FENCED for scored in groups):
            return
        sets = [
            EvaluatedSet(
                name=name,
                settings=settings,
                groups=[groups[row] for row in rows if self._set_of_row[row] == name],
            )
            for name, settings in self._settings.sets.items()
        ]
        metrics, shown = findings(sets, time.time() - start_s, self._settings.table_prompts)
        ray.get(tracker.log_evaluation.remote(version, metrics, shown))
        if self._gauges is not None:
            for name in self._settings.sets:
                self._gauges.set(EVAL_REWARD, metrics[f"eval/{name}/reward"], set=name)
        logger.info("evaluated version %d in %.3f s", version, time.time() - start_s)

    def _evaluate_row(self, stage: RolloutStage, row: int, version: int) -> ScoredGroup:
        [group] = stage.roll_out([row])
        if group.ticket != FENCED and group.policy_version != version:
            raise RuntimeError(f"version {group.policy_version} sampled a group of the evaluation of version {version}")
        scorers = self._scorers.get()
        try:
            with about_group(row, is_evaluation=True, attempt=group.attempt):
                return scorers[self._set_of_row[row]].score(group)
        finally:
            self._scorers.put(scorers)
