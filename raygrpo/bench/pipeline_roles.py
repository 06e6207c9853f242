"""The roles around the stream that bench/pipeline.py measures: generators that answer at once, a learner that learns
nothing, and claimers; the controller is the real one."""

from __future__ import annotations

import itertools
import json
import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from raygrpo.data.prompts import PROMPT_SET_SCHEMA, DataReport, PromptSet
from raygrpo.roles.claims import Release
from raygrpo.roles.controller import RolloutController
from raygrpo.roles.reports import WeightsAck
from raygrpo.types import Prompt, Rollout, RolloutGroup

if TYPE_CHECKING:
    from ray.actor import ActorHandle

GROUP_SIZE, PROMPT_TOKENS, COMPLETION_TOKENS = 8, 128, 64
NUM_PROMPTS = 1000
SEGMENT = "segment"
CALLS_IN_FLIGHT = 32  # of a claimer


@dataclass(frozen=True)
class Point:
    """What a stream is asked for."""

    num_generators: int
    num_groups: int
    groups_per_step: int = 64
    max_staleness: int = 2
    groups_per_block: int = 16


class InstantGenerator:
    """The generator's verbs without an engine: every group is sampled under the version that was loaded last."""

    def __init__(self, name: str):
        self._name = name
        self._version = -1
        self._rollouts = [rollout(i) for i in range(GROUP_SIZE)]

    async def load_weights(self, version: int, weights: list[Any], *, attempt: int = 0) -> WeightsAck:
        await weights[0]
        self._version = version
        return WeightsAck(generator=self._name, version=version, num_bytes=8, drain_s=0.0, load_s=0.0)

    async def generate(
        self, ticket: int, prompt: Prompt, seeds: list[int], min_version: int, sampling: None = None
    ) -> RolloutGroup:
        assert self._version >= min_version and len(seeds) == GROUP_SIZE
        now = time.time()
        return RolloutGroup(
            ticket=ticket,
            prompt=prompt,
            policy_version=self._version,
            rollouts=self._rollouts,
            generator=self._name,
            generate_start_s=now,
            generate_end_s=now,
        )


class NullLearner:
    """Takes its groups as roles/learner.py does, checks order and staleness, and publishes a tiny object each step."""

    def train(self, shard: Any, controller: ActorHandle, point: Point) -> list[float]:
        """Arrival time of each step's last group, after the times of the segment's begin and of its first group."""
        import ray

        from raygrpo.stream import iterate_groups

        ray.get(controller.begin_attempt.remote(0))
        publishing = controller.publish.remote(0, [ray.put(0)])
        times = [time.time()]
        ray.get(controller.begin_segment.remote(SEGMENT, 0))
        next_group = iterate_groups(shard)
        for step in range(point.num_groups // point.groups_per_step):
            if point.max_staleness == 0:
                ray.get(publishing)
            for ticket in range(step * point.groups_per_step, (step + 1) * point.groups_per_step):
                group = next_group().group
                assert group.ticket == ticket and not group.error, group
                assert step - point.max_staleness <= group.policy_version <= step, (step, group.policy_version)
                if ticket == 0:
                    times.append(time.time())
            times.append(time.time())
            ray.get(publishing)
            publishing = controller.publish.remote(step + 1, [ray.put(step + 1)])
        try:
            next_group()
        except StopIteration:
            return times
        raise AssertionError("the stream holds more groups than the segment's steps")


class Claimer:
    """Claims rows as the rollout stage does, many calls at a time, and gives them back at once."""

    def run(self, controller: ActorHandle, stream: int, rows: range, per_call: int) -> None:
        import ray

        starts = iter(range(rows.start, rows.stop, per_call))
        calls: list[Any] = []
        while True:
            wanted = itertools.islice(starts, CALLS_IN_FLIGHT - len(calls))
            calls += [controller.claim_block.remote(stream, list(range(row, row + per_call))) for row in wanted]
            if not calls:
                return
            ray.wait(calls, num_returns=1)
            done, calls = ray.wait(calls, num_returns=len(calls), timeout=0)
            for claims in ray.get(done):
                releases = [Release(ticket=claim.ticket, generator_name=claim.generator_name) for claim in claims]
                controller.release_block.remote(stream, releases)


@contextmanager
def embedded_ray() -> Iterator[None]:
    """The session's Ray, or one of our own that ends with the benchmark."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # or Ray writes one to the home directory
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
    os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def start_actor(role: type, *arguments: Any, max_concurrency: int = 1, **settings: Any) -> Any:
    """An actor that asks for no logical CPU."""
    import ray

    return ray.remote(role).options(num_cpus=0, max_concurrency=max_concurrency).remote(*arguments, **settings)


@contextmanager
def roles(num_generators: int, *, groups_per_step: int, max_staleness: int) -> Iterator[ActorHandle]:
    """The controller, with its generators."""
    import ray

    names = [f"generator-{i}" for i in range(num_generators)]
    generators = {name: start_actor(InstantGenerator, name, max_concurrency=1000) for name in names}
    controller = start_actor(
        RolloutController,
        prompt_set(),
        generators,
        max_concurrency=10_000,
        seed=0,
        groups_per_step=groups_per_step,
        group_size=GROUP_SIZE,
        max_staleness=max_staleness,
    )
    try:
        yield controller
    finally:
        for handle in (controller, *generators.values()):
            ray.kill(handle)


def prompt_set() -> PromptSet:
    rows = [
        {
            "prompt_id": i,
            "prompt_ids": [(i + place) % 32000 for place in range(PROMPT_TOKENS)],
            "text": f"question {i} " * (PROMPT_TOKENS // 3),
            "answer": json.dumps(str(i)),
            "row": "{}",
        }
        for i in range(NUM_PROMPTS)
    ]
    report = DataReport(source="benchmark", num_rows=NUM_PROMPTS, dropped={}, examples=[], columns_left_out={})
    return PromptSet(pa.Table.from_pylist(rows, PROMPT_SET_SCHEMA), report, shuffle=True)


def rollout(index: int) -> Rollout:
    return Rollout(
        completion_ids=[(index + place) % 32000 for place in range(COMPLETION_TOKENS)],
        behaviour_logprobs=[-0.1 * place for place in range(COMPLETION_TOKENS)],
        finish_reason="stop",
        text=f"answer {index} " * (COMPLETION_TOKENS // 3),
        end_s=0.0,
    )
