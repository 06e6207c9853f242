"""What becomes of generators that fail, and of the groups that they had. No Ray."""

from __future__ import annotations

import asyncio

import pytest
from ray.exceptions import ActorUnavailableError

from raygrpo.roles import claims as claims_module
from raygrpo.roles.claims import MAX_ATTEMPTS, MAX_SHARED_FAILURES, Claim
from raygrpo.roles.controller import RolloutController
from tests.roles.test_controller import (
    DIED,
    WEIGHTS,
    FakeGenerator,
    begin,
    make_controller,
    release,
    settle,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("without_ray")


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
        await release(controller, stream, 0, "a", "ActorDiedError: gone")
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
        assert (await controller.publish(2, WEIGHTS)).generator_failures == 0, "each is told once"
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
        await release(controller, stream, 0, "a", "gone")
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
        await release(controller, stream, 0, "a", "gone")
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


async def fail(controller: RolloutController, stream: int, row: int, replacement: int = 0, times: int = 1) -> Claim:
    """The claim of the row after so many generators died with its group."""
    for _ in range(times):
        [claim] = await controller.claim_block(stream, [row], replacement)
        await release(controller, stream, claim.ticket, claim.generator_name, f"no memory on {claim.generator_name}")
    return (await controller.claim_block(stream, [row], replacement))[0]


def test_a_ticket_on_which_generators_keep_failing_is_given_up(monkeypatch):
    nodes = {f"node of {name}" for name in "abcdefg"}
    monkeypatch.setattr(claims_module, "living_nodes", lambda: nodes)

    async def run() -> None:
        async def never(version: int) -> None:
            if version == 0 and controller._version == 0:
                await asyncio.Event().wait()

        controller = make_controller(*(FakeGenerator(name, never) for name in "abcdefg"))
        stream = await begin(controller)
        await controller.publish(0, WEIGHTS)
        given_up = await fail(controller, stream, 1, times=MAX_SHARED_FAILURES + MAX_ATTEMPTS)
        assert given_up.generator is None
        for name in "abcde"[MAX_SHARED_FAILURES:]:
            assert f"{name}: no memory on {name}" in given_up.error
        assert "no memory on a" not in given_up.error, "that may have been another group's fault"
        assert (await controller.claim(stream, 2)).generator is not None, "other tickets go on"

        nodes.remove("node of c")
        claim = await controller.claim(stream, 1)
        assert claim.generator_name == "g", "what a lost node explains does not count; f has ticket 2"
        await release(controller, stream, 1, "g", "no memory here either")
        assert (await controller.claim(stream, 1)).generator is None, "that was the third on a node that lives"

    asyncio.run(run())


def test_each_of_a_tickets_prompts_has_its_own_failures(monkeypatch):
    monkeypatch.setattr(claims_module, "living_nodes", lambda: {"node of a"})

    async def run() -> None:
        controller = make_controller(FakeGenerator("a"))
        stream = await begin(controller)
        await controller.publish(0, WEIGHTS)
        assert (await fail(controller, stream, 1, times=MAX_SHARED_FAILURES + MAX_ATTEMPTS)).generator is None
        assert (await controller.claim(stream, 1, 1)).generator is not None, "another prompt, which nobody has tried"

    asyncio.run(run())


@pytest.mark.parametrize("num_generators", [1, 3])
def test_a_prompt_that_kills_every_engine_is_given_up_and_no_other(num_generators, monkeypatch):
    """Two of them, so that one may be alone while the other is beside innocent groups."""
    names = "abc"[:num_generators]
    monkeypatch.setattr(claims_module, "living_nodes", lambda: {f"node of {name}" for name in names})
    rows, deadly = range(24), {5, 17}

    async def run() -> None:
        sampling: dict[str, dict[int, asyncio.Future[None]]] = {name: {} for name in names}
        crashes: list[tuple[int, int]] = []  # whose, beside how many others

        async def sample(name: str, row: int) -> None:
            """Raises RuntimeError when the engine dies of any of its groups."""
            groups = sampling[name]
            groups[row] = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(0.005):
                    await groups[row]
            except TimeoutError:
                if row in deadly:
                    crashes.append((row, len(groups) - 1))
                    others, sampling[name] = list(groups.values()), {}
                    for future in others:
                        if not future.done():
                            future.set_exception(RuntimeError("the engine died"))
                    raise RuntimeError("the engine died") from None
            del groups[row]

        async def serve(row: int) -> str:
            """As the rollout stage; "" for a group that was sampled."""
            while True:
                [claim] = await controller.claim_block(stream, [row])
                if claim.generator is None:
                    return claim.error
                failure = None
                try:
                    await sample(claim.generator_name, row)
                except RuntimeError as error:
                    failure = str(error)
                await release(controller, stream, row, claim.generator_name, failure)
                if failure is None:
                    return ""

        controller = make_controller(*map(FakeGenerator, names), groups_per_step=len(rows))
        stream = await begin(controller)
        await controller.publish(0, WEIGHTS)
        async with asyncio.timeout(20):
            errors = await asyncio.gather(*map(serve, rows))
        assert {row for row, error in zip(rows, errors, strict=True) if error} == deadly
        for row in deadly:
            beside = [num for culprit, num in crashes if culprit == row]
            assert len(beside) <= MAX_SHARED_FAILURES + MAX_ATTEMPTS and beside[-MAX_ATTEMPTS:] == [0] * MAX_ATTEMPTS
        assert set(controller._pool._outstanding.values()) == {0} and not controller._pool._alone

    asyncio.run(run())


def test_a_group_that_may_be_deadly_gets_an_idle_generator_which_others_wait_for():
    async def run() -> None:
        controller = make_controller(FakeGenerator("a"))
        stream = await begin(controller)
        await controller.publish(0, WEIGHTS)
        other = await controller.claim(stream, 0)
        waiting = asyncio.create_task(fail(controller, stream, 1, times=MAX_SHARED_FAILURES))
        await wait_until(lambda: len(controller._ledger.failures.get((1, 0), [])) == MAX_SHARED_FAILURES)
        await wait_until(lambda: "a" in controller._pool.healthy)
        await settle()
        assert not waiting.done(), "ticket 0 is there"
        await release(controller, stream, other.ticket, "a")
        claim = await waiting
        assert claim.generator_name == "a"
        others = asyncio.create_task(controller.claim_block(stream, [2, 3]))
        await settle()
        assert not others.done(), "it is alone"
        await release(controller, stream, 1, "a")
        assert [claim.generator_name for claim in await others] == ["a", "a"]

        # Claimed again with others, in a block that is repeated, it does not hold up the claims that it came with.
        again = await asyncio.wait_for(controller.claim_block(stream, [0, 1, 2]), 5)
        assert [claim.generator_name for claim in again] == ["a", "a", "a"]

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
            await release(controller, stream, 1, "a", "TimeoutError: a has version 0", begun=False)
        assert controller._pool.num_failures == 2 * MAX_ATTEMPTS, "it is quarantined all the same"
        assert controller._ledger.failures == {}

    asyncio.run(run())


def test_a_node_that_takes_many_generators_with_it_costs_a_ticket_one_failure():
    """Until somebody asks them, nobody knows that they are gone."""

    async def run() -> None:
        lost = True

        async def answer(version: int = 1) -> None:
            if lost and version == 1:
                raise ActorUnavailableError("the node is gone", None)

        generators = [FakeGenerator(name, answer, answer) for name in "abcd"]
        controller = make_controller(*generators)
        stream = await begin(controller, first_ticket=4)
        lost = False
        await controller.publish(1, WEIGHTS)
        claim = await controller.claim(stream, 0)
        lost = True
        await release(controller, stream, 4, claim.generator_name, "ActorUnavailableError")
        again = asyncio.create_task(controller.claim(stream, 0))
        await wait_until(lambda: not controller._pool.healthy)
        assert not again.done(), "it went to none of the others, and waits"
        assert [len(failures) for failures in controller._ledger.failures.values()] == [1]
        assert controller._pool.num_failures == len(generators)
        lost = False
        assert (await again).generator in generators
        assert sum(controller._pool._outstanding.values()) == 1

    asyncio.run(run())
