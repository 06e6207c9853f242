"""What waits for a machine is said, and is not taken for something that hangs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from raygrpo.config import GeneratorConfig, WatchdogConfig
from raygrpo.roles import demand as demand_module
from raygrpo.roles.controller import RolloutController
from raygrpo.roles.demand import Unplaced, UnplacedFinder
from tests.conftest import NUM_LOGICAL_CPUS, run_config
from tests.roles.test_controller import WEIGHTS, FakeGenerator, begin, prompt_set, wait_until


def test_actors_and_learners_without_a_machine_are_counted_and_named(ray_session):
    from ray.util.placement_group import placement_group, remove_placement_group

    ray = ray_session
    each = NUM_LOGICAL_CPUS - 0.25  # no two at a time
    config = run_config(
        generator={"num_cpus": each}, learner={"num_cpus": each + 0.125, "num_workers": 1}, reward={"num_cpus": 0.75}
    )
    find = UnplacedFinder(config)

    @ray.remote(num_cpus=each, max_restarts=-1)
    class Large:
        def is_there(self) -> bool:
            return True

    def wait(condition: Callable[[Unplaced], bool]) -> Unplaced:
        deadline_s = time.monotonic() + 60
        while not condition(found := find()):
            assert time.monotonic() < deadline_s, found
            time.sleep(0.2)
        return found

    assert not find()
    actors = [Large.remote()]
    ray.get(actors[0].is_there.remote())
    actors += [Large.remote(), Large.remote()]
    gang = placement_group([{"CPU": each + 0.125}])
    try:
        found = wait(lambda found: found.generators == 2 and found.learners == 1)
        assert found.scorers == 0
        assert f"room for 2 x generator ({each:g} CPU each), 1 x learner ({each + 0.125:g} CPU each);" in found.text
        assert f"of {NUM_LOGICAL_CPUS} CPU" in found.text
        remove_placement_group(gang)
        wait(lambda found: found.generators == 2 and not found.learners)
    finally:
        for actor in actors:
            ray.kill(actor)
    wait(lambda found: not found)


@pytest.fixture
def impatient(monkeypatch, without_ray):
    monkeypatch.setattr(demand_module, "PERIOD_S", 0.01)
    monkeypatch.setattr(demand_module, "PATIENCE_S", 0.05)


class Cluster:
    """What `find_unplaced` answers."""

    def __init__(self, unplaced: Unplaced):
        self.unplaced = unplaced
        self.fails = False

    def __call__(self) -> Unplaced:
        if self.fails:
            raise TimeoutError("the head is busy")
        return self.unplaced


def make(cluster: Cluster, *generators: FakeGenerator, **settings: Any) -> RolloutController:
    return RolloutController(
        prompt_set(),
        {generator.name: generator for generator in generators},  # type: ignore[misc]
        seed=5,
        groups_per_step=4,
        group_size=3,
        max_staleness=0,
        settings=GeneratorConfig(**settings),
        watchdog=WatchdogConfig(timeout_s=0.2),
        find_unplaced=cluster,
    )


def test_what_waits_for_a_machine_is_said_at_first_soon_and_then_seldom(impatient):
    async def run() -> None:
        cluster = Cluster(Unplaced(learners=2, text="no machine has room for 2 x learner"))
        controller = make(cluster, FakeGenerator("a"))
        await begin(controller)
        await asyncio.sleep(0.6)
        status = await controller.status()
        assert 2 <= len(status.warnings) <= 5, "after 0.05, 0.1, 0.2 and 0.4 s"
        assert all(warning.endswith("s no machine has room for 2 x learner") for warning in status.warnings)
        assert status.num_evictions == 0 and status.stop_reason is None, "the watchdog has nothing to say"
        cluster.fails = True
        await asyncio.sleep(0.05)
        cluster.fails, cluster.unplaced = False, Unplaced()
        await wait_until(lambda: controller._warnings[-1] == "nothing waits for a machine any more")
        await wait_until(lambda: controller._num_evictions > 0)  # what stands still now has no such excuse

    asyncio.run(run())


def test_a_generator_that_is_soon_placed_is_not_worth_a_word(impatient, monkeypatch):
    monkeypatch.setattr(demand_module, "PATIENCE_S", 10.0)

    async def run() -> None:
        cluster = Cluster(Unplaced(generators=1, text="no machine"))
        controller = make(cluster, FakeGenerator("a"))
        await begin(controller)
        await wait_until(lambda: controller._pool.num_unplaced == 1)
        cluster.unplaced = Unplaced()
        await wait_until(lambda: controller._pool.num_unplaced == 0)
        assert (await controller.status()).warnings == []

    asyncio.run(run())


def test_a_run_waits_for_a_machine_longer_than_for_a_generator_that_hangs(impatient):
    """All generators are gone with their node; the next node takes its time."""

    async def run() -> None:
        there = False

        async def load(version: int) -> None:
            if not there:
                await asyncio.Event().wait()

        cluster = Cluster(Unplaced(generators=1, text="no machine"))
        only = FakeGenerator("a", load)
        controller = make(cluster, only, load_timeout_s=0.05)
        await begin(controller)
        await wait_until(lambda: controller._pool.num_unplaced == 1)
        publish = asyncio.create_task(controller.publish(0, WEIGHTS))
        await asyncio.sleep(0.5)
        assert not publish.done() and only.restarts == 0
        there = True
        assert (await publish).num_generators == 1

        there, cluster.unplaced = False, Unplaced()
        await wait_until(lambda: controller._pool.num_unplaced == 0)
        with pytest.raises(RuntimeError, match=r"no generator loaded version 1 within 0\.05 s"):
            await controller.publish(1, WEIGHTS)
        assert only.restarts > 0

    asyncio.run(run())
