"""Evaluations in the controller: by which version, who waits, and what becomes of one that fails. No Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from raygrpo.config import GeneratorConfig, WatchdogConfig
from raygrpo.evaluation import Evaluation
from raygrpo.roles import claims as claims_module
from raygrpo.roles.claims import MAX_ATTEMPTS, MAX_SHARED_FAILURES, Release
from raygrpo.roles.controller import RolloutController
from raygrpo.types import FENCED
from tests.conftest import run_config
from tests.roles.test_controller import WEIGHTS, FakeGenerator, begin, prompt_set, release, settle, wait_until
from tests.test_evaluation import evaluation

pytestmark = pytest.mark.usefixtures("without_ray")


class FakeEvaluator:
    """What it is asked for; `work(stream, version)` is what it does then."""

    def __init__(self, work: Callable[[int, int], Awaitable[None]]):
        self.asked: list[tuple[int, bool]] = []  # version, only_if_unknown
        self.evaluate = SimpleNamespace(remote=self._evaluate)
        self._work = work

    async def _evaluate(self, stream: int, version: int, only_if_unknown: bool) -> None:
        self.asked.append((version, only_if_unknown))
        await self._work(stream, version)


async def make(
    work: Callable[[RolloutController, int, int], Awaitable[None]],
    generators: list[FakeGenerator],
    rows: Evaluation | None = None,
    watchdog: WatchdogConfig | None = None,
    **settings: Any,
) -> tuple[RolloutController, FakeEvaluator]:
    """A controller of 8 steps that evaluates every second version."""
    config = run_config(eval={"every": 2, "data": {"source": "x.jsonl"}} | settings)
    controller = RolloutController(
        seed=5,
        groups_per_step=4,
        group_size=3,
        max_staleness=1,
        settings=GeneratorConfig(),
        eval_settings=config.eval,
        num_steps=8,
        watchdog=watchdog,
    )
    evaluator = FakeEvaluator(lambda stream, version: work(controller, stream, version))
    handles: Any = {generator.name: generator for generator in generators}
    await controller.set_up(prompt_set(), handles, rows or evaluation(), evaluator)  # type: ignore[arg-type]
    return controller, evaluator


async def nothing(controller: RolloutController, stream: int, version: int) -> None:
    pass


def test_the_next_publish_waits_for_the_evaluation_and_its_claims_are_of_the_version():
    async def run() -> None:
        generators = [FakeGenerator("a"), FakeGenerator("b")]
        may_end = asyncio.Event()
        claims = []

        async def work(controller: RolloutController, stream: int, version: int) -> None:
            claims.extend(await controller.claim_block(stream, list(range(5))))
            await may_end.wait()
            await controller.release_block(
                stream, [Release(ticket=c.ticket, generator_name=c.generator_name) for c in claims]
            )

        controller, _ = await make(work, generators)
        rows = evaluation()
        await begin(controller)
        await controller.publish(0, WEIGHTS)
        publishing = asyncio.create_task(controller.publish(1, WEIGHTS))
        await settle()
        assert not publishing.done() and [g.version for g in generators] == [0, 0], "nobody has version 1"
        assert [claim.min_version for claim in claims] == [0] * 5
        assert {claim.generator_name for claim in claims} == {"a", "b"}
        for row, claim in enumerate(claims):
            request = rows.request(row)
            assert (claim.prompt, claim.seeds, claim.sampling) == (request.prompt, request.seeds, request.sampling)
        may_end.set()
        report = await publishing
        assert [g.version for g in generators] == [1, 1]
        start_s, end_s = report.evaluated
        assert start_s < end_s <= report.end_s and report.evaluations_failed == 0
        assert (await controller.publish(2, WEIGHTS)).evaluated is None, "version 1 was not evaluated"
        assert controller._pool._outstanding == {"a": 0, "b": 0}

    asyncio.run(run())


def test_the_training_goes_on_beside_an_evaluation():
    async def run() -> None:
        async def work(controller: RolloutController, stream: int, version: int) -> None:
            await asyncio.sleep(3600)

        controller, _ = await make(work, [FakeGenerator("a")])
        stream = await begin(controller)
        await controller.publish(0, WEIGHTS)
        claims = await controller.claim_block(stream, list(range(8)))
        assert [claim.ticket for claim in claims] == list(range(8)) and all(claim.sampling is None for claim in claims)
        waiting = asyncio.create_task(controller.claim(stream, 8))
        await settle()
        assert not waiting.done(), "the gate does not move for it"
        waiting.cancel()

    asyncio.run(run())


def test_versions_are_evaluated_when_they_are_due_and_the_first_only_if_nobody_has():
    async def run() -> None:
        controller, evaluator = await make(nothing, [FakeGenerator("a")])
        for version in range(9):
            await controller.publish(version, WEIGHTS)
        await controller.evaluated()
        assert evaluator.asked == [(0, True), (2, False), (4, False), (6, False), (8, False)]
        await controller.begin_attempt(0)  # from the checkpoint of step 4
        for version in (4, 5, 6):
            await controller.publish(version, WEIGHTS)
        await controller.evaluated()
        assert evaluator.asked[5:] == [(4, True), (6, False)]

    asyncio.run(run())


def test_an_evaluation_that_takes_too_long_is_given_up_and_counted():
    async def run() -> None:
        late: list[Any] = []
        is_late = asyncio.Event()

        async def work(controller: RolloutController, stream: int, version: int) -> None:
            [claim] = await controller.claim_block(stream, [0])
            try:
                await asyncio.sleep(3600)
            finally:
                late.append((stream, claim))
                is_late.set()

        generator = FakeGenerator("a")
        controller, _ = await make(work, [generator], timeout_s=0.05)
        await controller.publish(0, WEIGHTS)
        report = await controller.publish(1, WEIGHTS)
        assert report.evaluations_failed == 1 and report.evaluated is not None
        [warning] = (await controller.status()).warnings
        assert warning == "the evaluation of version 0 is given up: it took longer than 0.05 s (eval.timeout_s)"
        await is_late.wait()
        stream, claim = late[0]
        assert (await controller.claim(stream, 1)).ticket == FENCED, "its rows are worth nothing any more"
        await release(controller, stream, claim.ticket, claim.generator_name, "died")
        assert controller._pool.healthy == {"a"} and controller._pool._outstanding == {"a": 0}

    asyncio.run(run())


def test_an_evaluator_that_fails_costs_the_evaluation():
    async def run() -> None:
        async def work(controller: RolloutController, stream: int, version: int) -> None:
            raise RuntimeError("Traceback ...\nKeyError: gold")

        controller, _ = await make(work, [FakeGenerator("a")])
        await controller.publish(0, WEIGHTS)
        assert (await controller.publish(1, WEIGHTS)).evaluations_failed == 1
        assert (await controller.status()).warnings == ["the evaluation of version 0 is given up: KeyError: gold"]
        assert (await controller.publish(2, WEIGHTS)).evaluations_failed == 0, "each is told once"
        assert (await controller.publish(3, WEIGHTS)).evaluations_failed == 1

    asyncio.run(run())


def test_groups_of_a_generator_that_fails_go_to_another_and_are_given_up_in_the_end(monkeypatch):
    monkeypatch.setattr(claims_module, "living_nodes", lambda: {"node of a", "node of b"})

    async def run() -> None:
        seen = []

        async def work(controller: RolloutController, stream: int, version: int) -> None:
            for _ in range(MAX_SHARED_FAILURES + MAX_ATTEMPTS):
                [claim] = await controller.claim_block(stream, [2])
                seen.append(claim.generator_name)
                await release(controller, stream, 2, claim.generator_name, "died")
            [claim] = await controller.claim_block(stream, [2])
            seen.append(claim)

        async def load(version: int) -> None:
            await asyncio.sleep(0.02)  # so that it is not back at once

        generators = [FakeGenerator("a", load), FakeGenerator("b", load)]
        controller, _ = await make(work, generators)
        await controller.publish(0, WEIGHTS)
        await controller.evaluated()
        assert seen[:2] == ["a", "b"], "the one that failed is in quarantine"
        assert seen[-1].generator is None and seen[-1].error.startswith(
            "3 generators failed with it alone: a: died; b: "
        )
        await wait_until(lambda: controller._pool.healthy == {"a", "b"})
        assert all(load[1] == 0 for g in generators for load in g.loads), "they come back with the version"
        assert "row 2 of the evaluation failed on a, and goes to another generator: died" in (
            (await controller.status()).warnings
        )

    asyncio.run(run())


def test_a_new_attempt_ends_the_evaluation_of_the_old_one():
    async def run() -> None:
        streams: list[int] = []

        async def work(controller: RolloutController, stream: int, version: int) -> None:
            streams.append(stream)
            if len(streams) == 1:
                await asyncio.sleep(3600)

        controller, evaluator = await make(work, [FakeGenerator("a")])
        await controller.publish(2, WEIGHTS)
        await settle()
        await controller.begin_attempt(0)
        assert (await controller.claim(streams[0], 0)).ticket == FENCED
        report = await controller.publish(0, WEIGHTS)
        assert report.evaluated is None and report.evaluations_failed == 0
        await controller.evaluated()
        assert [version for version, _ in evaluator.asked] == [2, 0]

    asyncio.run(run())


def test_the_watchdog_restarts_the_generator_that_holds_an_evaluation():
    async def run() -> None:
        async def work(controller: RolloutController, stream: int, version: int) -> None:
            await controller.claim_block(stream, [0, 1])
            await asyncio.sleep(3600)

        generator = FakeGenerator("a")
        controller, _ = await make(work, [generator], watchdog=WatchdogConfig(timeout_s=0.2))
        await begin(controller)
        await controller.publish(0, WEIGHTS)
        await wait_until(lambda: generator.restarts == 1)
        warnings = (await controller.status()).warnings
        assert any("row 0 of the evaluation is at a" in text for text in warnings), warnings
        assert any("an evaluation is under way" in text for text in warnings)

    asyncio.run(run())


def test_a_publish_that_waited_when_its_learners_died_publishes_nothing():
    async def run() -> None:
        async def work(controller: RolloutController, stream: int, version: int) -> None:
            await asyncio.sleep(3600)

        generator = FakeGenerator("a")
        controller, _ = await make(work, [generator])
        await controller.publish(4, WEIGHTS)
        late = asyncio.create_task(controller.publish(5, WEIGHTS))
        await settle()
        attempt = await controller.begin_attempt(0)
        with pytest.raises(RuntimeError, match="version 5 was published by attempt 0, and this is 1"):
            await late
        await controller.publish(3, WEIGHTS)
        assert generator.version == 3 and generator.loads[-1][:2] == (attempt, 3)

    asyncio.run(run())
