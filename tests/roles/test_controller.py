"""The gate, claims and the order of a publish. No Ray: handles whose calls are coroutines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError

from raygrpo.config import GeneratorConfig
from raygrpo.data import DataReport, PromptSet, prompt_index, sample_seed
from raygrpo.data.prompts import PROMPT_SET_SCHEMA
from raygrpo.roles.claims import Release
from raygrpo.roles.controller import RolloutController
from raygrpo.roles.reports import WeightsAck
from raygrpo.types import FENCED

NUM_PROMPTS = 7
WEIGHTS: list[Any] = ["packed weights"]
DIED = ActorDiedError()
DIED.error_msg = "The actor died because of an error in its creation\nValueError: no such option: max_modle_len"

pytestmark = pytest.mark.usefixtures("without_ray")


class FakeGenerator:
    """A generator that keeps the versions it was given; `on_load(version)` and `on_status()` may delay, or raise."""

    def __init__(
        self,
        name: str,
        on_load: Callable[[int], Awaitable[None]] | None = None,
        on_status: Callable[[], Awaitable[None]] | None = None,
    ):
        self.name = name
        self.node = f"node of {name}"
        self.version = 0
        self.loading = False
        self.loads: list[tuple[int, int, Any]] = []  # attempt, version, weights
        self.restarts = 0
        self.num_processes = 1
        self.on_load = on_load
        self.on_status = on_status
        self.load_weights = SimpleNamespace(remote=self._load)
        self.status = SimpleNamespace(remote=self._status)
        self.stacks = SimpleNamespace(remote=self._stacks)

    @property
    def process(self) -> str:
        return f"process {self.num_processes} of {self.name}"

    def restart(self) -> None:
        self.restarts += 1
        self.num_processes += 1

    async def _status(self) -> Any:
        if self.on_status is not None:
            await self.on_status()
        attempt = self.loads[-1][0] if self.loads else 0
        return SimpleNamespace(attempt=attempt, version=self.version, groups_running=1, groups_waiting=0, num_groups=7)

    async def _stacks(self) -> str:
        return "thread engine:\n  kernel.py:12 spin"

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
        return WeightsAck(
            generator=self.name,
            version=version,
            num_bytes=100,
            drain_s=0.0,
            load_s=0.0,
            node=self.node,
            process=self.process,
        )


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


async def release(
    controller: RolloutController, stream: int, ticket: int, name: str, failure: str | None = None, **options: bool
) -> None:
    """The ticket came back from the generator of this name."""
    back = Release(ticket=ticket, generator_name=name, failure=failure, **options)
    await controller.release_block(stream, [back])


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
        for replacement in range(3):
            claim, again = [await controller.claim(stream, 2, replacement) for _ in range(2)]
            assert (claim.ticket, claim.prompt, claim.seeds) == (2, again.prompt, again.seeds)
            assert claim.prompt.prompt_id == prompt_index(2, NUM_PROMPTS, seed=5, replacement=replacement)
            assert claim.seeds == [sample_seed(5, 2, i, replacement) for i in range(3)]

    asyncio.run(run())


def test_claims_go_to_the_generator_with_the_least_to_do():
    async def run() -> None:
        controller = make_controller(FakeGenerator("a"), FakeGenerator("b"), FakeGenerator("c"), groups_per_step=12)
        stream = await begin(controller)
        await controller.publish(0, WEIGHTS)
        claims = [await controller.claim(stream, row) for row in range(6)]
        assert [claim.generator_name for claim in claims] == ["a", "b", "c"] * 2
        for claim in (claims[1], claims[4]):
            await release(controller, stream, claim.ticket, claim.generator_name, None)
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
        both = [Release(ticket=claim.ticket, generator_name=claim.generator_name) for claim in again]
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
