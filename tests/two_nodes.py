"""Streams on a Ray cluster of several nodes, all on this machine: what test_two_nodes.py asserts about.

A process of its own, so that its Ray does not meet the test session's. Node `head` holds nothing but the stream's
coordinator; `sampling` nodes hold the generators and, where they have CPUs, Ray Data's workers; `learning` nodes the
consumers.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from raygrpo.roles.controller import RolloutController
from raygrpo.stream import data_config, iterate_groups, segment_dataset
from raygrpo.types import RolloutGroup
from tests.fake_generator import FakeGenerator, Script
from tests.own_cluster import DEADLINE_S, add_node
from tests.roles.test_controller import prompt_set
from tests.test_stream import GROUP_SIZE, NUM_PROMPTS, REWARD, SEED

GROUPS_PER_STEP, BLOCK = 8, 2


class Consumer:
    """One learner's share of the stream."""

    def __init__(self, shard: Any):
        self._next_group = iterate_groups(shard)

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def take(self, num: int) -> list[RolloutGroup]:
        return [replace(self._next_group().group, rollouts=[]) for _ in range(num)]

    def is_at_the_end(self) -> bool:
        try:
            self._next_group()
        except StopIteration:
            return True
        return False


class PlacedGenerator(FakeGenerator):
    """Signs its groups with its node, and makes them so large that they stay in that node's object store."""

    async def generate(self, *request: Any) -> RolloutGroup:
        group = await super().generate(*request)
        rollouts = [replace(rollout, text=rollout.text + " " * 30_000) for rollout in group.rollouts]
        return replace(group, rollouts=rollouts, generator=ray.get_runtime_context().get_node_id())


def stream(
    num_steps: int, max_staleness: int, num_learners: int, script: Script, at_step: dict[int, Callable[[], None]]
) -> dict[str, Any]:
    """One segment, as the learners drive it; at_step: what happens before a step is consumed."""
    generator = ray.remote(PlacedGenerator).options(
        num_cpus=0, resources={"sampling": 0.1}, max_restarts=-1, max_task_retries=0, max_concurrency=100
    )
    generators = {name: generator.remote(name, script) for name in ("g0", "g1")}
    controller = ray.remote(RolloutController).options(num_cpus=0, resources={"learning": 0.1}, max_concurrency=1000)
    controller = controller.remote(
        prompt_set(NUM_PROMPTS),
        generators,
        seed=SEED,
        groups_per_step=GROUPS_PER_STEP,
        group_size=GROUP_SIZE,
        max_staleness=max_staleness,
    )
    dataset = segment_dataset(
        "segment",
        num_steps * GROUPS_PER_STEP,
        controller,
        REWARD,
        [],
        groups_in_flight=(max_staleness + 1) * GROUPS_PER_STEP,
        groups_per_block=BLOCK,
    )
    learning_nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and "learning" in node["Resources"]]
    places = [learning_nodes[rank % len(learning_nodes)] for rank in range(num_learners)]
    shards = data_config().configure({"segment": dataset}, num_learners, None, places)
    consumer = ray.remote(Consumer).options(num_cpus=0, resources={"learning": 0.1})
    consumers = [consumer.remote(shard["segment"]) for shard in shards]
    ray.get(controller.begin_attempt.remote(0))

    def publish(version: int) -> None:
        ray.get(controller.publish.remote(version, [ray.put({"version": version})]), timeout=DEADLINE_S)

    publish(0)
    ray.get(controller.begin_segment.remote("segment", 0))
    steps = []
    for step in range(num_steps):
        at_step.get(step, lambda: None)()
        shares = ray.get([c.take.remote(GROUPS_PER_STEP // num_learners) for c in consumers], timeout=DEADLINE_S)
        steps.append([[(g.ticket, g.policy_version, g.generator, g.error) for g in share] for share in shares])
        publish(step + 1)
    result = {
        "num_learners": num_learners,
        "max_staleness": max_staleness,
        "steps": steps,
        "at_the_end": ray.get([c.is_at_the_end.remote() for c in consumers], timeout=DEADLINE_S),
        "consumer_nodes": ray.get([c.node.remote() for c in consumers]),
        "warnings": ray.get(controller.status.remote()).warnings,
    }
    for actor in (*consumers, *generators.values(), controller):
        ray.kill(actor)
    return result


def main() -> None:
    cluster = Cluster()
    cluster.add_node(wait=False, num_cpus=0, include_dashboard=False)
    environment = {"env_vars": {"PYTHONPATH": os.getcwd(), "RAY_TRAIN_V2_ENABLED": "1"}}
    ray.init(cluster.address, logging_level=logging.ERROR, log_to_driver=False, runtime_env=environment)
    doomed = add_node(cluster, 4, resources={"sampling": 1})
    add_node(cluster, 0, resources={"learning": 1})
    results = {}
    try:
        straggler = Script(seconds={5: 1.5})
        results["on_policy"] = stream(3, 0, 2, straggler, {})
        results["stale"] = stream(4, 1, 2, straggler, {})

        def add_a_node() -> None:
            add_node(cluster, 4, resources={"sampling": 1})

        def remove_the_first() -> None:
            time.sleep(1.5)  # the blocks of step 2 lie in the object store of the node, those of step 3 are under way
            cluster.remove_node(doomed, allow_graceful=False)

        slow = Script(seconds=dict.fromkeys(range(3 * GROUPS_PER_STEP, 4 * GROUPS_PER_STEP), 6.0))
        results["removal"] = stream(6, 1, 1, slow, {1: add_a_node, 2: remove_the_first})
        results["removal"]["removed"] = doomed.node_id
    finally:
        ray.shutdown()
        cluster.shutdown()
    Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
