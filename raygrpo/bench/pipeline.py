"""What the pipeline itself costs: the controller, Ray, Ray Data and Arrow, around generators that answer at once and a
learner that learns nothing.

    stream   groups per second from claim to learner, through the plan of a real segment (stream.py), with the gate
    claims   claims per second of the controller, from many claimers at once
    stages   CPU milliseconds that a group costs in each process of the stream, and what its single steps cost alone

Groups are of GROUP_SIZE completions. Wall times are of this machine, with whatever else runs on it; CPU times less so.
"""

from __future__ import annotations

import argparse
import json as json_format
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from raygrpo.bench.pipeline_roles import (
    GROUP_SIZE,
    SEGMENT,
    Claimer,
    InstantGenerator,
    NullLearner,
    Point,
    embedded_ray,
    prompt_set,
    roles,
    start_actor,
)
from raygrpo.bench.processes import KINDS, REST, THIS, CpuWatch, cpu_seconds_of
from raygrpo.bench.tables import table
from raygrpo.config import RewardConfig
from raygrpo.group_table import groups_to_table, scored_groups_to_table, table_to_groups, table_to_scored_groups
from raygrpo.rewards import Scorer

CLAIMERS = 2
REWARD = RewardConfig(functions=[{"use": "exact_match"}])  # type: ignore[list-item]


@dataclass(frozen=True)
class Extent:
    """What is measured: numbers of generators, groups in a stream, groups in a block; claims at a time."""

    pools: tuple[int, ...]
    lengths: tuple[int, ...]
    blocks: tuple[int, ...]
    claims: int


MARK = Point(num_generators=1, num_groups=1024)  # where the marks below are meant
FULL = Extent(pools=(1, 4, 16), lengths=(1024, 5120, 20480), blocks=(1, 2, 32), claims=8192)
QUICK = Extent(pools=(1, 4), lengths=(1024, 2048), blocks=(), claims=2048)
MARK_GROUPS_PER_S, MARK_CLAIMS_PER_S = 200.0, 2000.0


@dataclass(frozen=True)
class StreamCost:
    """groups_per_s and cpu_ms (CPU time per group, by kind of process): from the end of the first step to the end of
    the last. build_s: for the dataset. start_s: from the segment's begin to the first group at the learner."""

    point: Point
    groups_per_s: float
    build_s: float
    start_s: float
    cpu_ms: dict[str, float]

    @property
    def total_cpu_ms(self) -> float:
        return sum(self.cpu_ms.values())


@dataclass(frozen=True)
class ClaimCost:
    """Every ticket is claimed and released. cpu_ms: of the controller's process, per claim."""

    num_generators: int
    claims_per_call: int
    claims_per_s: float
    cpu_ms: float


def main(json: bool = False, quick: bool = False) -> None:
    """Print the tables, or one JSON document. quick: fewer and shorter points, in about two minutes."""
    results = run(quick=quick, progress=not json)
    if json:
        print(json_format.dumps(results, indent=1))


def run(*, quick: bool = False, progress: bool = False) -> dict[str, Any]:
    """All measurements as plain data; with progress, tables are printed as they grow."""
    extent = QUICK if quick else FULL
    shortest, *longer = extent.lengths

    def show(text: str) -> None:
        if progress:
            print(text, end="\n\n", flush=True)

    with embedded_ray():
        steps = measure_steps()
        show("One step of a group's way alone, CPU ms\n\n" + _steps_table(steps))
        claims = [
            measure_claims(n, per_call, extent.claims) for n in extent.pools for per_call in (1, MARK.groups_per_block)
        ]
        show("Claims\n\n" + _claims_table(claims))
        points = [replace(MARK, num_generators=n, num_groups=shortest) for n in extent.pools]
        points += [replace(MARK, num_groups=n) for n in longer]
        points += [replace(MARK, num_groups=shortest, groups_per_block=size) for size in extent.blocks]
        streams = []
        for point in points:
            streams.append(measure_stream(point))
            show(_streams_table(streams[-1:]))
    show("The stream\n\n" + _streams_table(streams) + "\n\n" + _processes_table(streams))
    show(_marks(claims, streams))
    return {
        "steps_cpu_ms": steps,
        "claims": [asdict(cost) for cost in claims],
        "streams": [asdict(cost) for cost in streams],
    }


def measure_steps(num: int = 512) -> dict[str, float]:
    """CPU ms per group of what a group goes through, each alone; calls: both processes together."""
    import ray

    per_block = MARK.groups_per_block
    prompts = prompt_set()
    generator = start_actor(InstantGenerator, "generator-0", max_concurrency=1000)
    ray.get(generator.load_weights.remote(0, [ray.put(0)]))
    requests = [(ticket, prompts.at(ticket, 0), list(range(GROUP_SIZE)), 0) for ticket in range(num)]
    ray.get(generator.generate.remote(*requests[0]))
    start = time.process_time() + cpu_seconds_of("generators")
    groups = ray.get([generator.generate.remote(*request) for request in requests])
    costs = {
        "generate, a call and its answer": 1000 * (time.process_time() + cpu_seconds_of("generators") - start) / num
    }
    ray.kill(generator)
    scorer = Scorer(REWARD)
    scored = [scorer.score(groups[0])]
    start = time.process_time() + cpu_seconds_of("reward workers")
    scored = [scorer.score(group) for group in groups]
    costs["score"] = 1000 * (time.process_time() + cpu_seconds_of("reward workers") - start) / num
    scorer.close()

    def time_blocks(convert: Callable[[Any], Any], blocks: list[Any]) -> float:
        start = time.process_time()
        for block in blocks:
            convert(block)
        return 1000 * (time.process_time() - start) / num

    blocks = [groups[i : i + per_block] for i in range(0, num, per_block)]
    scored_blocks = [scored[i : i + per_block] for i in range(0, num, per_block)]
    costs["group -> Arrow"] = time_blocks(groups_to_table, blocks)
    costs["Arrow -> group"] = time_blocks(table_to_groups, [groups_to_table(block) for block in blocks])
    costs["scored group -> Arrow"] = time_blocks(scored_groups_to_table, scored_blocks)
    tables = [scored_groups_to_table(block) for block in scored_blocks]
    costs["Arrow -> scored group"] = time_blocks(table_to_scored_groups, tables)
    return costs


def measure_claims(num_generators: int, per_call: int, num_claims: int) -> ClaimCost:
    """Claims of one segment whose gate is open, from CLAIMERS processes with CALLS_IN_FLIGHT calls each."""
    import ray

    with roles(num_generators, groups_per_step=num_claims, max_staleness=0) as controller:
        stream = ray.get(controller.new_stream.remote(SEGMENT))
        ray.get(controller.begin_attempt.remote(0))
        ray.get(controller.publish.remote(0, [ray.put(0)]))
        ray.get(controller.begin_segment.remote(SEGMENT, 0))
        claimers = [start_actor(Claimer) for _ in range(CLAIMERS)]
        ray.get([claimer.run.remote(controller, stream, range(0), per_call) for claimer in claimers])  # they are up
        share = num_claims // CLAIMERS
        cpu, start_s = cpu_seconds_of("controller"), time.perf_counter()
        parts = [range(i * share, (i + 1) * share) for i in range(CLAIMERS)]
        calls = [c.run.remote(controller, stream, part, per_call) for c, part in zip(claimers, parts, strict=True)]
        ray.get(calls)
        seconds = time.perf_counter() - start_s
        cpu = cpu_seconds_of("controller") - cpu
        for claimer in claimers:
            ray.kill(claimer)
    return ClaimCost(
        num_generators=num_generators,
        claims_per_call=per_call,
        claims_per_s=num_claims / seconds,
        cpu_ms=1000 * cpu / num_claims,
    )


def measure_stream(point: Point) -> StreamCost:
    import ray

    from raygrpo.stream import data_config, segment_dataset

    with roles(
        point.num_generators, groups_per_step=point.groups_per_step, max_staleness=point.max_staleness
    ) as controller:
        ray.get(controller.status.remote())  # it is up
        begin_s = time.time()
        dataset = segment_dataset(
            SEGMENT,
            point.num_groups,
            controller,
            REWARD,
            [],
            groups_in_flight=(point.max_staleness + 1) * point.groups_per_step,
            groups_per_block=point.groups_per_block,
        )
        build_s = time.time() - begin_s
        (shards,) = data_config().configure({SEGMENT: dataset}, 1, None, None)
        learner = start_actor(NullLearner)
        with CpuWatch() as watch:
            times = ray.get(learner.train.remote(shards[SEGMENT], controller, point))
        ray.kill(learner)
    begin_s, first_s, first_step_s, *_, last_s = times
    seconds, cpu = watch.between(first_step_s, last_s)
    rate = (point.num_groups - point.groups_per_step) / (last_s - first_step_s)
    return StreamCost(
        point=point,
        groups_per_s=rate,
        build_s=build_s,
        start_s=first_s - begin_s,
        cpu_ms={kind: 1000 * value / (rate * seconds) for kind, value in cpu.items() if kind != THIS},
    )


def _steps_table(steps: dict[str, float]) -> str:
    return table(["step", "CPU ms"], [[name, f"{cost:.3f}"] for name, cost in steps.items()])


def _claims_table(claims: list[ClaimCost]) -> str:
    header = ["generators", "claims a call", "claims/s", "controller, CPU ms a claim"]
    rows = [[str(c.num_generators), str(c.claims_per_call), f"{c.claims_per_s:.0f}", f"{c.cpu_ms:.3f}"] for c in claims]
    return table(header, rows)


def _streams_table(streams: list[StreamCost]) -> str:
    header = ["generators", "groups", "a step", "staleness", "a block", "groups/s", "CPU ms a group", "built in s"]
    rows = []
    for cost in streams:
        p = cost.point
        counts = [p.num_generators, p.num_groups, p.groups_per_step, p.max_staleness, p.groups_per_block]
        rows.append([*map(str, counts), f"{cost.groups_per_s:.0f}", f"{cost.total_cpu_ms:.1f}", f"{cost.build_s:.1f}"])
    return table(
        [*header, "first group after s"], [[*row, f"{c.start_s:.1f}"] for row, c in zip(rows, streams, strict=True)]
    )


def _processes_table(streams: list[StreamCost]) -> str:
    kinds = sorted({kind for cost in streams for kind in cost.cpu_ms}, key=[*KINDS.values(), REST].index)
    header = ["generators", "groups", "a block", *kinds]
    rows = []
    for cost in streams:
        counts = [cost.point.num_generators, cost.point.num_groups, cost.point.groups_per_block]
        rows.append([*map(str, counts), *(f"{cost.cpu_ms.get(kind, 0.0):.2f}" for kind in kinds)])
    return "CPU ms a group, by process\n\n" + table(header, rows)


def _marks(claims: list[ClaimCost], streams: list[StreamCost]) -> str:
    """The figures that this package is held to."""
    marked = [cost for cost in streams if cost.point == replace(MARK, num_groups=cost.point.num_groups)]
    lowest = min(cost.groups_per_s for cost in marked)
    claimed = min(cost.claims_per_s for cost in claims if cost.claims_per_call == MARK.groups_per_block)
    short, long = (pick(marked, key=lambda cost: cost.point.num_groups) for pick in (min, max))
    growth = long.total_cpu_ms / short.total_cpu_ms
    return (
        f"{lowest:.0f} groups/s with 1 generator (mark: {MARK_GROUPS_PER_S:.0f}); "
        f"{claimed:.0f} claims/s in calls of {MARK.groups_per_block} (mark: {MARK_CLAIMS_PER_S:.0f}); "
        f"a group of {long.point.num_groups} costs {growth:.2f} times one of {short.point.num_groups} (mark: 1)"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter points, in about two minutes")
    main(**vars(parser.parse_args()))
