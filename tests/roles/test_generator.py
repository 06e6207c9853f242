"""The generator: versions are exact, nothing is lost, a broken engine ends the process.

Most of it runs in this process on the transformers engine; what a process boundary changes runs as Ray actors, once
with vLLM.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from raygrpo.config import GeneratorConfig, LoraConfig, ModelConfig, SamplingConfig
from raygrpo.direct_transfer import WeightsServer
from raygrpo.engines.sampling import EngineDeadError
from raygrpo.eval_config import EvalSamplingConfig
from raygrpo.lora import add_adapters
from raygrpo.roles.generator import Generator
from raygrpo.timeline import covered_seconds
from raygrpo.types import NeverBegunError, Prompt, RolloutGroup, TransferError
from raygrpo.weights import PackedWeights, pack
from tests.tiny_models import tiny_model

PROMPT = Prompt(prompt_id=3, prompt_ids=[(7 * i) % 250 for i in range(70)], text="", answer="4")
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Models that differ in their weights: what version 0, 1 and 2 are made of."""
    return [tiny_model(tmp_path_factory.mktemp("model"), vocab_size=300, seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def models(paths: list[Path]) -> list[Any]:
    return [AutoModelForCausalLM.from_pretrained(path) for path in paths]


@pytest.fixture(scope="module")
def packed(models: list[Any]) -> list[PackedWeights]:
    return [pack(model.named_parameters()) for model in models]


def settings(path: Path, *, engine: str = "transformers", max_groups: int = 4, max_tokens: int = 12) -> dict[str, Any]:
    return dict(
        name="generator-0",
        model=ModelConfig(path=str(path)),
        generator=GeneratorConfig(
            engine=engine,
            max_groups=max_groups,
            num_threads=1,
            sampling=SamplingConfig(max_tokens=max_tokens),
            vllm={"kv_cache_memory_bytes": 32 * 2**20} if engine == "vllm" else {},
        ),
        max_model_len=128,
    )


def logprob_error(model: Any, group: RolloutGroup) -> float:
    worst = 0.0
    for rollout in group.rollouts:
        ids = torch.tensor([group.prompt.prompt_ids + rollout.completion_ids])
        with torch.no_grad():
            logprobs = model(ids).logits[0, len(group.prompt.prompt_ids) - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(rollout.completion_ids)[:, None])[:, 0]
        worst = max(worst, (expected - torch.tensor(rollout.behaviour_logprobs)).abs().max().item())
    return worst


def tokens(group: RolloutGroup) -> list[list[int]]:
    return [rollout.completion_ids for rollout in group.rollouts]


def test_a_group_has_a_rollout_for_each_seed_in_order_and_says_where_it_comes_from(paths, models):
    async def main() -> None:
        generator = Generator(**settings(paths[0]))
        start = time.time()
        group = await generator.generate(17, PROMPT, [5, 6, 7, 8], 0)
        assert (group.ticket, group.prompt, group.policy_version, group.error) == (17, PROMPT, 0, "")
        assert group.generator == "generator-0"
        assert start <= group.generate_start_s <= group.generate_end_s <= time.time()
        assert logprob_error(models[0], group) < TOLERANCE
        reverse = await generator.generate(18, PROMPT, [8, 7, 6, 5], 0)
        assert tokens(reverse) == tokens(group)[::-1]
        status = await generator.status()
        assert (status.num_groups, status.groups_running, status.groups_waiting) == (2, 0, 0)
        assert status.num_tokens == sum(map(len, tokens(group) + tokens(reverse)))
        assert status.num_cached_tokens == 2 * 3 * len(PROMPT.prompt_ids)
        assert 0 < status.busy_s < time.time() - start

    asyncio.run(main())


def test_running_groups_end_under_the_old_version_and_waiting_ones_begin_under_the_new(paths, models, packed):
    async def main() -> None:
        generator = Generator(**settings(paths[0], max_groups=3, max_tokens=40))
        tasks = [asyncio.create_task(generator.generate(t, PROMPT, [4 * t, 4 * t + 1], 0)) for t in range(8)]
        while (await generator.status()).groups_running < 3:
            await asyncio.sleep(0.001)
        ack = await generator.load_weights(1, packed[1])
        assert (ack.generator, ack.version, ack.num_bytes) == ("generator-0", 1, packed[1].num_bytes)
        groups = await asyncio.gather(*tasks)
        later = await generator.load_weights(2, packed[2])
        versions = [group.policy_version for group in groups]
        assert versions.count(0) >= 3
        for version, said in enumerate((ack.sampled, later.sampled)):  # each says when it sampled, since the one before
            own = [(g.generate_start_s, g.generate_end_s) for g in groups if g.policy_version == version]
            assert covered_seconds(said, 0.0, math.inf) == pytest.approx(covered_seconds(own, 0.0, math.inf), abs=1e-5)
        assert versions.count(1) >= 1
        for group in groups:
            assert logprob_error(models[group.policy_version], group) < TOLERANCE
            assert logprob_error(models[1 - group.policy_version], group) > 0.1

    asyncio.run(main())


def test_a_generator_never_has_more_groups_in_its_engine_than_max_groups(paths):
    async def main() -> None:
        generator = Generator(**settings(paths[0], max_groups=2, max_tokens=40))
        tasks = [asyncio.create_task(generator.generate(t, PROMPT, [t], 0)) for t in range(9)]
        seen = set()
        while not all(task.done() for task in tasks):
            seen.add((await generator.status()).groups_running)
            await asyncio.sleep(0.001)
        assert max(seen) == 2

    asyncio.run(main())


def test_a_generator_knows_for_how_long_its_engine_has_had_a_group_or_the_one_that_it_waits_for(paths):
    async def main() -> None:
        generator = Generator(**settings(paths[0], max_groups=1, max_tokens=40))
        assert await generator.seconds_in_engine(0, is_evaluation=False) == 0
        start_s = time.time()
        tasks = [asyncio.create_task(generator.generate(t, PROMPT, [t], 0)) for t in range(2)]
        waited_s = []
        while not tasks[0].done():
            own_s, other_s = [await generator.seconds_in_engine(t, is_evaluation=False) for t in range(2)]
            if own_s and not tasks[0].done():
                assert own_s <= other_s <= time.time() - start_s
                waited_s.append(other_s)
            await asyncio.sleep(0.001)
        assert waited_s == sorted(waited_s) and len(waited_s) > 1
        while not (own_s := await generator.seconds_in_engine(1, is_evaluation=False)):
            await asyncio.sleep(0.001)
        assert own_s < time.time() - tasks[0].result().generate_end_s
        await tasks[1]

    asyncio.run(main())


def test_groups_of_an_evaluation_are_begun_when_none_of_the_training_waits(paths, packed):
    async def main() -> None:
        generator = Generator(**settings(paths[0], max_groups=1, max_tokens=20))
        greedy = EvalSamplingConfig(max_tokens=20)
        order: list[int] = []

        async def generate(ticket: int, sampling: EvalSamplingConfig | None) -> RolloutGroup:
            group = await generator.generate(ticket, PROMPT, [ticket], 0, sampling)
            order.append(ticket)
            return group

        running = asyncio.create_task(generate(0, None))
        while (await generator.status()).groups_running < 1:
            await asyncio.sleep(0.001)
        evaluating = [asyncio.create_task(generate(ticket, greedy)) for ticket in (10, 11)]
        await asyncio.sleep(0)
        training = [asyncio.create_task(generate(ticket, None)) for ticket in (1, 2)]
        first, second = await asyncio.gather(*evaluating)
        await asyncio.gather(running, *training)
        assert order == [0, 1, 2, 10, 11]
        sampled = (await generator.load_weights(1, packed[1])).sampled
        assert max(end_s for _, end_s in sampled) <= first.generate_start_s, "of the training only"
        assert tokens(first) == tokens(second), "greedy, whatever the seed"

    asyncio.run(main())


def test_groups_of_an_evaluation_that_was_given_up_are_not_sampled_by_another_version(paths, packed):
    async def main() -> None:
        generator = Generator(**settings(paths[0], max_groups=1, max_tokens=40))
        running = asyncio.create_task(generator.generate(0, PROMPT, [1], 0))
        while (await generator.status()).groups_running < 1:
            await asyncio.sleep(0.001)
        late = asyncio.create_task(generator.generate(10, PROMPT, [1], 0, EvalSamplingConfig(max_tokens=20)))
        while (await generator.status()).groups_waiting < 1:
            await asyncio.sleep(0.001)
        await generator.load_weights(1, packed[1])
        with pytest.raises(ValueError, match="was to evaluate another version than 1"):
            await late
        assert (await running).policy_version == 0

    asyncio.run(main())


def test_generate_waits_for_its_version_and_gives_up_in_time(paths, models, packed):
    async def main() -> None:
        generator = Generator(**settings(paths[0]), version_timeout_s=0.3)
        early = asyncio.create_task(generator.generate(0, PROMPT, [1, 2], 2))
        await asyncio.sleep(0.05)
        assert (await generator.status()).groups_waiting == 1
        await generator.load_weights(1, packed[1])
        await asyncio.sleep(0.05)
        assert not early.done()
        await generator.load_weights(2, packed[2])
        group = await early
        assert group.policy_version == 2
        assert logprob_error(models[2], group) < TOLERANCE
        with pytest.raises(TimeoutError, match=r"generator-0 has version 2; version 3 did not come within 0\.3 s"):
            await generator.generate(1, PROMPT, [1], 3)

    asyncio.run(main())


def test_bad_weights_are_refused_and_the_generator_goes_on(paths, models, packed):
    async def main() -> None:
        generator = Generator(**settings(paths[0]))
        await generator.load_weights(1, packed[1])
        with pytest.raises(ValueError, match="serves version 1 of attempt 0: version 0 of attempt 0 is older"):
            await generator.load_weights(0, packed[0])
        first = packed[2].data[0].copy()
        first[1000] ^= 4
        with pytest.raises(ValueError, match=f"digest of '{packed[2].index[0].name}' does not match"):
            await generator.load_weights(2, dataclasses.replace(packed[2], data=(first, *packed[2].data[1:])))
        with pytest.raises(ValueError, match="published tensors are not those of the model"):
            await generator.load_weights(2, pack([("w", torch.zeros(2))]))
        again = await generator.load_weights(1, packed[2])  # the same version is not loaded twice
        assert (again.version, again.num_bytes) == (1, 0)
        group = await generator.generate(0, PROMPT, [1, 2], 1)
        assert group.policy_version == 1
        assert logprob_error(models[1], group) < TOLERANCE

    asyncio.run(main())


def test_a_generator_pulls_what_it_is_offered_and_goes_on_where_that_is_not_there(paths, models):
    async def main() -> None:
        generator = Generator(**settings(paths[0]))
        server = WeightsServer("127.0.0.1", timeout_s=5.0)
        offers = [server.publish(version, models[version].named_parameters()) for version in (1, 2)]
        with pytest.raises(TransferError, match="does not keep version 1 any more"):
            await generator.load_weights(1, offers[0])
        ack = await generator.load_weights(2, offers[1])
        assert (ack.version, ack.num_bytes) == (2, sum(p.nbytes for p in models[2].parameters()))
        server.close()
        with pytest.raises(TransferError, match="does not answer"):
            await generator.load_weights(3, dataclasses.replace(offers[1], version=3))
        group = await generator.generate(0, PROMPT, [1, 2], 2)
        assert group.policy_version == 2
        assert logprob_error(models[2], group) < TOLERANCE

    asyncio.run(main())


def test_adapters_are_pulled_and_merged(paths):
    lora = LoraConfig(rank=4)
    adapted: Any = add_adapters(AutoModelForCausalLM.from_pretrained(paths[0]), lora)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    trained = [(name, p.detach()) for name, p in adapted.named_parameters() if p.requires_grad]

    async def main() -> None:
        given = settings(paths[0])
        generator = Generator(**given | {"model": given["model"].model_copy(update={"lora": lora})})
        server = WeightsServer("127.0.0.1", timeout_s=5.0)
        for version in (1, 2):
            ack = await generator.load_weights(version, server.publish(version, trained))
            assert ack.num_bytes == sum(tensor.nbytes for _, tensor in trained)
        server.close()
        group = await generator.generate(0, PROMPT, [1, 2], 2)
        assert logprob_error(adapted, group) < TOLERANCE

    asyncio.run(main())


def test_a_later_attempt_of_the_learners_replaces_what_an_earlier_one_published(paths, models, packed):
    """A gang that resumed from version 1 publishes version 2 anew, with other weights: they must be loaded."""

    async def main() -> None:
        generator = Generator(**settings(paths[0]))
        await generator.load_weights(3, packed[1], attempt=0)
        ack = await generator.load_weights(2, packed[2], attempt=1)
        assert (ack.version, ack.num_bytes) == (2, packed[2].num_bytes)
        with pytest.raises(ValueError, match="serves version 2 of attempt 1: version 4 of attempt 0 is older"):
            await generator.load_weights(4, packed[1], attempt=0)
        group = await generator.generate(0, PROMPT, [1, 2], 2)
        assert group.policy_version == 2
        assert logprob_error(models[2], group) < TOLERANCE

    asyncio.run(main())


def test_a_request_that_cannot_be_served_fails_alone(paths):
    async def main() -> None:
        generator = Generator(**settings(paths[0]))
        too_long = dataclasses.replace(PROMPT, prompt_ids=PROMPT.prompt_ids * 2)
        results = await asyncio.gather(
            generator.generate(0, PROMPT, [1], 0),
            generator.generate(1, too_long, [1], 0),
            generator.completion_logprobs([], [1]),
            generator.generate(2, PROMPT, [1], 0),
            return_exceptions=True,
        )
        assert isinstance(results[1], ValueError) and "do not fit into 128" in str(results[1])
        assert isinstance(results[2], ValueError) and "cannot score" in str(results[2])
        assert tokens(results[0]) == tokens(results[3])

    asyncio.run(main())


def test_a_cancelled_call_leaves_the_engine(paths):
    async def main() -> None:
        generator = Generator(**settings(paths[0], max_groups=1, max_tokens=50))
        expected = tokens(await generator.generate(0, PROMPT, [1], 0))
        running = asyncio.create_task(generator.generate(1, PROMPT, list(range(8)), 0))
        waiting = asyncio.create_task(generator.generate(2, PROMPT, [3], 0))
        while (await generator.status()).groups_running + (await generator.status()).groups_waiting < 2:
            await asyncio.sleep(0.001)
        running.cancel()
        waiting.cancel()
        await asyncio.gather(running, waiting, return_exceptions=True)
        assert running.cancelled() and waiting.cancelled()
        assert tokens(await generator.generate(3, PROMPT, [1], 0)) == expected
        status = await generator.status()
        assert (status.groups_running, status.groups_waiting, status.num_groups) == (0, 0, 2)

    asyncio.run(main())


def test_completion_logprobs_are_those_of_the_loaded_weights_while_groups_run(paths, models, packed):
    async def main() -> None:
        generator = Generator(**settings(paths[0], max_tokens=40))
        await generator.load_weights(1, packed[1])
        task = asyncio.create_task(generator.generate(0, PROMPT, [1, 2], 1))
        logprobs = await generator.completion_logprobs(PROMPT.prompt_ids, [4, 5, 6])
        with torch.no_grad():
            expected = models[1](torch.tensor([[*PROMPT.prompt_ids, 4, 5, 6]])).logits[0, -4:-1].log_softmax(-1)
        assert (torch.tensor(logprobs) - expected[range(3), [4, 5, 6]]).abs().max() < TOLERANCE
        assert logprob_error(models[1], await task) < TOLERANCE

    asyncio.run(main())


def test_a_model_that_does_not_load_fails_the_constructor(tmp_path):
    with pytest.raises(OSError, match=r"(?s)nothing-here"):
        Generator(**settings(tmp_path / "nothing-here"))


def test_a_broken_engine_fails_every_caller_and_ray_restarts_the_process(ray_session, paths, models, packed):
    """The engine is broken by weights that are not finite; the restarted process is at version 0 and loads again."""
    nan = pack((name, torch.full_like(p, torch.nan)) for name, p in models[0].named_parameters())
    actor = ray.remote(Generator).options(num_cpus=0.1, max_restarts=-1).remote(**settings(paths[0], max_groups=1))
    before = ray.get(actor.status.remote())
    first = ray.get(actor.load_weights.remote(1, nan))
    calls = [actor.generate.remote(ticket, PROMPT, [1, 2], 1) for ticket in range(3)]
    never_begun = []
    for call in calls:
        with pytest.raises((EngineDeadError, NeverBegunError), match="logits are not finite") as caught:
            ray.get(call, timeout=30)
        never_begun.append(isinstance(caught.value, NeverBegunError))
    assert sorted(never_begun) == [False, True, True], "one at a time was in the engine"
    deadline = time.monotonic() + 60
    while True:  # the old process lives for a moment longer, and does not pass for well
        try:
            status = ray.get(actor.status.remote(), timeout=60)
            ack = ray.get(actor.load_weights.remote(1, nan), timeout=60)
            break
        except (ray.exceptions.RayActorError, EngineDeadError):
            assert time.monotonic() < deadline
        time.sleep(0.2)
    assert status.pid != before.pid and status.version == 0
    assert ack.process != first.process and ack.num_bytes > 0, "it did not have version 1"
    assert ray.get(actor.load_weights.remote(2, [ray.put(packed[2])])).version == 2
    group = ray.get(actor.generate.remote(9, PROMPT, [1, 2], 2))
    assert group.policy_version == 2
    assert logprob_error(models[2], group) < TOLERANCE
    ray.kill(actor)


class ForgetfulGenerator(Generator):
    """Its engine loses the first completion that it finishes."""

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        engine: Any = self._worker._engine
        step, lost = engine.step, []

        def lossy() -> list[Any]:
            finished = step()
            if finished and not lost:
                lost.append(finished.pop(0))
            return finished

        engine.step = lossy


def test_an_engine_that_returns_too_few_completions_is_dead_at_once(ray_session, paths):
    """Not after generator.group_timeout_s."""
    actor = ray.remote(ForgetfulGenerator).options(num_cpus=0.1).remote(**settings(paths[0], max_tokens=4))
    with pytest.raises(EngineDeadError, match="too few completions: 1 are missing, and it works on 0"):
        ray.get(actor.generate.remote(0, PROMPT, [1, 2, 3], 0), timeout=60)
    ray.kill(actor)


def test_vllm_generators_serve_published_weights(ray_session, paths, models, packed):
    """One reference in a list, as the controller passes it; both actors sample the same for the same seeds."""
    make = ray.remote(Generator).options(num_cpus=0.1)
    actors = [make.remote(**settings(paths[0], engine="vllm", max_groups=2) | {"name": f"g{i}"}) for i in range(2)]
    seeds = [11, 12, 13, 14]
    first = ray.get([actor.generate.remote(0, PROMPT, seeds, 0) for actor in actors])
    late = [actor.generate.remote(1, PROMPT, seeds, 1) for actor in actors]  # wait for version 1
    weights = [ray.put(packed[1])]
    acks = ray.get([actor.load_weights.remote(1, weights) for actor in actors])
    assert [ack.version for ack in acks] == [1, 1]
    second = ray.get(late)
    for version, groups in enumerate((first, second)):
        assert [group.generator for group in groups] == ["g0", "g1"]
        assert tokens(groups[0]) == tokens(groups[1])
        for group in groups:
            assert group.policy_version == version
            assert logprob_error(models[version], group) < TOLERANCE
    score = ray.get(actors[0].completion_logprobs.remote(PROMPT.prompt_ids, [4, 5, 6]))
    with torch.no_grad():
        expected = models[1](torch.tensor([[*PROMPT.prompt_ids, 4, 5, 6]])).logits[0, -4:-1].log_softmax(-1)
    assert (torch.tensor(score) - expected[range(3), [4, 5, 6]]).abs().max() < TOLERANCE
    for actor in actors:
        ray.kill(actor)


def test_importing_the_role_loads_no_heavy_package():
    heavy = "{'torch', 'vllm', 'transformers', 'ray'}"
    code = f"import sys, raygrpo.roles.generator; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
