"""Evaluations with real actors: the controller, the evaluator and its reward process; generators without a model."""

from __future__ import annotations

import itertools
import time
import uuid
from typing import Any

import pytest

from raygrpo.roles.controller import RolloutController
from raygrpo.roles.evaluator import Evaluator
from tests.conftest import run_config
from tests.fake_generator import FakeGenerator, Script
from tests.roles.test_controller import prompt_set
from tests.test_evaluation import evaluation

pytestmark = pytest.mark.timeout(300)
ROWS = 5  # of evaluation(): two of one set with a completion each, three of another with four


class Record:
    """What the evaluator says to a tracker."""

    def __init__(self) -> None:
        self._logged: list[tuple[int, dict[str, float], dict[str, list[Any]]]] = []

    def log_evaluation(self, version: int, metrics: dict[str, float], shown: dict[str, list[Any]]) -> None:
        self._logged.append((version, metrics, shown))

    def evaluations(self, first_version: int = 0) -> dict[int, dict[str, float]]:
        return {version: metrics for version, metrics, _ in self._logged}

    def logged(self) -> list[tuple[int, dict[str, float], dict[str, list[Any]]]]:
        return self._logged


@pytest.fixture
def start(ray_session):
    """start(script) -> (controller, evaluator, record) of a run that evaluates every version."""
    ray = ray_session
    actors: list[Any] = []

    def begin(script: Script) -> tuple[Any, Any, Any]:
        name = uuid.uuid4().hex
        rows = evaluation()
        sets = {part.name: part.settings.model_dump() for part in rows.sets}
        config = run_config(num_steps=9, eval={"every": 1, "sets": sets}, generator={"num_actors": 2})
        actor = ray.remote(FakeGenerator).options(
            num_cpus=0.01, max_restarts=-1, max_task_retries=0, max_concurrency=100
        )
        generators = {f"g{i}": actor.remote(f"g{i}", script) for i in range(2)}
        controller = (
            ray.remote(RolloutController)
            .options(name=f"{name}-controller", num_cpus=0, max_concurrency=1000)
            .remote(seed=0, groups_per_step=4, group_size=3, max_staleness=1, eval_settings=config.eval, num_steps=9)
        )
        record = ray.remote(Record).options(name=f"{name}-record", num_cpus=0).remote()
        evaluator = (
            ray.remote(Evaluator)
            .options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
            .remote(config, rows.sizes, [], f"{name}-controller", f"{name}-record")
        )
        actors.extend([*generators.values(), evaluator, controller, record])
        ray.get(controller.set_up.remote(prompt_set(), generators, rows, evaluator))
        ray.get(controller.begin_attempt.remote(0))
        return controller, evaluator, record

    yield begin
    for actor in actors:
        ray.kill(actor)


def publish(ray: Any, controller: Any, version: int) -> Any:
    return controller.publish.remote(version, [ray.put({"version": version})])


def test_every_group_is_of_the_evaluations_version_whatever_dies_and_however_fast_publishes_follow(
    ray_session, start, tmp_path
):
    ray = ray_session
    controller, _, record = start(Script(die=frozenset({2}), refuse=frozenset({1}), marks=str(tmp_path)))
    reports = [ray.get(publish(ray, controller, version)) for version in range(4)]
    ray.get(controller.evaluated.remote())
    logged = ray.get(record.logged.remote())
    assert [version for version, _, _ in logged] == [0, 1, 2, 3]
    for version, metrics, shown in logged:
        groups = [scored.group for part in shown.values() for scored in part]
        assert [group.ticket for group in groups] == list(range(ROWS))
        assert {group.policy_version for group in groups} == {version}
        assert [group.error for group in groups if group.error] == ["ticket 1 is too long"]
        assert metrics["eval/a/num_failed"] == 1 and metrics["eval/b/num_failed"] == 0
        assert metrics["eval/a/reward"] == 0.5, "the other one is right"
        assert (metrics["eval/b/reward"], metrics["eval/b/pass_at_4"]) == (0.5, 1.0), "every second one is"
    assert (tmp_path / "2").exists(), "a generator died"
    assert [report.evaluations_failed for report in reports] == [0] * 4
    for before, after in itertools.pairwise(reports):
        start_s, end_s = after.evaluated
        assert before.end_s <= start_s + 0.1 and end_s <= after.end_s


def test_an_evaluator_that_dies_begins_the_evaluation_again(ray_session, start):
    ray = ray_session
    controller, evaluator, record = start(Script(seconds=dict.fromkeys(range(ROWS), 2.0)))
    ray.get(publish(ray, controller, 0))
    time.sleep(1.0)
    ray.kill(evaluator, no_restart=False)
    report = ray.get(publish(ray, controller, 1))
    assert report.evaluations_failed == 0
    [(version, metrics, shown)] = ray.get(record.logged.remote())
    assert version == 0 and metrics["eval/b/pass_at_4"] == 1.0
    assert sum(len(part) for part in shown.values()) == ROWS
    ray.get(controller.evaluated.remote())
