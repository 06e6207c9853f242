"""The learner: what each worker of the Ray Train gang runs.

Per step: wait for this rank's share of the step's groups, update the policy (policy_update.py), publish the new
version, report. What it waits for, and what unblocks it:

    the step's groups             the stream (stream.py), whose gate waits for an earlier publish of ours
    the other learners            their share of the same step
    the previous publish's acks   the generators (controller.py)
"""

from __future__ import annotations

import logging
import math
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raygrpo.checkpoint import Checkpoint, CheckpointStore, RunState
from raygrpo.config import TRAINING_REWARD, RunConfig
from raygrpo.logs import about_group, always, open_log
from raygrpo.roles.policy import build_policy, export_policy
from raygrpo.roles.ranks import gather
from raygrpo.roles.step_report import Facts, StepTimes, combine_facts, facts_of, merge_times
from raygrpo.stream import iterate_groups
from raygrpo.timeline import Interval
from raygrpo.tracking.samples import shown_groups
from raygrpo.types import FENCED, RunStopped, ScoredGroup, StepMetrics

if TYPE_CHECKING:
    from torch import Tensor

    from raygrpo.direct_transfer import Offer, WeightsServer
    from raygrpo.roles.link import RayLink, RunLink
    from raygrpo.roles.reports import PublishReport
    from raygrpo.weights import PackedWeights

logger = logging.getLogger(__name__)

SEGMENT, TAIL = "segment", "tail"  # datasets: of checkpoint.every steps, and of those that are left at the end
RESUME_NEEDS = {
    "num_learners": "learner.num_workers",
    "zero_stage": "learner.deepspeed.zero_optimization.stage",
    "groups_per_step": "groups_per_step",
    "seed": "seed",
    "prompts_digest": "a dataset with digest",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSetup:
    """What a worker of the gang is given."""

    config: RunConfig
    link: RunLink
    prompts_digest: str
    checkpoint_dir: str
    export_dir: str


def segments(config: RunConfig, first_step: int) -> Iterator[tuple[str, int, int]]:
    """(name of the dataset, first step, end step) of each segment from first_step on: they end where checkpoint.every
    divides, and at the end of the run. One that begins in between has a dataset with more rows than it needs."""
    every = config.checkpoint.every
    start = first_step
    while start < config.num_steps:
        end = min(start - start % every + every, config.num_steps)
        yield (TAIL if end == config.num_steps and end % every else SEGMENT), start, end
        start = end


def run_learner(setup: LearnerSetup, link: RayLink) -> None:
    """The train loop of one worker (Ray Train calls it on every rank)."""
    import ray.train

    open_log(link.run, f"learner-{ray.train.get_context().get_world_rank()}")
    if link.stop_reason() is not None:
        return
    link.leave_when_evicted()
    try:
        learn(setup, lambda name: iterate_groups(ray.train.get_dataset_shard(name)))
    except RunStopped as error:
        # Raised all the same: another rank may wait for this one in a collective. Ray Train then starts the gang again,
        # which sees the reason above and returns.
        link.stop(str(error))
        raise
    except Exception:
        logger.exception("this learner failed")
        raise


def learn(setup: LearnerSetup, stream: Callable[[str], Callable[[], ScoredGroup]]) -> None:
    """Train from the newest checkpoint to the end of the run; all ranks call it, torch.distributed is initialised.

    stream: begins a segment's execution and gives this rank's share of it: a function that returns the next group, and
    raises StopIteration after the last. No ticket is claimed before all ranks have called it.

    An execution takes seconds to begin: the first one does while the policy is built, the others during a checkpoint.
    """
    run_dir = Path(setup.checkpoint_dir).parent
    if not run_dir.exists():  # a node that joined after the driver had asked all (jobs/driver.py)
        raise RunStopped(
            f"the run's directory {run_dir} is not there on {platform.node()}, where a learner started: set output_dir "
            "to storage that all nodes share"
        )
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # DeepSpeed 0.19.8 against torch 2.13
    learner = Learner(setup, stream)
    coming = segments(setup.config, learner.first_step)
    segment = learner.begin_segment(next(coming, None))
    learner.take_up()
    while segment is not None:
        learner.train_segment(segment)
        following = learner.begin_segment(next(coming, None))
        learner.save(segment.end_step)
        segment = following
    learner.finish()


@dataclass(frozen=True, slots=True)
class Segment:
    """Steps first_step .. end_step - 1, whose stream has begun; next_group gives this rank's share of it."""

    first_step: int
    end_step: int
    next_group: Callable[[], ScoredGroup]


class Learner:
    """One rank's policy and its place in the pipeline. All ranks call every method; the constructor finds out where the
    run goes on, `take_up` loads what that takes."""

    def __init__(self, setup: LearnerSetup, stream: Callable[[str], Callable[[], ScoredGroup]]):
        import torch.distributed as dist

        self._config = setup.config
        self._stream = stream
        self._link = setup.link
        self._export_dir = setup.export_dir
        self._prompts_digest = setup.prompts_digest
        self._checkpoints = CheckpointStore(
            setup.checkpoint_dir, keep=setup.config.checkpoint.keep, keep_best=setup.config.checkpoint.keep_best
        )
        self._committing: Future[None] | None = None
        self._server: WeightsServer | None = None  # of weights that generators pull
        self._is_checked = False
        self._rewards: list[float] = []  # mean reward of each step since the last checkpoint
        self._failed_checkpoints = 0  # since the last step was reported
        self._generator_failures = 0  # the same
        self._evaluations_failed = 0  # the same
        self._rank = dist.get_rank()
        self._unreported: tuple[int, StepMetrics, StepTimes] | None = None
        self._last_publish: Interval = (0.0, 0.0)
        self._step_start_s = time.time()
        self._background = ThreadPoolExecutor(1, "checkpoint")
        newest = self._checkpoints.newest() if self._rank == 0 else None
        self._checkpoint = gather(newest)[0]
        self._attempt = 0
        if self._checkpoint is not None:
            self._check_resumable(self._checkpoint.state)
        if self._rank == 0:
            at_least = self._checkpoint.state.attempt + 1 if self._checkpoint is not None else 0
            self._attempt = self._link.begin_attempt(at_least)
        self._attempt = gather(self._attempt)[0]
        always(attempt=self._attempt)
        logger.info("learning begins at step %d", self.first_step)

    @property
    def first_step(self) -> int:
        """The first that is to be trained."""
        return self._checkpoint.state.step if self._checkpoint is not None else 0

    def _check_resumable(self, state: RunState) -> None:
        """Refuse what would silently train something else."""
        for key, now in self._what_stays().items():
            before = getattr(state, key)
            if before != now:
                what = RESUME_NEEDS[key]
                raise RunStopped(f"the checkpoint of step {state.step} has {what} {before}, and this run has {now}")

    def _what_stays(self) -> dict[str, Any]:
        """The settings that a run cannot change when it is resumed."""
        return {
            "num_learners": self._config.learner.num_workers,
            "zero_stage": self._config.learner.zero_stage,
            "groups_per_step": self._config.groups_per_step,
            "seed": self._config.seed,
            "prompts_digest": self._prompts_digest,
        }

    def take_up(self) -> None:
        """The policy as the newest checkpoint left it, and its first publish."""
        self._policy, self._engine, self._updater, self._shape = build_policy(self._config)
        if self._checkpoint is not None:
            self._engine.load(self._checkpoint.directory)
            self._updater.kl_coef = self._checkpoint.state.kl_coef
        self.publish(self.first_step)

    def _state(self, step: int) -> RunState:
        return RunState(
            step=step,
            attempt=self._attempt,
            kl_coef=self._updater.kl_coef,
            mean_reward=sum(self._rewards) / len(self._rewards) if self._rewards else math.nan,
            **self._what_stays(),
        )

    def save(self, step: int) -> None:
        """A checkpoint after `step` steps; all ranks call it. A disk that is full costs the checkpoint, not the run.

        Returns when the ranks have written; the first one digests and flushes the files while training goes on.
        """
        if self._rank == 0:
            self._report()
            self._link.learners_do(f"writing the checkpoint of step {step}")
            self._finish_commit()
        directory = self._checkpoints.root / f"step-{step:06d}.partial"
        failure = _attempt_io(lambda: self._checkpoints.begin(step)) if self._rank == 0 else None
        failure = failure or _first(gather(failure))
        if failure is None:
            failure = _first(gather(_attempt_io(lambda: self._engine.save(directory))))
        if self._rank == 0:
            state = self._state(step)
            self._rewards.clear()
            self._committing = self._background.submit(self._commit, state, failure)

    def _commit(self, state: RunState, failure: str | None) -> None:
        whole: list[Checkpoint] = []
        failure = failure or _attempt_io(
            lambda: whole.append(self._checkpoints.commit(state, self._scores(state.step)))
        )
        if failure is not None:
            self._checkpoints.abandon(state.step)
            self._failed_checkpoints += 1
            self._link.warn(f"the checkpoint of step {state.step} was not written: {failure}")
        for checkpoint in whole:
            logger.info("the checkpoint of step %d is whole", state.step)
            path, kept = str(checkpoint.directory), self._checkpoints.steps()
            self._link.log_checkpoint(state.step, path, checkpoint.digest, state.mean_reward, kept)

    def _finish_commit(self) -> None:
        """Wait until the last checkpoint is whole, or given up."""
        if self._committing is not None:
            self._committing.result()
            self._committing = None

    def begin_segment(self, steps: tuple[str, int, int] | None) -> Segment | None:
        """Begin the stream of a segment that `segments` named; None at the end of the run."""
        if steps is None:
            return None
        name, first_step, end_step = steps
        if self._rank == 0:
            per_step = self._config.groups_per_step
            self._link.begin_segment(name, first_step * per_step, (end_step - first_step) * per_step)
        # With the learner of rank 0 the last: an execution begins when all have asked.
        return Segment(first_step, end_step, self._stream(name))

    def train_segment(self, segment: Segment) -> None:
        """All of its steps, from this rank's share of their groups."""
        for step in range(segment.first_step, segment.end_step):
            always(step=step)
            # On-policy, the next group cannot come before the acks; else generating goes on while they come.
            if self._config.max_staleness == 0:
                self._report()
            wait_start_s = time.time()
            if self._rank == 0:
                self._link.learners_do(f"waiting for the groups of step {step}")
            groups = self._collect(step, segment.next_group)
            learn_start_s = time.time()
            self._report()
            if self._rank == 0:
                self._link.learners_do(f"training step {step}")
            metrics, advantages = self._updater.update(groups, step)
            learn_end_s = time.time()
            logger.info(
                "trained in %.3f s after %.3f s of waiting: mean reward %.4g",
                learn_end_s - learn_start_s,
                learn_start_s - wait_start_s,
                metrics["reward/mean"],
            )
            if not self._is_checked:
                self._check_generators(metrics)
            self._rewards.append(metrics["reward/mean"])
            if self._config.tracking.shows_samples(step):
                self._show_samples(step, groups, advantages)
            times = StepTimes(
                wait=(wait_start_s, learn_start_s),
                learn=(learn_start_s, learn_end_s),
                generate=[(g.group.generate_start_s, g.group.generate_end_s) for g in groups],
                score=[(g.score_start_s, g.score_end_s) for g in groups],
            )
            facts = gather((facts_of(groups, step, self._shape), times))
            self._check_tickets(step, [f for f, _ in facts])
            self.publish(step + 1)
            self._unreported = (
                step,
                metrics | combine_facts([f for f, _ in facts]),
                merge_times([t for _, t in facts]),
            )
        self._report()
        try:
            while True:
                ticket = segment.next_group().group.ticket
                assert ticket == FENCED, f"ticket {ticket} is beyond the segment's end"
        except StopIteration:
            return

    def _collect(self, step: int, next_group: Callable[[], ScoredGroup]) -> list[ScoredGroup]:
        """This rank's share of the step, in ticket order; groups that failed to be generated are counted
        (facts_of) and left out later."""
        per_step = self._config.groups_per_step
        groups = [next_group() for _ in range(per_step // self._config.learner.num_workers)]
        for scored in groups:
            group = scored.group
            if not step - self._config.max_staleness <= group.policy_version <= step:
                raise RuntimeError(
                    f"group {group.ticket} was sampled by version {group.policy_version}, but step {step} accepts "
                    f"staleness 0 to {self._config.max_staleness}"
                )
            with about_group(group.ticket):
                logger.info("arrived, sampled by version %d of %s", group.policy_version, group.generator)
        return groups

    def _show_samples(self, step: int, groups: list[ScoredGroup], advantages: list[list[float]]) -> None:
        """Of the groups of all ranks, of which only those travel that may be shown."""
        tracking = self._config.tracking
        shown = shown_groups(step, groups, tracking.num_samples, tracking.num_traces, self._config.seed)
        gathered = gather([(groups[g], advantages[g]) for g in shown])
        if self._rank == 0:
            pairs = sorted((pair for share in gathered for pair in share), key=lambda pair: pair[0].group.ticket)
            self._link.log_samples(step, [group for group, _ in pairs], [each for _, each in pairs])

    def _check_generators(self, metrics: StepMetrics) -> None:
        """Of the first step, whose groups were sampled by the very weights that are trained: what differs is how the
        two engines compute them."""
        if metrics["policy/skipped_token_fraction"] == 1:  # nothing was encoded: there is nothing to compare yet
            return
        difference, limit = metrics["sampling/logprob_diff"], self._config.learner.max_logprob_diff
        by_cuts = self._config.generator.sampling.most_that_cuts_add
        if not difference <= limit + by_cuts:
            allowed = f", and generator.sampling.top_p can add {by_cuts:.3g}" * (by_cuts > 0)
            raise RunStopped(
                f"generator and learner differ by {difference:.3g} in the mean log-probability of a token "
                f"(learner.max_logprob_diff is {limit:g}{allowed}): they do not compute the same model"
            )
        if by_cuts == math.inf and self._rank == 0:
            self._link.warn(
                "whether generator and learner compute the same model is not checked (learner.max_logprob_diff): top_k "
                "or min_p of generator.sampling cut what is sampled from, which explains any difference "
                f"({difference:.3g} in the mean log-probability of a token)"
            )
        self._is_checked = True

    def _check_tickets(self, step: int, facts: list[Facts]) -> None:
        """Every group of the step was trained once, on one rank, and no other."""
        per_step = self._config.groups_per_step
        tickets = sorted(ticket for f in facts for ticket in f.tickets)
        if tickets != list(range(step * per_step, (step + 1) * per_step)):
            raise RuntimeError(f"step {step} got the tickets {tickets} instead of {per_step} from {step * per_step} on")

    def publish(self, version: int) -> None:
        """Hand the weights over; all ranks call it. Returns when they are packed: `_report` waits for the acks."""
        weights = self._engine.published_weights(trained_only=self._config.model.lora is not None)
        if self._rank == 0:
            self._link.publish(version, self._hand_out(version, weights))
        else:
            for _ in weights:  # takes part in ZeRO-3's gathering
                pass

    def _hand_out(self, version: int, weights: Iterator[tuple[str, Tensor]]) -> PackedWeights | Offer:
        """What generators are given of the weights, by generator.weight_transfer."""
        if self._config.generator.weight_transfer == "object_store":
            from raygrpo.weights import pack

            return pack(weights, copy=self._engine.gathers_weights)
        if self._server is None:
            from ray.util import get_node_ip_address

            from raygrpo.direct_transfer import WeightsServer

            self._server = WeightsServer(get_node_ip_address(), keep=self._config.kept_versions)
        return self._server.publish(version, weights)

    def _report(self) -> None:
        """Wait for the acks of the last publish and log its step; on rank 0, where there is something to report."""
        report = self._link.published() if self._rank == 0 else None
        if report is not None:
            self._generator_failures += report.generator_failures
            self._evaluations_failed += report.evaluations_failed
            if self._unreported is not None:
                step, metrics, times = self._unreported
                end_s = max(report.end_s, times.learn[1]) if self._config.max_staleness == 0 else times.learn[1]
                evaluated = report.evaluated
                published = (max(times.learn[1], evaluated[1]) if evaluated else times.learn[1], report.end_s)
                # Where generating goes on meanwhile, most of a publish falls into the next step.
                publishes = [self._last_publish, published]
                metrics = metrics | times.metrics(
                    publishes, self._evaluations_in(report), report.sampled, self._step_start_s, end_s
                )
                self._last_publish = published
                metrics["perf/tokens_per_s"] = metrics["completions/num_tokens"] / metrics["timing_s/step"]
                metrics["weights/mb_per_s"] = report.num_bytes / 1e6 / max(report.seconds, 1e-9)
                metrics["faults/generator_failures"] = float(self._generator_failures)
                if self._config.evaluates:
                    metrics["faults/evaluations_failed"] = float(self._evaluations_failed)
                metrics["faults/checkpoints_failed"] = float(self._failed_checkpoints)
                self._failed_checkpoints = self._generator_failures = self._evaluations_failed = 0
                metrics["run/attempt"] = float(self._attempt)
                self._link.log_step(step, metrics)
                self._step_start_s = end_s
            else:
                self._step_start_s = report.end_s
        self._unreported = None

    def _evaluations_in(self, report: PublishReport) -> list[Interval] | None:
        """When policies were evaluated during the step that the report ends; None in a run that evaluates none."""
        if not self._config.evaluates:
            return None
        return [report.evaluated] if report.evaluated else []

    def _scores(self, before_step: int) -> dict[int, float] | None:
        """What ranks the checkpoints of earlier steps, where that is an evaluation: it is over by the next publish."""
        best_by = self._config.checkpoint.best_by
        if best_by == TRAINING_REWARD:
            return None
        evaluations = self._link.evaluations()
        return {v: metrics[best_by] for v, metrics in evaluations.items() if v < before_step and best_by in metrics}

    def finish(self) -> None:
        """Write the trained policy as a Hugging Face model, and wait for its evaluation; all ranks call it."""
        self._finish_commit()
        state = {name: tensor.cpu().clone() for name, tensor in self._engine.named_weights() if self._rank == 0}
        if self._rank == 0:
            export_policy(self._policy, state, self._config.model, self._export_dir)
            self._link.learners_do("waiting for the last evaluation")
            self._link.evaluated()
            self._checkpoints.rank(self._scores(self._config.num_steps + 1))


def _attempt_io(action: Callable[[], object]) -> str | None:
    """What went wrong with writing, or None. torch.save wraps a full disk in a RuntimeError."""
    try:
        action()
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _first(failures: list[str | None]) -> str | None:
    return next((failure for failure in failures if failure is not None), None)
