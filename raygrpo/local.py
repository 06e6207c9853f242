"""A run in one process, without Ray: for breakpoints, and for machines where one process is all there is.

The learner, the engine, the reward functions and the tracker are those of a distributed run; what is left out is what
lies between them. Every step is sampled, scored and trained in turn, by the newest policy, whatever max_staleness
allows. Prompts and sample seeds are the same as anywhere else, so in deterministic mode so are the weights, to the last
bit, as those of a distributed run with one learner.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from raygrpo.algorithm import zero_spread
from raygrpo.config import RunConfig
from raygrpo.connect import worker_environment
from raygrpo.data import sample_seed
from raygrpo.evaluate import evaluate_with, groups_at_a_time
from raygrpo.evaluation import findings, make_scorers
from raygrpo.in_process import sample_groups
from raygrpo.logs import about_group
from raygrpo.lora import AdapterMerger
from raygrpo.prepare import PreparedRun
from raygrpo.run_directory import (
    CHECKPOINT_DIR,
    EXPORT_DIR,
    RunResult,
    driver_log,
    exported_policy,
    latest_run_directory,
    new_run_directory,
    run_info,
    run_result,
)
from raygrpo.summary import summarise
from raygrpo.timeline import Interval
from raygrpo.train import Watcher
from raygrpo.types import GroupRequest, RolloutGroup, ScoredGroup, StepMetrics

if TYPE_CHECKING:
    from raygrpo.direct_transfer import Offer
    from raygrpo.engines.sampling import SamplingEngine
    from raygrpo.rewards import Scorer
    from raygrpo.roles.reports import PublishReport
    from raygrpo.tracking import Tracker
    from raygrpo.weights import PackedWeights


logger = logging.getLogger(__name__)


def train_locally(
    prepared: PreparedRun, watcher: Watcher, *, resume: bool = False, resume_command: str | None = None
) -> RunResult:
    """As train.train, in this process. Raises ValueError for a run of several learners or generators."""
    config = prepared.config
    if config.learner.num_workers > 1 or config.generator.num_actors > 1:
        raise ValueError(
            f"a local run has one learner and one generator, not {config.learner.num_workers} and "
            f"{config.generator.num_actors}: set learner.num_workers=1 generator.num_actors=1"
        )
    if config.generator.weight_transfer == "direct":
        raise ValueError(
            "a local run hands the weights over in its own memory, which generator.weight_transfer (direct) does not "
            "change: leave it out"
        )
    _require_room_on_the_gpu(config)
    run_dir = latest_run_directory(config) if resume else new_run_directory(config)
    with driver_log(run_info(config, run_dir), resume=resume):
        return _train(prepared, watcher, run_dir, resume_command)


def _require_room_on_the_gpu(config: RunConfig) -> None:
    """Raise ValueError for a vLLM that would leave the learner beside it nothing of the GPU that both use."""
    generator, learner = config.generator, config.learner
    limits = {"gpu_memory_utilization", "kv_cache_memory_bytes"}
    if generator.engine != "vllm" or not learner.num_gpus or limits & set(generator.vllm):
        return
    if generator.num_gpus and learner.num_gpus + generator.num_gpus > 1:
        raise ValueError(
            f"a local run has learner and generator on one GPU, of which vLLM would fill "
            f"{generator.gpu_memory_share:.0%}: learner.num_gpus ({learner.num_gpus:g}) and generator.num_gpus "
            f"({generator.num_gpus:g}) must be shares of it, e.g. 0.5 and 0.5; or set "
            "generator.vllm.gpu_memory_utilization"
        )


def _train(prepared: PreparedRun, watcher: Watcher, run_dir: Path, resume_command: str | None) -> RunResult:
    config = prepared.config
    os.environ.update(worker_environment(config))
    watcher.on_phase("starting the engine and the learner")
    from raygrpo.engines.sampling import make_engine
    from raygrpo.rewards import Scorer
    from raygrpo.rewards.inline import InlineRewards
    from raygrpo.roles.learner import LearnerSetup, learn
    from raygrpo.tracking import Tracker

    tracker = Tracker(config, str(run_dir), resume_command=resume_command)
    tracker.start()
    for step, metrics in tracker.history().items():  # of a run that goes on
        watcher.on_step(step, metrics)
    for version, metrics in tracker.evaluations().items():
        watcher.on_evaluation(version, metrics)
    status = "FAILED"
    try:
        join_process_group(config)
        engine = make_engine(
            config.model,
            config.generator,
            max_model_len=prepared.max_model_len,
            num_threads=config.generator.num_threads or len(os.sched_getaffinity(0)),
        )
        scorer = Scorer(config.reward, process=InlineRewards(config.reward.functions))
        scorers = {}
        if config.eval is not None:
            make = lambda reward: Scorer(reward, process=InlineRewards(reward.functions))  # noqa: E731
            scorers = make_scorers(config, make)
        link = LocalRun(prepared, engine, scorer, scorers, tracker, watcher)
        setup = LearnerSetup(
            config=config,
            link=link,
            prompts_digest=prepared.prompts.digest,
            checkpoint_dir=str(run_dir / CHECKPOINT_DIR),
            export_dir=str(run_dir / EXPORT_DIR),
        )
        learn(setup, link.stream)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        history = tracker.history()
        evaluations = tracker.evaluations()
        summary = summarise(history, evaluations).as_dict()
        links = tracker.finish(status, summary, exported_policy(run_dir, status))
    return run_result(run_dir, history, evaluations, links)


def join_process_group(config: RunConfig) -> None:
    """torch.distributed with this process alone, which DeepSpeed and vLLM share. It stays until the process ends: both
    hold on to it."""
    import torch.distributed as dist

    if dist.is_initialized():
        return
    os.environ.setdefault("LOCAL_RANK", "0")
    backend = "nccl" if config.learner.num_gpus else "gloo"
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=0, world_size=1)


class LocalRun:
    """What roles/link.py is in a distributed run, and the stream of its groups."""

    def __init__(
        self,
        prepared: PreparedRun,
        engine: SamplingEngine,
        scorer: Scorer,
        evaluation_scorers: dict[str, Scorer],
        tracker: Tracker,
        watcher: Watcher,
    ):
        self._config = prepared.config
        self._prompts = prepared.prompts
        self._engine = engine
        self._scorer = scorer
        self._evaluation = prepared.evaluation
        self._evaluation_scorers = evaluation_scorers
        self._evaluated: Interval | None = None  # when the last evaluation ran, until a publish reports it
        self._tracker = tracker
        self._watcher = watcher
        self._merge = AdapterMerger(self._config.model) if self._config.model.lora else None
        self._num_warnings = 0
        self._version = -1
        self._tickets = range(0)
        self._report: PublishReport | None = None

    # The learner's link.

    def begin_attempt(self, at_least: int) -> int:
        return max(1, at_least)

    def begin_segment(self, name: str, first_ticket: int, num_tickets: int) -> None:
        self._tickets = range(first_ticket, first_ticket + num_tickets)

    def publish(self, version: int, weights: PackedWeights | Offer) -> None:
        from raygrpo.roles.reports import PublishReport
        from raygrpo.weights import PackedWeights, unpack

        assert isinstance(weights, PackedWeights), "train_locally refuses the other way"
        start_s = time.time()
        tensors = unpack(weights)
        self._engine.load_weights(self._merge(tensors) if self._merge else tensors)
        is_first = self._version < 0
        if is_first:
            self._watcher.on_phase("training")
        self._version = version
        seconds = time.time() - start_s
        self._report = PublishReport(
            version=version,
            num_bytes=weights.num_bytes,
            seconds=seconds,
            load_s=seconds,
            end_s=time.time(),
            num_generators=1,
            failed=[],
            generator_failures=0,
            evaluated=self._evaluated,
        )
        self._evaluated = None
        # Of the weights that a resumed run begins with, the run before may have evaluated them.
        if not (is_first and version in self._tracker.evaluations()):
            self._evaluate(version)

    def _evaluate(self, version: int) -> None:
        """Evaluate the weights just loaded, if it is their turn."""
        settings = self._config.eval
        if settings is None or self._evaluation is None or not settings.due(version, self._config.num_steps):
            return
        start_s = time.time()
        sets = evaluate_with(
            self._engine,
            self._evaluation_scorers,
            self._evaluation,
            version=version,
            at_a_time=groups_at_a_time(self._config),
        )
        self._evaluated = (start_s, time.time())
        seconds = self._evaluated[1] - start_s
        self._tracker.log_evaluation(version, *findings(sets, seconds, settings.table_prompts))
        self._watcher.on_evaluation(version, self._tracker.evaluations(version)[version])

    def evaluated(self) -> None:
        pass  # a publish returns when it is done

    def evaluations(self) -> dict[int, StepMetrics]:
        return self._tracker.evaluations()

    def published(self) -> PublishReport | None:
        report, self._report = self._report, None
        return report

    def learners_do(self, what: str) -> None:
        pass  # no watchdog: whoever runs one process can look into it

    def log_step(self, step: int, metrics: StepMetrics) -> None:
        self._tracker.log_step(step, metrics)
        self._watcher.on_step(step, metrics)
        warnings = self._tracker.warnings(self._num_warnings)
        self._num_warnings += len(warnings)
        for text in warnings:
            self.warn(text)

    def log_samples(self, step: int, groups: list[ScoredGroup], advantages: list[list[float]]) -> None:
        self._tracker.log_samples(step, groups, advantages)

    def log_checkpoint(self, step: int, path: str, digest: str, mean_reward: float, kept: list[int]) -> None:
        self._tracker.log_checkpoint(step, path, digest, mean_reward, kept)

    def warn(self, text: str) -> None:
        self._watcher.on_warning(text)

    def stop(self, reason: str) -> None:
        raise RuntimeError(reason)

    # The stream.

    def stream(self, name: str) -> Callable[[], ScoredGroup]:
        """See learner.learn. Nothing is sampled before it is asked for."""
        return self._groups().__next__

    def _groups(self) -> Iterator[ScoredGroup]:
        """The segment's, sampled a step at a time."""
        per_step = self._config.groups_per_step
        for start in range(0, len(self._tickets), per_step):
            yield from self._sample_step(self._tickets[start : start + per_step])

    def _sample_step(self, tickets: range) -> list[ScoredGroup]:
        """One group for each ticket; with dynamic sampling, tickets without spread take their next prompt."""
        replacements = dict.fromkeys(tickets, 0)
        finished: dict[int, ScoredGroup] = {}
        while replacements:
            for group in self._roll_out(replacements):
                with about_group(group.ticket):
                    scored = self._scorer.score(group)
                if not zero_spread(scored.totals) or group.replacement >= self._config.algorithm.dynamic_sampling:
                    finished[group.ticket] = scored
                    del replacements[group.ticket]
                else:
                    replacements[group.ticket] += 1
        return [finished[ticket] for ticket in tickets]

    def _roll_out(self, replacements: dict[int, int]) -> list[RolloutGroup]:
        """Sample the tickets' prompts, as many at a time as the engine is given."""
        seed = self._config.seed
        requests = [
            GroupRequest(
                ticket=ticket,
                prompt=self._prompts.at(ticket, seed, replacement=replacement),
                seeds=[sample_seed(seed, ticket, i, replacement) for i in range(self._config.group_size)],
                replacement=replacement,
            )
            for ticket, replacement in replacements.items()
        ]
        groups = sample_groups(self._engine, requests, version=self._version, at_a_time=groups_at_a_time(self._config))
        for group in groups:
            with about_group(group.ticket):
                logger.info("sampled by version %d: %s", group.policy_version, group.error or "whole")
        return groups
