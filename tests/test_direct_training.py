"""Whole trainings whose generators pull the weights from the learner: the same to the last bit as through the object
store, also when processes die."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import NUM_STEPS, Fault, Outcome, check, train, write_task

pytestmark = pytest.mark.timeout(1200)
DIRECT = "generator.weight_transfer=direct"
ZERO_3 = "learner.deepspeed.zero_optimization.stage=3"  # two learners, whose weights are gathered bucket by bucket
EXACT = ["learner.max_logprob_diff=1.0e-4"]  # the run stops in its first step where generators have other weights


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_task(tmp_path_factory.mktemp("direct"))


@pytest.fixture(scope="module")
def through_the_object_store(config) -> Outcome:
    return train(config, "object_store", (), "deterministic=true", ZERO_3, *EXACT)


def pulls(config: Path, name: str) -> int:
    """Versions that generators have pulled from learners, as these have logged it."""
    logs = (config.parent / "runs" / f"{name}-latest" / "logs").glob("learner-0*")
    return sum(" MB to the generator at " in line for log in logs for line in log.read_text().splitlines())


def test_weights_are_those_of_the_object_store_though_a_generator_and_the_sender_die(config, through_the_object_store):
    assert pulls(config, "object_store") == 0
    faults = [Fault("generator", after_step=1, delay_s=0.1), Fault("learner", after_step=4, delay_s=0.2)]
    outcome = train(config, "direct", faults, "deterministic=true", ZERO_3, DIRECT, *EXACT)
    assert outcome.killed == ["generator", "learner"]
    check(outcome, 0, through_the_object_store)
    assert outcome.steps[NUM_STEPS - 1]["run/attempt"] == 2, "the gang restarted, and with it the sender"
    assert pulls(config, "direct") > NUM_STEPS


def test_learners_go_on_while_generators_pull_and_one_of_them_dies(config):
    faults = [Fault("generator", after_step=2, delay_s=0.1)]
    outcome = train(config, "overlapped", faults, "max_staleness=1", ZERO_3, DIRECT, *EXACT)
    assert outcome.killed == ["generator"]
    check(outcome, 1, None)
    assert outcome.steps[0]["sampling/logprob_diff"] < 1e-4
    assert max(metrics["staleness/max"] for metrics in outcome.steps.values()) == 1
    assert outcome.steps[NUM_STEPS - 1]["run/attempt"] == 1, "no learner noticed"
