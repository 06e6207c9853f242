"""Runs that are resumed, killed and spread over processes end with the same weights, to the last bit.

`make chaos` runs many more of these, with kinds and moments drawn at random."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from tests import stalled_publish
from tests.chaos import DRIVER, NUM_STEPS, Fault, Outcome, check, kill, record, started, train, write_task

pytestmark = pytest.mark.timeout(1200)
EVALUATED = [
    "eval={every: 3, data: {source: 'chaos_task:rows', max_rows: 4}, samples: 2, sampling: {temperature: 1.0, "
    "max_tokens: 20}}"
]  # also longer than what is trained
# The run stops in its first step where generators have other weights than the learners.
TWO_LEARNERS = [
    "deterministic=true",
    "learner.deepspeed.zero_optimization.stage=3",
    "learner.max_logprob_diff=1.0e-4",
]
ALONE = ["--local", "deterministic=true", "learner.num_workers=1", "generator.num_actors=1"]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_task(tmp_path_factory.mktemp("recovery"))


@pytest.fixture(scope="module")
def alone(config) -> Outcome:
    """All of it in one process."""
    return train(config, "alone", (), *ALONE)


@pytest.fixture(scope="module")
def spread(config) -> Outcome:
    """With evaluations, on two generators, and one process of each role is killed."""
    faults = [
        Fault("generator", after_step=0, delay_s=0.1),
        Fault("reward functions", after_step=2, delay_s=0.0),
        Fault("learner", after_step=4, delay_s=0.2),
    ]
    options = ["deterministic=true", "learner.num_workers=1", "reward.num_workers=2", *EVALUATED]
    outcome = train(config, "spread", faults, *options)
    assert outcome.killed == [fault.kind for fault in faults]
    return outcome


@pytest.fixture(scope="module")
def two_learners(config) -> Outcome:
    """Whose weights are gathered bucket by bucket; nothing is killed."""
    outcome = train(config, "two-learners", (), *TWO_LEARNERS)
    assert sum(metrics["faults/generator_failures"] for metrics in outcome.steps.values()) == 0
    return outcome


def evaluations(config: Path, name: str) -> dict[int, dict[str, float]]:
    """By version, but for their seconds; what was evaluated twice must be the same."""
    found: dict[int, dict[str, float]] = {}
    for line in (config.parent / "runs" / f"{name}-latest" / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "eval/seconds" in entry["metrics"]:
            del entry["metrics"]["eval/seconds"]
            assert found.setdefault(entry["step"], entry["metrics"]) == entry["metrics"]
    return found


def test_processes_evaluations_and_deaths_do_not_change_a_bit(alone, spread):
    check(spread, 0, alone)
    assert spread.steps[NUM_STEPS - 1]["run/attempt"] == 2, "the learner was restarted"
    died = {metrics["run/attempt"] for metrics in spread.steps.values() if metrics["faults/generator_failures"]}
    assert died == {1}, "the generator was killed before, and is not counted again"


def test_steps_and_resumed_steps_are_the_steps_of_one_run(config, alone, spread):
    first = train(config, "halves", (), *ALONE, *EVALUATED, f"num_steps={NUM_STEPS // 2}")
    assert sorted(first.steps) == list(range(NUM_STEPS // 2)) and first.digest != alone.digest
    newest = max((config.parent / "runs" / "halves-latest" / "checkpoints").glob("step-*"))
    weights = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(weights, weights.stat().st_size - 1)  # so that it goes on from the one before
    second = train(config, "halves", (), *ALONE, *EVALUATED, "--resume")
    check(second, 0, alone)
    expected = evaluations(config, "spread")
    assert list(expected) == [0, 3, 6, 8]
    found = evaluations(config, "halves")
    assert list(found) == [0, 3, 4, 6, 8], "4 ended the first half"
    assert {version: found[version] for version in expected} == expected, "the same here as on two generators"
    run_dirs = [path for path in (config.parent / "runs").glob("halves-2*")]
    assert len(run_dirs) == 1, "the same run, in the same directory"


def test_a_killed_driver_loses_at_most_the_steps_since_the_checkpoint(config, alone):
    outcome = train(config, "killed", [Fault(DRIVER, after_step=3, delay_s=0.0)], *ALONE)
    assert outcome.killed == [DRIVER]
    check(outcome, 0, alone)


@pytest.mark.slow
def test_a_driver_killed_between_publish_and_advance_changes_nothing(config, alone, tmp_path):
    """All generators hold the version, and the gate does not know it yet. Version 3 is after the checkpoint of step 2,
    before that of step 4."""
    options = ["deterministic=true", "learner.num_workers=1", "name=between"]
    mark = tmp_path / "stalled"
    command = [sys.executable, stalled_publish.__file__, str(mark), "3", "train", str(config), *options]
    with open(tmp_path / "log", "w") as log, started(command, config.parent, log) as process:
        while not mark.exists():
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.1)
        kill(process, DRIVER)
    assert max(record(config.parent / "runs" / "between-latest")) < 3
    resumed = train(config, "between", (), *options[:2], "--resume")
    check(resumed, 0, alone)


@pytest.mark.slow
@pytest.mark.parametrize("transfer", ["object_store", "direct"])
def test_two_learners_and_generators_that_die_change_nothing_however_weights_travel(config, two_learners, transfer):
    faults = [Fault("generator", after_step=1, delay_s=0.1), Fault("learner", after_step=4, delay_s=0.2)]
    outcome = train(config, transfer, faults, *TWO_LEARNERS, f"generator.weight_transfer={transfer}")
    assert outcome.killed == ["generator", "learner"]
    check(outcome, 0, two_learners)
    assert outcome.steps[NUM_STEPS - 1]["run/attempt"] == 2, "the gang restarted, and with it the sender"
    assert pulls(config, transfer) > NUM_STEPS if transfer == "direct" else pulls(config, transfer) == 0


@pytest.mark.slow
def test_learners_go_on_while_generators_pull_and_one_of_them_dies(config):
    faults = [Fault("generator", after_step=2, delay_s=0.1)]
    options = ["max_staleness=1", "generator.weight_transfer=direct", *TWO_LEARNERS[1:]]
    outcome = train(config, "overlapped", faults, *options)
    assert outcome.killed == ["generator"]
    check(outcome, 1, None)
    assert outcome.steps[0]["sampling/logprob_diff"] < 1e-4
    assert max(metrics["staleness/max"] for metrics in outcome.steps.values()) == 1
    assert outcome.steps[NUM_STEPS - 1]["run/attempt"] == 1, "no learner noticed"


def pulls(config: Path, name: str) -> int:
    """Versions that generators have pulled from learners, as these have logged it."""
    logs = (config.parent / "runs" / f"{name}-latest" / "logs").glob("learner-0*")
    return sum(" MB to the generator at " in line for log in logs for line in log.read_text().splitlines())
