"""The stream on a real Ray Data, with a real controller and scorer, and generators without a model."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from raygrpo.config import GeneratorConfig, RewardConfig
from raygrpo.data import prompt_index, sample_seed
from raygrpo.roles.claims import MAX_ATTEMPTS, MAX_SHARED_FAILURES
from raygrpo.roles.controller import RolloutController
from raygrpo.types import ScoredGroup
from tests.fake_generator import FakeGenerator, Script
from tests.roles.test_controller import prompt_set

NUM_PROMPTS, GROUP_SIZE, SEED = 11, 4, 5
REWARD = RewardConfig(functions=[{"use": "exact_match", "weight": 2.0}])
pytestmark = pytest.mark.timeout(300)


@dataclass
class Streamed:
    """What the learners got."""

    by_step: list[list[list[ScoredGroup]]]  # [step][rank]
    reports: list[Any]  # of each version's publish
    warnings: list[str]

    @property
    def groups(self) -> list[ScoredGroup]:
        """In ticket order."""
        groups = [group for step in self.by_step for rank in step for group in rank]
        return sorted(groups, key=lambda scored: scored.group.ticket)


@pytest.fixture
def stream(ray_session):
    """stream(script, ...) runs one segment the way Learner drives it, and checks what must hold of every stream."""
    from raygrpo.stream import data_config, iterate_groups, segment_dataset

    ray = ray_session
    actors: list[Any] = []

    def run(
        script: Script,
        *,
        num_steps: int = 3,
        groups_per_step: int = 4,
        max_staleness: int = 0,
        num_learners: int = 1,
        num_generators: int = 2,
        first_step: int = 0,
        max_replacements: int = 0,
        groups_per_block: int = 1,
        learn_s: float = 0.1,
        reward: RewardConfig = REWARD,
        import_paths: Sequence[str] = (),
        **settings: Any,
    ) -> Streamed:
        """settings: of the generators."""
        actor = ray.remote(FakeGenerator).options(
            num_cpus=0.01, max_restarts=-1, max_task_retries=0, max_concurrency=100
        )
        generators = {f"g{i}": actor.remote(f"g{i}", script) for i in range(num_generators)}
        controller = ray.remote(RolloutController).options(num_cpus=0, max_concurrency=1000).remote(
            prompt_set(NUM_PROMPTS),
            generators,
            seed=SEED,
            groups_per_step=groups_per_step,
            group_size=GROUP_SIZE,
            max_staleness=max_staleness,
            settings=GeneratorConfig(**settings),
        )  # fmt: skip
        actors.extend([*generators.values(), controller])
        dataset = segment_dataset(
            "segment",
            num_steps * groups_per_step,
            controller,
            reward,
            list(import_paths),
            groups_in_flight=(max_staleness + 1) * groups_per_step,
            max_replacements=max_replacements,
            groups_per_block=groups_per_block,
        )
        shards = [rank["segment"] for rank in data_config().configure({"segment": dataset}, num_learners, None, None)]
        ray.get(controller.begin_attempt.remote(0))
        result = Streamed([], [], [])

        def publish(version: int) -> None:
            weights = ray.put({"version": version})
            result.reports.append(ray.get(controller.publish.remote(version, [weights]), timeout=120))

        publish(first_step)
        ray.get(controller.begin_segment.remote("segment", first_step * groups_per_step))
        next_group = [iterate_groups(shard) for shard in shards]
        for step in range(num_steps):
            found: list[list[ScoredGroup]] = [[] for _ in range(num_learners)]

            def collect(rank: int, found: list[list[ScoredGroup]] = found) -> None:
                found[rank] = [next_group[rank]() for _ in range(groups_per_step // num_learners)]

            in_parallel(collect, num_learners)
            result.by_step.append(found)
            time.sleep(learn_s)
            publish(first_step + step + 1)

        def end(rank: int) -> None:
            with pytest.raises(StopIteration):
                next_group[rank]()

        in_parallel(end, num_learners)
        result.warnings = ray.get(controller.status.remote()).warnings
        check(result, groups_per_step, max_staleness, num_learners, first_step, groups_per_block)
        return result

    yield run
    for actor in actors:
        ray.kill(actor)


def in_parallel(action: Any, num: int) -> None:
    """action(rank) in a thread for each rank; what one raises is raised."""
    errors: list[BaseException] = []

    def guarded(rank: int) -> None:
        try:
            action(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(rank,), daemon=True) for rank in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(150)
        assert not thread.is_alive(), "the stream stands still"
    if errors:
        raise errors[0]


def check(
    streamed: Streamed, groups_per_step: int, max_staleness: int, num_learners: int, first_step: int, block: int
) -> None:
    """Every ticket once, in order, dealt round robin in blocks; staleness within its bound; prompts and seeds as
    claimed."""
    for index, ranks in enumerate(streamed.by_step):
        step = first_step + index
        for rank, groups in enumerate(ranks):
            starts = range(step * groups_per_step + rank * block, (step + 1) * groups_per_step, num_learners * block)
            tickets = [start + place for start in starts for place in range(block)]
            assert [scored.group.ticket for scored in groups] == tickets
        for scored in (scored for groups in ranks for scored in groups):
            group = scored.group
            if group.error:
                continue
            assert step - max_staleness <= group.policy_version <= step
            place = {"seed": SEED, "replacement": group.replacement}
            assert group.prompt.prompt_id == prompt_index(group.ticket, NUM_PROMPTS, **place)
            seeds = [sample_seed(SEED, group.ticket, i, group.replacement) for i in range(GROUP_SIZE)]
            assert [rollout.completion_ids[0] for rollout in group.rollouts] == [seed % 1000 for seed in seeds]
            expected = [2.0 if rollout.text == group.prompt.answer else 0.0 for rollout in group.rollouts]
            assert [reward.total for reward in scored.rewards] == expected
            assert group.generate_start_s <= group.generate_end_s <= scored.score_start_s <= scored.score_end_s


def test_on_policy_every_group_is_sampled_by_the_version_it_trains(stream):
    straggler = 5
    streamed = stream(Script(seconds={straggler: 1.5}))
    for step, ranks in enumerate(streamed.by_step):
        assert {scored.group.policy_version for scored in ranks[0]} == {step}
        assert min(scored.group.generate_start_s for scored in ranks[0]) >= streamed.reports[step].end_s
    assert {scored.group.generator for scored in streamed.groups} == {"g0", "g1"}


@pytest.mark.parametrize("max_staleness", [1, 2])
def test_behind_a_straggler_generating_goes_on_as_far_as_the_bound_allows(stream, max_staleness):
    """Two learners, which get disjoint and equal shares of each step."""
    straggler = 2
    streamed = stream(
        Script(seconds={straggler: 3.0}), num_steps=4, max_staleness=max_staleness, num_learners=2, num_generators=3
    )
    groups = {scored.group.ticket: scored.group for scored in streamed.groups}
    ahead = range(4, 4 * (max_staleness + 1))
    assert all(groups[ticket].policy_version == 0 for ticket in ahead)
    assert all(groups[ticket].generate_end_s < groups[straggler].generate_end_s for ticket in ahead)
    behind = range(4 * (max_staleness + 1), 16)  # not admitted while the straggler's step was not trained
    assert all(groups[ticket].policy_version >= 1 for ticket in behind)
    assert all(groups[ticket].generate_start_s > groups[straggler].generate_end_s for ticket in behind)
    staleness = [ticket // 4 - group.policy_version for ticket, group in groups.items()]
    assert max(staleness) == max_staleness


def test_blocks_of_several_groups_keep_order_shares_and_staleness(stream):
    streamed = stream(
        Script(seconds={5: 1.0}, refuse=frozenset({6})),
        groups_per_step=8,
        num_steps=2,
        max_staleness=1,
        num_learners=2,
        groups_per_block=2,
    )
    assert [scored.group.ticket for scored in streamed.groups] == list(range(16))
    assert [scored.group.ticket for scored in streamed.groups if scored.group.error] == [6]


def test_a_segment_may_begin_anywhere_in_the_run(stream):
    streamed = stream(Script(), num_steps=2, first_step=3)
    assert [scored.group.ticket for scored in streamed.groups] == list(range(12, 20))
    assert {scored.group.policy_version for scored in streamed.groups} == {3, 4}


def test_a_request_that_cannot_be_served_becomes_an_error_row(stream):
    streamed = stream(Script(refuse=frozenset({1, 6})), num_generators=1)
    assert [scored.group.ticket for scored in streamed.groups] == list(range(12))
    for scored in streamed.groups:
        refused = scored.group.ticket in (1, 6)
        assert scored.group.error == (f"ticket {scored.group.ticket} is too long" if refused else "")
        assert len(scored.group.rollouts) == len(scored.rewards) == (0 if refused else GROUP_SIZE)
    assert streamed.warnings == [], "the generator is not to blame"


def test_the_groups_of_a_generator_that_dies_go_to_others_and_it_comes_back(stream, tmp_path):
    script = Script(die=frozenset({1, 9}), marks=str(tmp_path), seconds={0: 0.3, 2: 0.3, 3: 0.3})
    streamed = stream(script, num_steps=6, learn_s=1.0)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "9"}
    assert not any(scored.group.error for scored in streamed.groups)
    assert sum(report.generator_failures for report in streamed.reports) >= 2
    assert any("is back, with version" in warning for warning in streamed.warnings)
    assert any("ticket 1 failed on" in warning for warning in streamed.warnings)
    assert streamed.reports[-1].num_generators == 2, "both serve again"


def test_a_group_with_too_few_completions_is_sampled_anew_and_its_generator_restarted(stream, tmp_path):
    script = Script(shorten=frozenset({1, 6}), marks=str(tmp_path))
    streamed = stream(script, num_steps=4, learn_s=1.0)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "6"}
    assert all(len(scored.group.rollouts) == GROUP_SIZE for scored in streamed.groups)
    assert sum(report.generator_failures for report in streamed.reports) == 2
    for ticket in (1, 6):
        flaw = "what it returned is no group: it has 3 of 4 completions"
        assert any(f"ticket {ticket} failed on" in text and flaw in text for text in streamed.warnings)


def test_a_group_that_failed_does_not_wait_for_the_others_of_its_block(stream, tmp_path):
    """Tickets 0 and 2 are at one generator, 1 and 3 at the other, which dies; 0 takes long."""
    script = Script(die=frozenset({1}), marks=str(tmp_path), seconds={0: 10.0})
    streamed = stream(script, num_steps=1, groups_per_block=4)
    straggler, *others = [scored.group for scored in streamed.groups]
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert not any(scored.group.error for scored in streamed.groups)
    assert all(group.generate_end_s < straggler.generate_end_s for group in others)


def test_groups_may_wait_in_a_generator_for_longer_than_one_may_take(stream, tmp_path):
    """And one that hangs is found all the same, by the groups that wait behind the one it hangs in as well."""
    script = Script(at_a_time=1, hang=frozenset({2}), marks=str(tmp_path), seconds=dict.fromkeys(range(8), 0.8))
    streamed = stream(script, num_generators=1, num_steps=1, groups_per_step=8, group_timeout_s=3.0)
    assert not any(scored.group.error for scored in streamed.groups)
    assert [path.name for path in tmp_path.iterdir()] == ["2"]
    assert sum(report.generator_failures for report in streamed.reports) == 1
    assert any("ticket 2 failed on g0" in text and "no answer within 3 s" in text for text in streamed.warnings)


@pytest.mark.slow
@pytest.mark.parametrize("groups_per_block", [1, 4])
def test_a_prompt_that_kills_every_engine_costs_its_own_group_alone(stream, tmp_path, groups_per_block):
    """The only generator samples all groups of a step at once, and dies with them."""
    script = Script(kill=frozenset({1}), marks=str(tmp_path), seconds={0: 0.3, 2: 0.3, 3: 0.3})
    streamed = stream(script, num_generators=1, groups_per_block=groups_per_block)
    failed = {scored.group.ticket: scored.group.error for scored in streamed.groups if scored.group.error}
    assert list(failed) == [1] and failed[1].startswith("3 generators failed with it alone")
    assert len(list(tmp_path.iterdir())) == MAX_SHARED_FAILURES + MAX_ATTEMPTS


def test_the_only_generator_may_die_too(stream, tmp_path):
    """At staleness 1, where a publish may come while its process restarts."""
    script = Script(die=frozenset({5}), marks=str(tmp_path))
    streamed = stream(script, num_generators=1, max_staleness=1)
    assert {path.name for path in tmp_path.iterdir()} == {"5"}
    assert [scored.group.ticket for scored in streamed.groups] == list(range(12))
    assert not any(scored.group.error for scored in streamed.groups)


def test_dynamic_sampling_replaces_prompts_without_spread_reproducibly_and_within_its_bound(stream):
    flat = frozenset({0, 1, 2, 3, 4, 5, 6})
    runs = [
        stream(
            Script(flat_prompts=flat, seconds={3: 0.5}),
            max_staleness=1,
            max_replacements=2,
            num_steps=4,
            num_generators=n,
        )
        for n in (1, 2)
    ]
    seen: list[list[tuple[int, int, int]]] = []
    for streamed in runs:
        seen.append([(s.group.ticket, s.group.replacement, s.group.prompt.prompt_id) for s in streamed.groups])
        for scored in streamed.groups:
            group = scored.group
            tried = [
                prompt_index(group.ticket, NUM_PROMPTS, seed=SEED, replacement=k) for k in range(group.replacement + 1)
            ]
            assert all(prompt in flat for prompt in tried[:-1]), "only prompts without spread are given up"
            assert tried[-1] not in flat or group.replacement == 2
    assert seen[0] == seen[1]
    replacements = {replacement for _, replacement, _ in seen[0]}
    assert replacements == {0, 1, 2}


def test_with_dynamic_sampling_as_many_groups_are_scored_at_once_as_there_are_workers(stream, tmp_path):
    (tmp_path / "slow_task.py").write_text(
        "import time\n\ndef slow(completion, answer):\n    time.sleep(0.1)\n    return float(completion == answer)\n"
    )
    reward = RewardConfig(functions=[{"use": "slow_task:slow", "weight": 2.0}], num_workers=2)
    streamed = stream(Script(), max_replacements=1, num_steps=1, reward=reward, import_paths=[str(tmp_path)])
    scored = [(scored.score_start_s, scored.score_end_s) for scored in streamed.groups]
    assert max(sum(start_s <= at_s < end_s for start_s, end_s in scored) for at_s, _ in scored) == 2


@pytest.mark.parametrize("max_replacements", [0, 1])
def test_each_scorer_reserves_its_cpus(stream, max_replacements):
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import ActorTableData

    def scorers() -> set[bytes]:  # those that are gone, too
        table: Any = state._connect_and_get_accessor()
        actors = map(ActorTableData.FromString, table.get_actor_table(None, None))
        return {actor.actor_id for actor in actors if actor.required_resources == {"CPU": 0.125}}

    before = scorers()
    reward = RewardConfig(functions=REWARD.functions, num_workers=3, num_cpus=0.125)
    stream(Script(), max_replacements=max_replacements, num_steps=1, reward=reward)
    assert len(scorers() - before) == 3


def test_an_execution_finds_nothing_of_the_one_before_it():
    from raygrpo.stream import NoLeftovers

    class Executor:
        operators: list[Any]

    before = Executor()
    before.operators = [before]  # as Ray Data's refer to each other
    left = weakref.ref(before)
    gc.disable()  # Python's own collector comes when it comes
    try:
        del before
        assert left() is not None
        NoLeftovers().before_execution_starts(Executor())
        assert left() is None
    finally:
        gc.enable()


def test_the_loop_is_quick_while_groups_move_and_takes_a_bounded_share_of_a_core(monkeypatch):
    from ray.data._internal.execution import streaming_executor_state as state

    from raygrpo.stream import HOT_POLL_S, HOT_S, POLL_S, POLL_SHARE, AdaptivePoll

    monkeypatch.setattr(state, "WAIT_FOR_TASK_COMPLETION_TIMEOUT_S", 0.1)
    metrics = SimpleNamespace(num_tasks_finished=0, num_task_outputs_generated=0)
    executor = SimpleNamespace(_topology=[SimpleNamespace(metrics=metrics)])

    def period(cpu_s: float = 0.0) -> float:
        end_s = time.thread_time() + cpu_s
        while time.thread_time() < end_s:
            pass
        poll.on_execution_step(executor)
        return state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S

    poll = AdaptivePoll()
    poll.before_execution_starts(executor)
    assert HOT_POLL_S <= period() < POLL_S / 2, "at the start"
    time.sleep(HOT_S)
    assert period() == POLL_S, "nothing moves"
    metrics.num_tasks_finished += 1
    assert HOT_POLL_S <= period() < POLL_S / 2
    metrics.num_tasks_finished += 1
    costly_s = POLL_S * POLL_SHARE / 2
    assert costly_s / POLL_SHARE <= period(costly_s) <= POLL_S
