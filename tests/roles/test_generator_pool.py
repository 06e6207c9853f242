"""A pool of generators that grows, shrinks and restarts those that hang; and the watchdog's verdicts. No Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from raygrpo.config import GeneratorConfig, WatchdogConfig
from raygrpo.roles import background as background_module
from raygrpo.roles import controller as controller_module
from raygrpo.roles import generator_pool as pool_module
from raygrpo.roles.claims import AT_THE_GATE, PendingClaim
from raygrpo.roles.controller import RolloutController
from raygrpo.roles.generator_pool import GeneratorPool
from raygrpo.roles.watchdog import stall_report
from tests.roles.test_controller import (
    DIED,
    WEIGHTS,
    FakeGenerator,
    begin,
    make_controller,
    prompt_set,
    release,
    settle,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("without_ray")


class Launcher:
    """Makes generators, and keeps them. on_start: what a load of theirs waits for; it may raise."""

    def __init__(self, on_start: Callable[[], Awaitable[None]] | None = None) -> None:
        self.made: dict[str, Mortal] = {}
        self.num = 0
        self._on_start = on_start

    def __call__(self, name: str, again: bool = False) -> Mortal:
        on_start = self._on_start
        self.made[name] = Mortal(name, None if on_start is None else lambda version: on_start())
        self.num += 1
        return self.made[name]


class Mortal(FakeGenerator):
    ended = False

    def end(self) -> None:
        self.ended = True


def growing_pool(launch: Launcher, *, num_actors: int = 1, max_actors: int = 3) -> GeneratorPool:
    settings = GeneratorConfig(num_actors=num_actors, max_actors=max_actors, target_groups=4, scale_down_after_s=10.0)
    first = {f"generator-{i}": Mortal(f"generator-{i}") for i in range(num_actors)}
    return GeneratorPool(first, settings, asyncio.Condition(), lambda text: None, launch)  # type: ignore[arg-type]


def test_the_pool_grows_with_the_groups_in_flight_and_newcomers_load_before_they_serve():
    async def run() -> None:
        launch = Launcher()
        pool = growing_pool(launch)
        pool.resize(0.0, num_waiting=100)
        assert launch.made == {}, "before the first publish there is no version to load"
        await pool.publish(3, WEIGHTS)
        for _ in range(4):
            pool.take()
        pool.resize(1.0)
        assert launch.made == {}, "4 groups are what one generator should have"
        pool.take()
        pool.resize(2.0)
        assert list(launch.made) == ["generator-1"]
        assert pool.healthy == {"generator-0"}, "it has no weights yet"
        await wait_until(lambda: "generator-1" in pool.healthy)
        assert launch.made["generator-1"].loads == [(0, 3, "packed weights")]
        assert pool.take() == "generator-1", "it has the least to do"
        pool.resize(3.0, num_waiting=100)
        assert list(launch.made) == ["generator-1", "generator-2"], "max_actors is 3"

    asyncio.run(run())


def test_the_pool_shrinks_after_a_quiet_time_without_losing_a_group():
    async def run() -> None:
        launch = Launcher()
        pool = growing_pool(launch, num_actors=1)
        await pool.publish(0, WEIGHTS)
        taken = [pool.take() for _ in range(8)]
        pool.resize(0.0)
        await wait_until(lambda: len(pool.healthy) == 2)
        for name in taken:
            pool.give_back(name)
        assert [pool.take(), pool.take()] == ["generator-0", "generator-1"]
        pool.resize(9.0)
        assert len(pool.generators) == 2, "8 groups were in flight less than 10 s ago"
        pool.resize(11.0)
        assert pool.healthy == {"generator-0"}, "no more work for the one that leaves"
        pool.resize(30.0)
        await settle()
        assert "generator-1" in pool.generators and not launch.made["generator-1"].ended, "it still has a group"
        pool.give_back("generator-1")
        await wait_until(lambda: launch.made["generator-1"].ended)
        assert list(pool.generators) == ["generator-0"]
        pool.resize(60.0)
        assert list(pool.generators) == ["generator-0"], "never below num_actors"
        pool.resize(61.0, num_waiting=7)
        assert "generator-3" not in launch.made and "generator-2" in launch.made, "and it can grow again"

    asyncio.run(run())


@pytest.mark.parametrize("comes_up", [False, True])
def test_a_newcomer_that_is_sent_away_while_it_starts_leaves_nothing_behind(comes_up):
    """Ray says ActorDiedError to whoever waits for an actor that is ended."""

    async def run() -> None:
        launch = Launcher(lambda: starting)
        pool = growing_pool(launch)
        starting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await pool.publish(0, WEIGHTS)
        pool.resize(0.0, num_waiting=5)
        await wait_until(lambda: "generator-1" in pool._loading and pool._loading["generator-1"].locked())
        pool.resize(20.0)
        await wait_until(lambda: list(pool.generators) == ["generator-0"])
        assert launch.made["generator-1"].ended
        starting.set_result(None) if comes_up else starting.set_exception(DIED)
        await settle()
        assert pool.by_state() == {"healthy": 1, "not_ready": 0, "dead": 0} and not pool.all_dead
        assert pool.healthy == {"generator-0"} and list(pool._holdings) == ["generator-0"]
        pool.resize(21.0, num_waiting=5)
        assert list(launch.made) == ["generator-1", "generator-2"], "it can grow as far as before"

    asyncio.run(run())


# Generators that Ray does not start again.


def test_a_generator_that_cannot_be_started_is_launched_again_a_few_times():
    async def run() -> None:
        warnings: list[str] = []
        is_full = True

        async def start() -> None:
            if is_full:
                raise DIED

        launch = Launcher(start)
        first = {name: Mortal(name) for name in ("generator-0", "generator-1")}
        pool = GeneratorPool(first, GeneratorConfig(), asyncio.Condition(), warnings.append, launch)  # type: ignore[arg-type]
        await pool.publish(0, WEIGHTS)
        first["generator-1"].on_load = lambda version: start()
        pool.quarantine("generator-1", restart=False)
        await wait_until(lambda: launch.num > 0)
        is_full = False
        await wait_until(lambda: len(pool.healthy) == 2)
        assert pool.generators["generator-1"] is launch.made["generator-1"] and pool.dead == {}
        assert launch.made["generator-1"].loads == [(0, 0, "packed weights")]
        assert "launched again (1 of 3): ValueError: no such option" in warnings[0]

        launch.num, is_full = 0, True
        pool.quarantine("generator-1", restart=False)
        await wait_until(lambda: bool(pool.dead))
        assert launch.num == pool_module.MAX_RELAUNCHES, "as often as the first time: it was healthy between"
        assert "no such option" in pool.dead["generator-1"] and pool.healthy == {"generator-0"}

    asyncio.run(run())


def test_where_no_generator_has_ever_loaded_a_version_none_is_launched_again():
    """The configuration is wrong, most likely, and who started the run should hear of it at once."""

    async def run() -> None:
        async def start(version: int = 0) -> None:
            raise DIED

        launch = Launcher(start)
        first = FakeGenerator("generator-0", start)
        pool = GeneratorPool(
            {first.name: first},  # type: ignore[dict-item]
            GeneratorConfig(),
            asyncio.Condition(),
            lambda text: None,
            launch,
        )
        with pytest.raises(RuntimeError, match=r"no generator is left: generator-0: ValueError: no such option"):
            await pool.publish(0, WEIGHTS)
        assert launch.num == 0

    asyncio.run(run())


def test_a_publish_reaches_whoever_joined():
    async def run() -> None:
        launch = Launcher()
        pool = growing_pool(launch)
        await pool.publish(0, WEIGHTS)
        pool.resize(0.0, num_waiting=5)
        await wait_until(lambda: "generator-1" in pool.healthy)
        acks, failed = await pool.publish(1, WEIGHTS)
        assert {ack.generator for ack in acks} == {"generator-0", "generator-1"} and failed == []

    asyncio.run(run())


# Generators that hang.


def controller_with(*generators: FakeGenerator, **watchdog: Any) -> RolloutController:
    return RolloutController(
        prompt_set(),
        {generator.name: generator for generator in generators},  # type: ignore[misc]
        seed=5,
        groups_per_step=4,
        group_size=3,
        max_staleness=0,
        watchdog=WatchdogConfig(**watchdog) if watchdog else None,
    )


@pytest.mark.parametrize("restart", [False, True])
def test_a_generator_that_hangs_is_restarted_and_one_that_died_is_left_to_ray(restart):
    async def run() -> None:
        broken, other = FakeGenerator("a"), FakeGenerator("b")
        controller = controller_with(broken, other)
        stream = await begin(controller)
        await controller.publish(0, WEIGHTS)
        claim = await controller.claim(stream, 0)
        assert claim.generator is broken and claim.timeout_s == GeneratorConfig().group_timeout_s
        await release(controller, stream, 0, "a", "no answer", restart=restart)
        assert broken.restarts == int(restart)
        assert (await controller.claim(stream, 0)).generator is other

    asyncio.run(run())


def test_the_last_words_of_a_process_that_was_told_to_end_do_not_bring_its_generator_back():
    """Ray ends it a little later; until then it loads versions as ever."""

    class Lingering(FakeGenerator):
        def restart(self) -> None:
            self.restarts += 1

    async def run() -> None:
        async def end_after_two(version: int) -> None:
            broken.num_processes = 1 if len(broken.loads) < 3 else 2

        broken = Lingering("a", end_after_two)
        controller = controller_with(broken)
        stream = await begin(controller)
        await controller.publish(0, WEIGHTS)
        await controller.claim(stream, 0)
        await release(controller, stream, 0, "a", "garbage", restart=True)
        claim = await controller.claim(stream, 0)
        assert claim.generator is broken and broken.num_processes == 2
        assert (len(broken.loads), broken.restarts, controller._pool.num_failures) == (4, 1, 1)
        warnings = (await controller.status()).warnings
        assert [text for text in warnings if "is back" in text] == ["a is back, with version 0"]

    asyncio.run(run())


def test_failures_of_a_process_that_has_gone_say_nothing_of_the_next():
    """The stage may tell of them when the generator has been back for long."""

    async def run() -> None:
        generator = FakeGenerator("a")
        controller = controller_with(generator)
        stream = await begin(controller)
        await controller.publish(0, WEIGHTS)
        for row in range(4):
            await controller.claim(stream, row)
        for row in (0, 1):  # both hang: one restart
            await release(controller, stream, row, "a", "no answer", restart=True)
        await wait_until(lambda: controller._pool.healthy == {"a"})
        for row in (2, 3):
            await release(controller, stream, row, "a", "no answer", restart=True)
        assert controller._pool.healthy == {"a"}
        assert (generator.restarts, len(generator.loads), controller._pool.num_failures) == (1, 2, 1)
        assert all(len(controller._ledger.failures[row, 0]) == 1 for row in range(4)), "each group met one"

        await controller.claim(stream, 0)
        await release(controller, stream, 0, "a", "no answer", restart=True)
        assert (generator.restarts, controller._pool.num_failures) == (2, 2), "of the process that serves now"

    asyncio.run(run())


def test_a_load_that_times_out_restarts_the_generator():
    async def run() -> None:
        async def hang_until_restarted(version: int) -> None:
            if not stuck.restarts:
                await asyncio.Event().wait()

        stuck = FakeGenerator("a", hang_until_restarted)
        controller = make_controller(stuck, load_timeout_s=0.05)
        report = await controller.publish(0, WEIGHTS)
        assert (report.failed, report.num_generators, stuck.restarts) == (["a"], 1, 1)

    asyncio.run(run())


def test_a_ticket_that_failed_goes_to_a_generator_that_still_drains_for_a_publish(monkeypatch):
    """It answers, and is not taken for a broken one, however long its groups take."""
    monkeypatch.setattr(pool_module, "CONFIRM_TIMEOUT_S", 0.05)

    async def run() -> None:
        drained = asyncio.Event()

        async def drain(version: int) -> None:
            if version == 1:
                await drained.wait()

        async def stay_away(version: int) -> None:
            if len(broken.loads) == 2:
                await drained.wait()

        broken, draining = FakeGenerator("a", stay_away), FakeGenerator("b", drain)
        controller = RolloutController(
            prompt_set(),
            {"a": broken, "b": draining},  # type: ignore[dict-item]
            seed=5,
            groups_per_step=4,
            group_size=3,
            max_staleness=1,
        )
        stream = await begin(controller)
        await controller.publish(0, WEIGHTS)
        assert (await controller.claim(stream, 4)).generator is broken
        publish = asyncio.create_task(controller.publish(1, WEIGHTS))
        await settle()
        await release(controller, stream, 4, "a", "died")
        claim = await asyncio.wait_for(controller.claim(stream, 4), 5)
        assert claim.generator is draining and not publish.done()
        await asyncio.sleep(0.1)
        assert "b" in controller._pool.healthy and controller._pool.num_failures == 1
        drained.set()
        await publish

    asyncio.run(run())


def test_a_ticket_that_failed_does_not_go_to_a_generator_that_has_restarted_unnoticed():
    async def run() -> None:
        restarted, fine = FakeGenerator("a"), FakeGenerator("b")
        controller = controller_with(restarted, fine)
        await controller.begin_attempt(1)
        stream = await begin(controller)
        await controller.publish(0, WEIGHTS)
        restarted.loads.clear()  # version 0 of no attempt: the model on disk
        assert await controller._pool.confirm("b") and not await controller._pool.confirm("a")
        assert controller._pool.healthy == {"b"}
        await wait_until(lambda: len(controller._pool.healthy) == 2)
        assert restarted.loads == [(1, 0, "packed weights")] and await controller._pool.confirm("a")
        assert (await controller.claim(stream, 0)).generator is restarted

    asyncio.run(run())


# What goes on beside the calls.


def test_what_goes_on_beside_the_calls_outlives_its_errors_and_tells_of_them(monkeypatch):
    monkeypatch.setattr(background_module, "PAUSE_S", 0.001)
    monkeypatch.setattr(controller_module, "RESIZE_PERIOD_S", 0.001)

    async def run() -> None:
        controller = controller_with(FakeGenerator("a"))
        calls: list[int] = []

        def resize(now_s: float, num_waiting: int) -> None:
            calls.append(num_waiting)
            if len(calls) < 4:
                raise KeyError("generator-7")

        monkeypatch.setattr(controller._pool, "resize", resize)
        await begin(controller)
        await wait_until(lambda: len(calls) > 5)
        told = "resizing the pool failed, and begins anew: KeyError: 'generator-7'"
        assert (await controller.status()).warnings == [told], "the same error once"

    asyncio.run(run())


def test_a_task_of_the_pool_that_fails_is_told():
    async def run() -> None:
        warnings: list[str] = []
        generator = FakeGenerator("a")
        pool = GeneratorPool({"a": generator}, GeneratorConfig(), asyncio.Condition(), warnings.append)  # type: ignore[dict-item]

        async def fail() -> None:
            raise KeyError("generator-7")

        pool._spawn(fail())
        await wait_until(lambda: bool(warnings))
        assert warnings == ["a task of the pool failed: KeyError: 'generator-7'"]

    asyncio.run(run())


# The watchdog.


def test_the_watchdog_names_the_claims_and_restarts_the_generators_that_hold_them(tmp_path):
    async def run() -> None:
        stuck, idle = FakeGenerator("a"), FakeGenerator("b")
        controller = controller_with(stuck, idle, timeout_s=0.2)
        controller._report_dir = str(tmp_path)
        stream = await begin(controller)
        await controller.publish(0, WEIGHTS)
        await controller.learners_do("waiting for the groups of step 0")
        await controller.claim(stream, 0)
        at_gate = asyncio.create_task(controller.claim(stream, 5))
        await settle()
        assert list(tmp_path.iterdir()) == []
        await wait_until(lambda: stuck.restarts > 0)
        (path,) = tmp_path.iterdir()
        report = path.read_text()
        assert "ticket 0 is at a, for 0 s" in report and "ticket 5 waits at the gate" in report
        assert "learners: waiting for the groups of step 0" in report and "version 0" in report
        assert "a: healthy, version 0, 1 groups running" in report and "kernel.py:12 spin" in report
        assert (stuck.restarts, idle.restarts) == (1, 0)
        status = await controller.status()
        assert status.num_evictions == 0 and status.stop_reason is None
        assert "restarting a" in status.warnings[0] and str(path) in status.warnings[0]
        at_gate.cancel()

    asyncio.run(run())


@pytest.mark.parametrize("action", ["restart", "fail"])
def test_learners_that_hang_are_evicted(action):
    async def run() -> None:
        controller = controller_with(FakeGenerator("a"), timeout_s=0.2, action=action)
        await begin(controller)
        await controller.publish(0, WEIGHTS)
        await controller.learners_do("training step 3")
        await wait_until(lambda: controller._num_evictions > 0)
        status = await controller.status()
        assert status.num_evictions == 1
        said = status.stop_reason if action == "fail" else status.warnings[-1]
        assert said is not None and "the learners are training step 3" in said
        assert (status.stop_reason is not None) == (action == "fail")

    asyncio.run(run())


def test_the_watchdog_looks_by_itself_and_any_progress_counts():
    async def run() -> None:
        controller = controller_with(FakeGenerator("a"), timeout_s=0.2)
        stream = await begin(controller)
        await controller.publish(0, WEIGHTS)
        for row in range(4):  # longer than the timeout altogether
            claim = await controller.claim(stream, row)
            await asyncio.sleep(0.1)
            await release(controller, stream, claim.ticket, claim.generator_name, None)
        assert (await controller.status()).num_evictions == 0
        async with asyncio.timeout(5):
            while not (await controller.status()).num_evictions:
                await asyncio.sleep(0.01)

    asyncio.run(run())


def test_a_generator_that_does_not_answer_is_said_to_be_so(monkeypatch):
    monkeypatch.setattr(pool_module, "STATUS_DEADLINE_S", 0.02)

    async def run() -> None:
        silent = FakeGenerator("a")

        async def never() -> Any:
            await asyncio.Event().wait()

        silent.status = SimpleNamespace(remote=never)
        told = await controller_with(silent)._pool.describe_all()
        assert told == {"a": "does not answer within 0.02 s"}

    asyncio.run(run())


def test_a_report_without_claims_points_to_the_reward_stage():
    text = stall_report(60.0, state="version 3", learners="waiting", learners_s=60.0, claims=[], generators={})
    assert "look at the reward stage" in text
    claims = [PendingClaim(ticket=9, where=AT_THE_GATE, since_s=0.0), PendingClaim(ticket=2, where="g", since_s=0.0)]
    text = stall_report(60.0, state="", learners="", learners_s=0.0, claims=claims, generators={"g": "fine\nstack"})
    assert text.index("ticket 2 is at g") < text.index("ticket 9 waits at the gate")
    assert "reward stage" not in text and "  g: fine\n    stack" in text
