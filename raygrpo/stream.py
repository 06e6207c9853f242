"""The stream of grouped rollouts: tickets -> rollout stage -> reward stage -> learners, in Ray Data.

A segment is one Ray Data execution. Its rows start as tickets (integers); each becomes exactly one group, always:
errors are columns, never dropped rows. What the stages wait for, and what unblocks them:

    rollout stage   a claim from the controller        the learners publish a version that is new enough
                    a generator's completions          the generator's engine
    reward stage    a rollout group                    the rollout stage
    learner         the next group in ticket order     the reward stage

Claims are made in ticket order and rows reach the learners in ticket order, so the rows a learner waits for are always
among the admitted ones: the gate (controller.py) cannot deadlock. Three things carry that. Ray Data preserves the
order. A block of `groups_per_block` tickets never reaches over the end of a step, or it would wait for a ticket behind
the gate; blocks are never merged. There is no shard locality (Ray Train's default), which buffers rows for a "nearer"
learner while the others starve.

What a group costs on the way (`raygrpo bench pipeline`) is mostly per call and per block, so calls carry a whole block.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.data
import ray.exceptions
from ray.data._internal.execution.execution_callback import ExecutionCallback

from raygrpo.algorithm import zero_spread
from raygrpo.config import RewardConfig
from raygrpo.group_table import groups_to_table, scored_groups_to_table, table_to_groups, table_to_scored_groups
from raygrpo.logs import about_group, open_log
from raygrpo.placement import proxies
from raygrpo.rewards import Scorer
from raygrpo.roles.claims import Claim, Release
from raygrpo.types import (
    NeverBegunError,
    RolloutGroup,
    RunInfo,
    ScoredGroup,
)

if TYPE_CHECKING:
    import ray.train
    from ray.actor import ActorHandle

logger = logging.getLogger(__name__)

# Of the stage whose blocks go to the learners. Ray 2.60 sends what is smaller than this (100 kB by default) to the
# process that asked for it, here Ray Data's, and never frees it there if the last to let go is another, here a learner:
# the process would grow by every group of the run. What lies in the object store is freed.
RETURNS_IN_STORE = {"env_vars": {"RAY_max_direct_call_object_size": "1000"}}
POLL_S, HOT_POLL_S, HOT_S, POLL_SHARE = 0.05, 0.002, 0.15, 0.7  # of Ray Data's loop: see AdaptivePoll
ANSWER_LIMIT_S = 10.0  # for a generator to say how it is


@dataclass(frozen=True, slots=True)
class _Call:
    """A group that a generator was asked for."""

    row: int
    claim: Claim
    deadline_s: float  # time.monotonic(): when to ask the generator whether it hangs


class RolloutStage:
    """A thin proxy between Ray Data and the generators, without torch or an engine: it claims, calls, and returns the
    groups of a block."""

    def __init__(self, controller: ActorHandle, stream: int, run: RunInfo | None = None):
        if run is not None:
            open_log(run, "rollout")
        self._controller = controller
        self._stream = stream

    def __call__(self, rows: pa.Table) -> pa.Table:
        return groups_to_table(self.roll_out(rows["row"].to_pylist()))

    def roll_out(self, rows: list[int], replacement: int = 0) -> list[RolloutGroup]:
        """The rows' groups, which generators sample at the same time. One that fails goes to another generator until
        one answers; the claim of a ticket always gives the same prompt and seeds."""
        groups: dict[int, RolloutGroup] = {}
        calls: dict[ray.ObjectRef, _Call] = {}
        claims = {self._controller.claim_block.remote(self._stream, rows, replacement): rows}
        while claims or calls:
            releases, again = [], []
            for ref in _finished_or_late(calls, list(claims)):
                if ref in claims:
                    calls |= self._call(claims.pop(ref), ray.get(ref), groups)
                    continue
                call = calls.pop(ref)
                group, release = _answer(ref, call.claim)
                releases.append(release)
                _log_answer(call.claim, group, release.failure)
                if group is None:
                    again.append(call.row)
                else:
                    groups[call.row] = replace(group, replacement=replacement)
            if releases:
                released = self._controller.release_block.remote(self._stream, releases)
                if again:  # the controller must know what failed; Ray does not keep the order of an actor's calls
                    ray.get(released)
            # Each for itself, and beside the calls: one may have to wait until others have come back.
            claims |= {self._controller.claim_block.remote(self._stream, [row], replacement): [row] for row in again}
        return [groups[row] for row in rows]

    def _call(
        self, rows: list[int], claims: list[Claim], groups: dict[int, RolloutGroup]
    ) -> dict[ray.ObjectRef, _Call]:
        """Call the rows' generators. A row that gets none becomes a group with an error."""
        calls = {}
        for row, claim in zip(rows, claims, strict=True):
            if claim.generator is None:
                groups[row] = _failed_group(claim, claim.error)
                continue
            arguments = (claim.ticket, claim.prompt, claim.seeds, claim.min_version, claim.sampling)
            ref = claim.generator.generate.remote(*arguments)
            calls[ref] = _Call(row, claim, time.monotonic() + claim.timeout_s)
        return calls


def _finished_or_late(calls: dict[ray.ObjectRef, _Call], claims: list[ray.ObjectRef]) -> list[ray.ObjectRef]:
    """Wait until there is one; then all of them."""
    refs = [*calls, *claims]
    while True:
        patience_s = min((call.deadline_s - time.monotonic() for call in calls.values()), default=None)
        ray.wait(refs, num_returns=1, timeout=None if patience_s is None else max(0.0, patience_s))
        finished, running = ray.wait(refs, num_returns=len(refs), timeout=0)
        now_s = time.monotonic()
        late = [ref for ref in running if ref in calls and calls[ref].deadline_s <= now_s]
        if ready := finished + _hanging(calls, late):
            return ready


def _hanging(calls: dict[ray.ObjectRef, _Call], late: list[ray.ObjectRef]) -> list[ray.ObjectRef]:
    """Those of the late calls whose generator does not answer, or has had the group, or another that this one waits
    for, in its engine for too long. The others get a later deadline: they were waiting for a place in the engine."""
    questions = {}
    for ref in late:
        claim = calls[ref].claim
        ask = claim.generator.seconds_in_engine  # type: ignore[union-attr]
        questions[ask.remote(claim.ticket, is_evaluation=claim.sampling is not None)] = ref
    if questions:
        ray.wait(list(questions), num_returns=len(questions), timeout=ANSWER_LIMIT_S)
    hanging = []
    for question, ref in questions.items():
        call = calls[ref]
        try:
            in_engine_s: Any = ray.get(question, timeout=0)
            remaining_s = call.claim.timeout_s - in_engine_s
        except ray.exceptions.RayError:
            remaining_s = 0.0
        if remaining_s > 0:
            calls[ref] = replace(call, deadline_s=time.monotonic() + remaining_s)
        else:
            hanging.append(ref)
    return hanging


def _answer(ref: ray.ObjectRef, claim: Claim) -> tuple[RolloutGroup | None, Release]:
    """The generator's group, or None where it has none, and what the controller is to know."""
    release = Release(ticket=claim.ticket, generator_name=claim.generator_name)
    try:
        group: RolloutGroup = ray.get(ref, timeout=0)
    except ray.exceptions.GetTimeoutError:
        failure = f"no answer within {claim.timeout_s:g} s (generator.group_timeout_s)"
        return None, replace(release, failure=failure, restart=True)
    except ValueError as error:  # this request cannot be served, by no generator
        return _failed_group(claim, str(getattr(error, "cause", error))), release  # Ray adds the traceback
    except (ray.exceptions.RayError, TimeoutError) as error:
        failure = f"{type(error).__name__}: {str(error).strip().rpartition(chr(10))[2]}"
        is_innocent = isinstance(error, (NeverBegunError, TimeoutError))  # TimeoutError: waited for a version in vain
        return None, replace(release, failure=failure, begun=not is_innocent)
    flaw = group.flaw(ticket=claim.ticket, num_completions=len(claim.seeds), min_version=claim.min_version)
    if flaw:
        return None, replace(release, failure=f"what it returned is no group: {flaw}", restart=True)
    return group, release


def _log_answer(claim: Claim, group: RolloutGroup | None, failure: str | None) -> None:
    with about_group(claim.ticket, is_evaluation=claim.sampling is not None, attempt=claim.attempt):
        if group is None:
            logger.warning("no group from %s: %s", claim.generator_name, failure)
        elif group.error:
            logger.warning("%s cannot sample it: %s", claim.generator_name, group.error)
        else:
            logger.debug("came back from %s", claim.generator_name)


def _failed_group(claim: Claim, error: str) -> RolloutGroup:
    now = time.time()
    return RolloutGroup(
        ticket=claim.ticket,
        prompt=claim.prompt,
        policy_version=claim.min_version,
        rollouts=[],
        generator=claim.generator_name,
        generate_start_s=now,
        generate_end_s=now,
        error=error,
        attempt=claim.attempt,
    )


class RewardStage:
    """Scores one group at a time; the Scorer bounds what user code can do."""

    def __init__(self, config: RewardConfig, import_paths: list[str], run: RunInfo | None = None):
        if run is not None:
            open_log(run, "reward")
        self._scorer = Scorer(config, import_paths)

    def __call__(self, table: pa.Table) -> pa.Table:
        return scored_groups_to_table([_score(self._scorer, group) for group in table_to_groups(table)])


def _score(scorer: Scorer, group: RolloutGroup) -> ScoredGroup:
    with about_group(group.ticket, attempt=group.attempt):
        return scorer.score(group)


class DynamicSamplingStage:
    """Both stages in one, for dynamic sampling (DAPO, arXiv:2503.14476, section 3.2): a ticket whose rewards are all
    the same claims its next prompt, up to `max_replacements` times, and then emits what it has. Which prompt is next
    depends on the ticket alone, so the stream stays in order and reproducible."""

    def __init__(
        self,
        controller: ActorHandle,
        stream: int,
        groups_in_flight: int,
        config: RewardConfig,
        import_paths: list[str],
        max_replacements: int,
        run: RunInfo | None = None,
    ):
        """groups_in_flight: that wait for generators at once; one scores at a time."""
        self._rollouts = RolloutStage(controller, stream, run)
        self._threads = ThreadPoolExecutor(groups_in_flight)
        self._scorer = Scorer(config, import_paths)
        self._scoring = threading.Lock()
        self._max_replacements = max_replacements

    def __call__(self, rows: pa.Table) -> pa.Table:
        return scored_groups_to_table(list(self._threads.map(self._sample, rows["row"].to_pylist())))

    def _sample(self, row: int) -> ScoredGroup:
        for replacement in range(self._max_replacements + 1):
            [group] = self._rollouts.roll_out([row], replacement)
            with self._scoring:
                scored = _score(self._scorer, group)
            if not zero_spread(scored.totals):
                break
        return scored


def segment_dataset(
    name: str,
    num_tickets: int,
    controller: ActorHandle,
    reward: RewardConfig,
    import_paths: list[str],
    *,
    groups_in_flight: int,
    groups_per_block: int = 1,
    max_replacements: int = 0,
    run: RunInfo | None = None,
) -> ray.data.Dataset:
    """The lazy plan of one segment: `num_tickets` rows, one scored group each, in ticket order. Builds a stream of its
    own each time it is called, so that what is left of an earlier attempt is fenced.

    groups_in_flight: how many groups the gate admits at a time, (max_staleness + 1) * groups_per_step; the rollout
    stage waits for as many at once. groups_per_block: how many travel together; divides num_tickets.
    max_replacements: algorithm.dynamic_sampling. run: whose log the stages write.
    """
    _configure_ray_data()  # here: a dataset keeps the context of the process that builds it, which is Ray Train's
    blocks_in_flight = math.ceil(min(groups_in_flight, num_tickets) / groups_per_block)
    num_proxies, num_cpus = proxies(blocks_in_flight, reward, score=max_replacements > 0)
    calls = math.ceil(blocks_in_flight / num_proxies)
    waiting = {
        "batch_size": None,
        "batch_format": "pyarrow",
        "num_cpus": num_cpus,
        "label_selector": reward.label_selector,
        "compute": ray.data.ActorPoolStrategy(
            size=num_proxies,
            max_concurrent_calls_per_actor=calls,
            max_tasks_in_flight_per_actor=calls,
            enable_true_multi_threading=True,
        ),
    }
    starts = range(0, num_tickets, groups_per_block)
    # from_blocks: from_arrow would run a task for each block, for its schema.
    tickets = ray.data.from_blocks([pa.table({"row": range(start, start + groups_per_block)}) for start in starts])
    stream = ray.get(controller.new_stream.remote(name))
    if max_replacements:
        arguments = (controller, stream, calls * groups_per_block, reward, import_paths, max_replacements, run)
        return tickets.map_batches(
            DynamicSamplingStage, fn_constructor_args=arguments, runtime_env=RETURNS_IN_STORE, **waiting
        )
    return tickets.map_batches(RolloutStage, fn_constructor_args=(controller, stream, run), **waiting).map_batches(
        RewardStage,
        fn_constructor_args=(reward, import_paths, run),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=reward.num_cpus,
        label_selector=reward.label_selector,
        runtime_env=RETURNS_IN_STORE,
        # Ray Data hands over what a round of its loop found finished: all of it at once.
        compute=ray.data.ActorPoolStrategy(size=reward.num_workers, max_tasks_in_flight_per_actor=blocks_in_flight),
    )


def data_config() -> ray.train.DataConfig:
    """How Ray Train splits the stream among learners: in ticket order, round robin, without locality (see the module
    docstring)."""
    import ray.train

    options = ray.data.ExecutionOptions(preserve_order=True)
    return ray.train.DataConfig(execution_options=options, enable_shard_locality=False)


def _configure_ray_data() -> None:
    """Settings of the process's DataContext: no timeout of Ray Data's own, no progress bars beside ours, a shorter
    poll, no memory of executions that are over."""
    context = ray.data.DataContext.get_current()
    context.execution_no_progress_timeout_s = -1
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.memory_usage_poll_interval_s = None  # a thread for each block
    for callback in (AdaptivePoll, NoLeftovers):
        if callback not in context.custom_execution_callback_classes:
            context.custom_execution_callback_classes.append(callback)


class AdaptivePoll(ExecutionCallback):
    """Let finished groups move on at once, without a loop that spins while nothing happens.

    As long as any task waits, as claims at the gate do, a round of Ray Data 2.60's loop lasts 0.1 s, and a group needs
    several rounds on its way to the learner. That period is a constant of its module: this sets it, in the process that
    executes, to almost nothing for a moment after something finished, and to POLL_S otherwise. A round costs the more
    CPU time the more is in flight (milliseconds, with many blocks): the period grows with it, so that the loop takes no
    more than POLL_SHARE of a core.
    """

    def before_execution_starts(self, executor: Any) -> None:
        self._finished = -1
        self._hot_until_s = 0.0
        self._cpu_s = time.thread_time()

    def on_execution_step(self, executor: Any) -> None:
        from ray.data._internal.execution import streaming_executor_state

        metrics = [operator.metrics for operator in executor._topology]
        finished = sum(m.num_tasks_finished + m.num_task_outputs_generated for m in metrics)
        now = time.monotonic()
        if finished != self._finished:
            self._finished = finished
            self._hot_until_s = now + HOT_S
        cpu_s = time.thread_time()
        round_s, self._cpu_s = cpu_s - self._cpu_s, cpu_s
        period = min(POLL_S, max(HOT_POLL_S, round_s / POLL_SHARE)) if now < self._hot_until_s else POLL_S
        streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = period


class NoLeftovers(ExecutionCallback):
    """Give back what the execution before this one left in the process that executes.

    Ray Data 2.60 executes each segment in new threads. The heaps that glibc gives to threads keep, in holes, what those
    that ended had freed; and the executor and its operators refer to each other, so that Python's collector would find
    them tens of executions later. The process grew by 1.8 MB a segment of 100 small blocks, and by 0.4 MB with this.
    """

    def before_execution_starts(self, executor: Any) -> None:
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # glibc
            trim(0)


def iterate_groups(shard: Any) -> Callable[[], ScoredGroup]:
    """Begin the execution of a segment, and return a function: each call gives this learner's next scored group, the
    call after the last raises StopIteration, which ends the execution.

    The execution takes seconds to begin and all learners to ask for a first block, so that is asked for here, in the
    background: it begins while the learner still waits for a publish. Later blocks are not fetched ahead of need.
    """
    batches = iter(shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    pending: list[ScoredGroup] = []
    first: Future[pa.Table | None] = Future()

    def begin() -> None:
        try:
            first.set_result(next(batches, None))
        except BaseException as error:
            first.set_exception(error)

    # A daemon: a learner whose publish fails meanwhile must be able to leave.
    threading.Thread(target=begin, name="stream", daemon=True).start()

    def blocks() -> Iterator[pa.Table]:
        block = first.result()
        if block is not None:
            yield block
            yield from batches

    remaining = blocks()

    def next_group() -> ScoredGroup:
        while not pending:
            pending.extend(table_to_scored_groups(next(remaining)))
        return pending.pop(0)

    return next_group
