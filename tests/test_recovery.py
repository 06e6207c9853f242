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
    """With evaluations, on two generators."""
    options = ["deterministic=true", "learner.num_workers=1", "reward.num_workers=2", *EVALUATED]
    return train(config, "spread", (), *options)


def evaluations(config: Path, name: str) -> dict[int, dict[str, float]]:
    """By version, but for their seconds; what was evaluated twice must be the same."""
    found: dict[int, dict[str, float]] = {}
    for line in (config.parent / "runs" / f"{name}-latest" / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "eval/seconds" in entry["metrics"]:
            del entry["metrics"]["eval/seconds"]
            assert found.setdefault(entry["step"], entry["metrics"]) == entry["metrics"]
    return found


def test_generators_processes_and_evaluations_do_not_change_a_bit(alone, spread):
    check(spread, 0, alone)


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


def test_killed_processes_do_not_change_a_bit(config):
    """One of each role, in one run, between two learners."""
    options = ["deterministic=true"]
    reference = train(config, "undisturbed", (), *options)
    faults = [
        Fault("generator", after_step=0, delay_s=0.1),
        Fault("reward functions", after_step=2, delay_s=0.0),
        Fault("learner", after_step=4, delay_s=0.2),
    ]
    outcome = train(config, "disturbed", faults, *options)
    assert outcome.killed == [fault.kind for fault in faults]
    check(outcome, 0, reference)
    assert record(config.parent / "runs" / "disturbed-latest")[NUM_STEPS - 1]["run/attempt"] == 2, "the gang restarted"
    assert sum(metrics["faults/generator_failures"] for metrics in reference.steps.values()) == 0
