"""The stream of grouped rollouts: tickets -> rollout stage -> reward stage -> learners, in Ray Data.

A segment is one Ray Data execution. Its rows start as tickets (integers); each becomes exactly one group, always:
errors are columns, never dropped rows. What the stages wait for, and what unblocks them:

    rollout stage   a claim from the controller        the learners publish a version that is new enough
                    a generator's completions          the generator's engine
    reward stage    a rollout group                    the rollout stage
    learner         the next group in ticket order     the reward stage

Claims are made in ticket order and rows reach the learners in ticket order, so the rows a learner waits for are always
among the admitted ones: the gate (controller.py) cannot deadlock. Three settings of Ray Data carry that (pipeline.md,
section 2, gives the measurements): order is preserved; every row is a block of its own, or a block would wait for a row
behind the gate; no shard locality, which buffers rows for a "nearer" learner while the others starve.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray

from raygrpo.algorithm import zero_spread
from raygrpo.config import RewardConfig
from raygrpo.rewards import Scorer
from raygrpo.types import (
    RolloutGroup,
    ScoredGroup,
    group_to_row,
    row_to_group,
    row_to_scored_group,
    scored_group_to_row,
)

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from raygrpo.roles.controller import Claim

PROMPT_TYPE = pa.struct(
    [
        ("prompt_id", pa.int64()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("answer", pa.string()),  # JSON
        ("row", pa.string()),  # JSON
    ]
)
ROLLOUT_TYPE = pa.struct(
    [
        ("completion_ids", pa.list_(pa.int32())),
        ("behaviour_logprobs", pa.list_(pa.float32())),
        ("finish_reason", pa.string()),
        ("text", pa.string()),
    ]
)
REWARD_TYPE = pa.struct([("total", pa.float64()), ("components", pa.list_(pa.float64())), ("error", pa.string())])
GROUP_SCHEMA = pa.schema(
    [
        ("ticket", pa.int64()),
        ("prompt", PROMPT_TYPE),
        ("policy_version", pa.int64()),
        ("rollouts", pa.list_(ROLLOUT_TYPE)),
        ("generator", pa.string()),
        ("generate_start_s", pa.float64()),
        ("generate_end_s", pa.float64()),
        ("error", pa.string()),
        ("replacement", pa.int64()),
    ]
)
SCORED_GROUP_SCHEMA = pa.schema(
    [
        ("group", pa.struct(list(GROUP_SCHEMA))),
        ("rewards", pa.list_(REWARD_TYPE)),
        ("score_start_s", pa.float64()),
        ("score_end_s", pa.float64()),
    ]
)

CALLS_PER_PROXY = 64  # threads of one proxy, each waiting for one group; beyond that, more proxies


def groups_to_table(groups: list[RolloutGroup]) -> pa.Table:
    return pa.Table.from_pylist([group_to_row(group) for group in groups], schema=GROUP_SCHEMA)


def table_to_groups(table: pa.Table) -> list[RolloutGroup]:
    return [row_to_group(row) for row in table.to_pylist()]


def scored_groups_to_table(groups: list[ScoredGroup]) -> pa.Table:
    return pa.Table.from_pylist([scored_group_to_row(group) for group in groups], schema=SCORED_GROUP_SCHEMA)


def table_to_scored_groups(table: pa.Table) -> list[ScoredGroup]:
    return [row_to_scored_group(row) for row in table.to_pylist()]


class RolloutStage:
    """A thin proxy between Ray Data and the generators, without torch or an engine: it claims, calls, and returns the
    group."""

    def __init__(self, controller: ActorHandle, stream: int):
        self._controller = controller
        self._stream = stream

    def __call__(self, rows: pa.Table) -> pa.Table:
        return groups_to_table([self.roll_out(row, replacement=0) for row in rows["row"].to_pylist()])

    def roll_out(self, row: int, *, replacement: int) -> RolloutGroup:
        """Retry on another generator until one answers; the claim of a ticket always gives the same prompt and
        seeds."""
        while True:
            claim: Claim = ray.get(self._controller.claim.remote(self._stream, row, replacement))
            if claim.generator is None:
                return _failed_group(claim, claim.error)
            failure = None
            try:
                request = (claim.ticket, claim.prompt, claim.seeds, claim.min_version)
                group = ray.get(claim.generator.generate.remote(*request))
            except ValueError as error:  # this request cannot be served, by no generator
                group = _failed_group(claim, str(getattr(error, "cause", error)))  # Ray adds the remote traceback
            except (ray.exceptions.RayError, TimeoutError) as error:
                failure = f"{type(error).__name__}: {str(error).strip().rpartition(chr(10))[2]}"
            self._controller.release.remote(self._stream, claim.ticket, claim.generator_name, failure)
            if failure is None:
                return replace(group, replacement=replacement)


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
    )


class RewardStage:
    """Scores one group at a time; the Scorer bounds what user code can do."""

    def __init__(self, config: RewardConfig, import_paths: list[str]):
        self._scorer = Scorer(config, import_paths)

    def __call__(self, table: pa.Table) -> pa.Table:
        return scored_groups_to_table([self._scorer.score(group) for group in table_to_groups(table)])


class DynamicSamplingStage:
    """Both stages in one, for dynamic sampling (DAPO, arXiv:2503.14476, section 3.2): a ticket whose rewards are all
    the same claims its next prompt, up to `max_replacements` times, and then emits what it has. Which prompt is next
    depends on the ticket alone, so the stream stays in order and reproducible."""

    def __init__(
        self, controller: ActorHandle, stream: int, config: RewardConfig, import_paths: list[str], max_replacements: int
    ):
        self._rollouts = RolloutStage(controller, stream)
        self._scorer = Scorer(config, import_paths)
        self._scoring = threading.Lock()  # many tickets wait for generators at once; one scores
        self._max_replacements = max_replacements

    def __call__(self, rows: pa.Table) -> pa.Table:
        return scored_groups_to_table([self._sample(row) for row in rows["row"].to_pylist()])

    def _sample(self, row: int) -> ScoredGroup:
        for replacement in range(self._max_replacements + 1):
            group = self._rollouts.roll_out(row, replacement=replacement)
            with self._scoring:
                scored = self._scorer.score(group)
            if not zero_spread([math.nan if reward.error else reward.total for reward in scored.rewards]):
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
    max_replacements: int,
) -> ray.data.Dataset:
    """The lazy plan of one segment: `num_tickets` rows, one scored group each, in ticket order. Builds a stream of its
    own each time it is called, so that what is left of an earlier attempt is fenced.

    groups_in_flight: how many groups the gate admits at a time, (max_staleness + 1) * groups_per_step; the rollout
    stage waits for as many at once. max_replacements: algorithm.dynamic_sampling.
    """
    groups_in_flight = min(groups_in_flight, num_tickets)
    num_proxies = math.ceil(groups_in_flight / CALLS_PER_PROXY)
    calls = math.ceil(groups_in_flight / num_proxies)
    waiting = {
        "batch_size": None,
        "batch_format": "pyarrow",
        "num_cpus": 0.01,
        "compute": ray.data.ActorPoolStrategy(
            size=num_proxies,
            max_concurrent_calls_per_actor=calls,
            max_tasks_in_flight_per_actor=calls,
            enable_true_multi_threading=True,
        ),
    }
    tickets = ray.data.from_arrow([pa.table({"row": [row]}) for row in range(num_tickets)])
    stream = ray.get(controller.new_stream.remote(name))
    if max_replacements:
        arguments = (controller, stream, reward, import_paths, max_replacements)
        return tickets.map_batches(DynamicSamplingStage, fn_constructor_args=arguments, **waiting)
    return tickets.map_batches(RolloutStage, fn_constructor_args=(controller, stream), **waiting).map_batches(
        RewardStage,
        fn_constructor_args=(reward, import_paths),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=reward.num_cpus,
        # While tasks wait at the gate, Ray Data looks at its tasks ten times a second: hand over all groups at once.
        compute=ray.data.ActorPoolStrategy(size=reward.num_workers, max_tasks_in_flight_per_actor=groups_in_flight),
    )


def data_config() -> ray.train.DataConfig:
    """How Ray Train splits the stream among learners: in ticket order, round robin, without locality (see the module
    docstring)."""
    import ray.train

    options = ray.data.ExecutionOptions(preserve_order=True)
    return ray.train.DataConfig(execution_options=options, enable_shard_locality=False)


def configure_ray_data() -> None:
    """Settings of the process's DataContext: no timeout of Ray Data's own, no progress bars beside ours."""
    context = ray.data.DataContext.get_current()
    context.execution_no_progress_timeout_s = -1
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def iterate_groups(shard: Any) -> Callable[[], ScoredGroup]:
    """A learner's share of a segment: each call gives its next scored group, nothing is fetched ahead of need, and the
    call after the last raises StopIteration, which ends the execution."""
    batches = iter(shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    pending: list[ScoredGroup] = []

    def next_group() -> ScoredGroup:
        while not pending:
            pending.extend(table_to_scored_groups(next(batches)))
        return pending.pop(0)

    return next_group
