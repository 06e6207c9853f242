"""The gate, the order of a publish, and what becomes of generators that fail. No Ray: handles whose calls are
coroutines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError, ActorUnavailableError

from raygrpo.config import GeneratorConfig
from raygrpo.data import DataReport, PromptSet, prompt_index, sample_seed
from raygrpo.data.prompts import PROMPT_SET_SCHEMA
from raygrpo.roles import claims as claims_module
from raygrpo.roles import generator_pool as pool_module
from raygrpo.roles.controller import MAX_ATTEMPTS, RolloutController
from raygrpo.roles.generator import WeightsAck
from raygrpo.types import FENCED

NUM_PROMPTS = 7
WEIGHTS: list[Any] = ["packed weights"]
DIED = ActorDiedError()
DIED.error_msg = "The actor died because of an error in its creation\nValueError: no such option: max_modle_len"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(pool_module, "REVIVAL_PAUSE_S", 0.001)
    monkeypatch.setattr(pool_module, "restart_actor", lambda generator: generator.restart())


class FakeGenerator:
    """A generator that keeps the versions it was given; `on_load(version)` may delay, or raise."""

    def __init__(self, name: str, on_load: Callable[[int], Awaitable[None]] | None = None):
        self.name = name
        self.node = f"node of {name}"
        self.version = 0
        self.loading = False
        self.loads: list[tuple[int, int, Any]] = []  # attempt, version, weights
        self.restarts = 0
        self.on_load = on_load
        self.load_weights = SimpleNamespace(remote=self._load)

    def restart(self) -> None:
        self.restarts += 1

    async def _load(self, version: int, weights: list[Any], *, attempt: int = 0) -> WeightsAck:
        assert not self.loading, "one at a time"
        self.loading = True
        try:
            if self.on_load is not None:
                await self.on_load(version)
        finally:
            self.loading = False
        self.version = version
        self.loads.append((attempt, version, weights[0]))
        return WeightsAck(generator=self.name, version=version, num_bytes=100, drain_s=0.0, load_s=0.0, node=self.node)


def prompt_set(num: int = NUM_PROMPTS) -> PromptSet:
    rows = [
        {
            "prompt_id": i,
            "prompt_ids": [i, i + 1],
            "text": f"prompt {i}",
            "answer": json.dumps(f"answer {i}"),
            "row": "{}",
        }
        for i in range(num)
    ]
    import pyarrow as pa

    report = DataReport(source="test", num_rows=num, dropped={}, examples=[], columns_left_out={})
    return PromptSet(pa.Table.from_pylist(rows, PROMPT_SET_SCHEMA), report, shuffle=True)


def make_controller(
    *generators: FakeGenerator, groups_per_step: int = 4, max_staleness: int = 0, **settings: Any
) -> RolloutController:
    return RolloutController(
        prompt_set(),
        {generator.name: generator for generator in generators},  # type: ignore[misc]
        seed=5,
        groups_per_step=groups_per_step,
        group_size=3,
        max_staleness=max_staleness,
        settings=GeneratorConfig(**settings),
    )


async def begin(controller: RolloutController, first_ticket: int = 0) -> int:
    """A stream whose segment is running; returns its number."""
    stream = await controller.new_stream("segment")
    await controller.begin_segment("segment", first_ticket)
    return stream


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(50):
        await asyncio.sleep(0)


def admitted(claims: list[asyncio.Task]) -> list[int]:
    return [row for row, claim in enumerate(claims) if claim.done()]


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


# The gate.


@settings(deadline=None, max_examples=60)
@given(
    groups_per_step=st.integers(1, 5),
    max_staleness=st.integers(0, 2),
    versions=st.integers(1, 4),
    first_step=st.integers(0, 3),
)
def test_the_gate_admits_exactly_the_tickets_that_cannot_become_too_old(
    groups_per_step, max_staleness, versions, first_step
):
    async def run() -> None:
        controller = make_controller(
            FakeGenerator("a"), FakeGenerator("b"), groups_per_step=groups_per_step, max_staleness=max_staleness
        )
        first_ticket = first_step * groups_per_step
        stream = await begin(controller, first_ticket)
        claims = [asyncio.create_task(controller.claim(stream, row)) for row in range(8 * groups_per_step)]
        await settle()
        assert admitted(claims) == [], "nothing was published"
        for version in range(first_step, first_step + versions):
            await controller.publish(version, WEIGHTS)
            await settle()
            bound = (version + max_staleness + 1) * groups_per_step - first_ticket
            assert admitted(claims) == list(range(min(bound, len(claims))))
        for row in admitted(claims):
            claim = claims[row].result()
            step = (first_ticket + row) // groups_per_step
            assert claim.ticket == first_ticket + row
            assert claim.min_version == max(0, step - max_staleness)
        for claim_task in claims:
            claim_task.cancel()

    asyncio.run(run())


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_every_generator_has_the_version_before_the_gate_opens_for_it(max_staleness):
    async def run() -> None:
        slow = asyncio.Event()

        async def wait(version: int) -> None:
            if version == 1:
                await slow.wait()

        generators = [FakeGenerator("a"), FakeGenerator("b", wait)]
        controller = make_controller(*generators, max_staleness=max_staleness)
        stream = await begin(controller)
        await controller.publish(0, WEIGHTS)
        row = 4 * (1 + max_staleness)  # the first that only version 1 admits
        claim = asyncio.create_task(controller.claim(stream, row))
        publish = asyncio.create_task(controller.publish(1, WEIGHTS))
        await settle()
        assert generators[0].version == 1
        assert not claim.done() and not publish.done(), "b has not acknowledged"
        slow.set()
        report = await publish
        await settle()
        assert claim.done() and (report.version, report.num_generators, report.failed) == (1, 2, [])
        assert report.num_bytes == 100

    asyncio.run(run())


# Claims.


def test_a_claim_is_the_same_prompt_and_seeds_however_often_it_is_asked():
    async def run() -> None:
        controller = make_controller(FakeGenerator("a"), FakeGenerator("b"))
        stream = await begin(controller, first_ticket=8)
        await controller.publish(2, WEIGHTS)
        first = [await controller.claim(stream, row) for row in range(4)]
        again = [await controller.claim(stream, row) for row in reversed(range(4))][::-1]
        for row, (one, other) in enumerate(zip(first, again, strict=True)):
            assert (one.ticket, one.prompt, one.seeds) == (other.ticket, other.prompt, other.seeds)
            assert one.prompt.prompt_id == prompt_index(8 + row, NUM_PROMPTS, seed=5)
            assert one.seeds == [sample_seed(5, 8 + row, i) for i in range(3)]
        seeds = [seed for claim in first for seed in claim.seeds]
        assert len(set(seeds)) == len(seeds)

    asyncio.run(run())


def test_replacements_are_other_prompts_with_other_seeds_and_repeat_too():
    async def run() -> None:
        controller = make_controller(FakeGenerator("a"))
        stream = await begin(controller)
        await controller.publish(0, WEIGHTS)
        for attempt in range(3):
            claim, again = [await controller.claim(stream, 2, attempt) for _ in range(2)]
            assert (claim.ticket, claim.prompt, claim.seeds) == (2, again.prompt, again.seeds)
            assert claim.prompt.prompt_id == prompt_index(2, NUM_PROMPTS, seed=5, attempt=attempt)
            assert claim.seeds == [sample_seed(5, 2, i, attempt=attempt) for i in range(3)]

    asyncio.run(run())


def test_claims_go_to_the_generator_with_the_least_to_do():
    async def run() -> None:
        controller = make_controller(FakeGenerator("a"), FakeGenerator("b"), FakeGenerator("c"), groups_per_step=12)
        stream = await begin(controller)
        await controller.publish(0, WEIGHTS)
        claims = [await controller.claim(stream, row) for row in range(6)]
        assert [claim.generator_name for claim in claims] == ["a", "b", "c"] * 2
        for claim in (claims[1], claims[4]):
            await controller.release(stream, claim.ticket, claim.generator_name, None)
        assert [(await controller.claim(stream, row)).generator_name for row in range(6, 9)] == ["b", "b", "a"]

    asyncio.run(run())


def test_a_ticket_that_is_claimed_anew_counts_once_wherever_its_first_claim_was():
    """Ray Data repeats the blocks of a rollout stage that died, at the gate or with a generator."""

    async def run() -> None:
        controller = make_controller(FakeGenerator("a"), FakeGenerator("b"))
        stream = await begin(controller)
        at_the_gate = [asyncio.create_task(controller.claim_block(stream, [0, 1])) for _ in range(2)]
        await settle()
        await controller.publish(0, WEIGHTS)
        lost, claims = [await task for task in at_the_gate]
        assert [claim.generator for claim in lost] == [None, None], "the newer claim counts"
        assert [claim.generator_name for claim in claims] == ["a", "b"]
        again = await controller.claim_block(stream, [0, 1])  # those two are lost as well
        assert [claim.generator_name for claim in again] == ["a", "b"]
        assert [(await controller.claim(stream, row)).generator_name for row in (2, 3)] == ["a", "b"]
        both = [(claim.ticket, claim.generator_name, None, False) for claim in again]
        await controller.release_block(stream, both)
        await controller.release_block(stream, both)  # by one who was thought dead
        assert [(await controller.claim(stream, row)).generator_name for row in (0, 1, 2, 3)] == ["a", "b", "a", "b"]

    asyncio.run(run())


def test_claims_of_streams_that_have_ended_are_fenced():
    async def run() -> None:
        controller = make_controller(FakeGenerator("a"))
        old = await begin(controller)
        await controller.begin_attempt(0)
        await controller.publish(0, WEIGHTS)
        waiting = asyncio.create_task(controller.claim(old, 3))
        new = await begin(controller)
        assert new != old
        for claim in (await waiting, await controller.claim(old, 0)):
            assert claim.generator is None and "stream that has ended" in claim.error
        assert (await controller.claim(new, 0)).generator is not None

    asyncio.run(run())


def test_an_attempt_shuts_the_gate_until_it_publishes():
    async def run() -> None:
        generator = FakeGenerator("a")
        controller = make_controller(generator)
        assert await controller.begin_attempt(0) == 1
        await controller.publish(0, WEIGHTS)
        await begin(controller)
        assert (await controller.status()).warnings == []
        assert await controller.begin_attempt(0) == 2
        assert "the learners have started again, attempt 2" in (await controller.status()).warnings[0]
        assert await controller.begin_attempt(7) == 7, "a resumed run is later than all that its checkpoint knows"
        stream = await begin(controller)
        claim = asyncio.create_task(controller.claim(stream, 0))
        await settle()
        assert not claim.done()
        await controller.publish(0, ["other weights"])
        assert (await claim).generator is generator
        assert generator.loads[-1] == (7, 0, "other weights")

    asyncio.run(run())


# Generators that fail.


def test_a_failing_generator_gets_no_claims_until_it_has_the_current_version():
    async def run() -> None:
        blocked = asyncio.Event()
        loads: list[int] = []

        async def load(version: int) -> None:
            loads.append(version)
            if len(loads) == 2:  # the first after the failure
                raise ActorUnavailableError("restarting", None)
            if len(loads) > 2:
                await blocked.wait()

        broken, healthy = FakeGenerator("a", load), FakeGenerator("b")
        controller = make_controller(broken, healthy, groups_per_step=20)
        stream = await begin(controller)
        await controller.publish(0, WEIGHTS)
        claim = await controller.claim(stream, 0)
        assert claim.generator is broken
        await controller.release(stream, 0, "a", "ActorDiedError: gone")
        again = await controller.claim(stream, 0)
        assert again.generator is healthy, "re-routed"
        assert (again.prompt, again.seeds) == (claim.prompt, claim.seeds)
        assert all([(await controller.claim(stream, row)).generator is healthy for row in range(1, 6)])
        await wait_until(lambda: len(loads) == 3)

        report = await controller.publish(1, ["newer weights"])  # while the broken one still loads version 0
        assert (report.num_generators, report.failed, report.generator_failures) == (1, [], 1)
        blocked.set()
        await wait_until(lambda: "a" in controller._pool.healthy)
        assert broken.loads[-1] == (0, 1, "newer weights"), "version 0 would have been too old"
        assert (await controller.claim(stream, 20)).generator is broken
        warnings = (await controller.status()).warnings
        assert "ticket 0 failed on a" in warnings[0] and "gone" in warnings[0]
        assert warnings[-1] == "a is back, with version 1"
        assert (await controller.status(len(warnings) - 1)).warnings == warnings[-1:]

    asyncio.run(run())


@pytest.mark.parametrize("revived_first", [False, True])
def test_weights_never_go_under_another_version(revived_first):
    """A generator that is revived while a publish is under way gets the weights of that publish as that version, and is
    not healthy with an older one when the gate opens."""

    async def run() -> None:
        publish_slow, revive_slow = asyncio.Event(), asyncio.Event()

        async def slow_publish(version: int) -> None:
            if version == 1:
                await publish_slow.wait()

        revivals: list[int] = []

        async def slow_revival(version: int) -> None:
            revivals.append(version)
            if len(revivals) > 1:
                await revive_slow.wait()

        broken, healthy = FakeGenerator("a", slow_revival), FakeGenerator("b", slow_publish)
        controller = make_controller(broken, healthy)
        stream = await begin(controller)
        await controller.publish(0, ["weights 0"])
        await controller.claim(stream, 0)
        await controller.release(stream, 0, "a", "gone")
        await wait_until(lambda: len(revivals) == 2)
        publish = asyncio.create_task(controller.publish(1, ["weights 1"]))
        await settle()
        first, second = (revive_slow, publish_slow) if revived_first else (publish_slow, revive_slow)
        first.set()
        await settle()
        second.set()
        await publish
        await wait_until(lambda: "a" in controller._pool.healthy)
        assert broken.version == 1
        assert all(weights == f"weights {version}" for _, version, weights in broken.loads)
        assert {(await controller.claim(stream, row)).generator_name for row in (4, 5)} == {"a", "b"}

    asyncio.run(run())


def test_a_generator_that_does_not_load_a_version_is_quarantined_and_the_gate_opens_without_it():
    async def run() -> None:
        calls: list[int] = []

        async def load(version: int) -> None:
            calls.append(version)
            if version == 1 and calls.count(1) == 1:
                raise ValueError("damaged")

        broken, healthy = FakeGenerator("a", load), FakeGenerator("b")
        controller = make_controller(broken, healthy)
        stream = await begin(controller)
        await controller.publish(0, WEIGHTS)
        report = await controller.publish(1, WEIGHTS)
        assert (report.num_generators, report.failed, report.generator_failures) == (1, ["a"], 1)
        assert (await controller.claim(stream, 4)).generator is healthy
        await wait_until(lambda: "a" in controller._pool.healthy)
        assert broken.version == 1

    asyncio.run(run())


def test_a_load_that_hangs_counts_as_failed():
    async def run() -> None:
        async def hang(version: int) -> None:
            if version == 1:
                await asyncio.Event().wait()

        controller = make_controller(FakeGenerator("a", hang), FakeGenerator("b"), load_timeout_s=0.05)
        await controller.publish(0, WEIGHTS)
        report = await controller.publish(1, WEIGHTS)
        assert report.failed == ["a"] and report.num_generators == 1

    asyncio.run(run())


def test_a_publish_waits_for_the_only_generator_to_come_back():
    """Its process may be restarting just then: that costs time, not the run."""

    async def run() -> None:
        failures = iter([True, True, False])

        async def load(version: int) -> None:
            if version == 1 and next(failures):
                raise ActorUnavailableError("restarting", None)

        only = FakeGenerator("a", load)
        controller = make_controller(only)
        stream = await begin(controller)
        await controller.publish(0, WEIGHTS)
        report = await controller.publish(1, WEIGHTS)
        assert (report.num_generators, report.failed) == (1, ["a"])
        assert only.version == 1
        assert (await controller.claim(stream, 4)).generator is only

    asyncio.run(run())


def test_generators_that_all_refuse_the_weights_are_an_error():
    async def run() -> None:
        async def refuse(version: int) -> None:
            raise ValueError("foreign tensor 'head.weight'")

        controller = make_controller(FakeGenerator("a", refuse), FakeGenerator("b", refuse))
        with pytest.raises(RuntimeError, match=r"no generator loaded version 0: foreign tensor 'head.weight'"):
            await controller.publish(0, WEIGHTS)

    asyncio.run(run())


def test_generators_that_cannot_be_started_are_an_error_for_publish_and_claims():
    async def run() -> None:
        alive = True

        async def load(version: int) -> None:
            if not alive:
                raise DIED

        controller = make_controller(FakeGenerator("a", load), FakeGenerator("b", load))
        alive = False
        with pytest.raises(RuntimeError, match=r"no generator is left: .*no such option: max_modle_len"):
            await controller.publish(0, WEIGHTS)

        alive = True
        controller = make_controller(FakeGenerator("a", load))
        stream = await begin(controller)
        await controller.publish(0, WEIGHTS)
        await controller.claim(stream, 0)
        waiting = asyncio.create_task(controller.claim(stream, 4))  # at the gate
        alive = False
        await controller.release(stream, 0, "a", "gone")
        for claim in (waiting, controller.claim(stream, 0)):
            with pytest.raises(RuntimeError, match="no generator is left"):
                await claim

    asyncio.run(run())


def test_generators_that_do_not_come_back_in_time_are_an_error():
    async def run() -> None:
        async def load(version: int) -> None:
            raise ActorUnavailableError("restarting", None)

        controller = make_controller(FakeGenerator("a", load), load_timeout_s=0.05)
        with pytest.raises(RuntimeError, match=r"no generator loaded version 0 within 0.05 s"):
            await controller.publish(0, WEIGHTS)

    asyncio.run(run())


def test_a_ticket_on_which_generators_keep_failing_is_given_up(monkeypatch):
    nodes = {f"node of {name}" for name in "abcd"}
    monkeypatch.setattr(claims_module, "living_nodes", lambda: nodes)

    async def run() -> None:
        controller = make_controller(*(FakeGenerator(name) for name in "abcd"))
        stream = await begin(controller)
        await controller.publish(0, WEIGHTS)
        tried = []
        for _ in range(MAX_ATTEMPTS):
            claim = await controller.claim(stream, 1)
            tried.append(claim.generator_name)
            await controller.release(stream, 1, claim.generator_name, f"no memory on {claim.generator_name}")
        given_up = await controller.claim(stream, 1)
        assert given_up.generator is None
        for name in tried:
            assert f"{name}: no memory on {name}" in given_up.error
        assert (await controller.claim(stream, 2)).generator is not None, "other tickets go on"

        nodes.remove(f"node of {tried[0]}")
        claim = await controller.claim(stream, 1)
        assert claim.generator is not None, "what a lost node explains does not count"
        await controller.release(stream, 1, claim.generator_name, "no memory here either")
        assert (await controller.claim(stream, 1)).generator is None, "that was the third on a node that lives"

    asyncio.run(run())


def test_a_failure_that_the_group_cannot_have_caused_does_not_count_against_it(monkeypatch):
    monkeypatch.setattr(claims_module, "living_nodes", lambda: {"node of a"})

    async def run() -> None:
        controller = make_controller(FakeGenerator("a"))
        stream = await begin(controller)
        await controller.publish(0, WEIGHTS)
        for _ in range(2 * MAX_ATTEMPTS):
            claim = await controller.claim(stream, 1)
            assert claim.generator is not None
            await controller.release(stream, 1, "a", "TimeoutError: a has version 0", begun=False)
        assert controller._pool.num_failures == 2 * MAX_ATTEMPTS, "it is quarantined all the same"

    asyncio.run(run())


def test_a_node_that_takes_many_generators_with_it_costs_a_ticket_one_failure():
    """Until somebody asks them, nobody knows that they are gone."""

    async def run() -> None:
        lost = True

        async def load(version: int) -> None:
            if lost and version == 1:
                raise ActorUnavailableError("the node is gone", None)

        generators = [FakeGenerator(name, load) for name in "abcd"]
        controller = make_controller(*generators)
        stream = await begin(controller, first_ticket=4)
        lost = False
        await controller.publish(1, WEIGHTS)
        claim = await controller.claim(stream, 0)
        lost = True
        await controller.release(stream, 4, claim.generator_name, "ActorUnavailableError")
        again = asyncio.create_task(controller.claim(stream, 0))
        await wait_until(lambda: not controller._pool.healthy)
        assert not again.done(), "it went to none of the others, and waits"
        assert [len(failures) for failures in controller._ledger.failures.values()] == [1]
        assert controller._pool.num_failures == len(generators)
        lost = False
        assert (await again).generator in generators
        assert sum(controller._pool._outstanding.values()) == 1

    asyncio.run(run())


def test_rows_beyond_the_segment_are_fenced_at_once():
    async def run() -> None:
        controller = make_controller(FakeGenerator("a"))
        stream = await controller.new_stream("segment")
        await controller.begin_segment("segment", 8, 3)
        for row in (3, 4, 100):
            claim = await controller.claim(stream, row)
            assert (claim.generator, claim.ticket) == (None, FENCED)
        await controller.publish(2, WEIGHTS)
        assert [(await controller.claim(stream, row)).ticket for row in range(3)] == [8, 9, 10]

    asyncio.run(run())
