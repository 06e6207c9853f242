"""A model's mean reward on prompts."""

from __future__ import annotations

import math
import statistics

import pytest
import yaml

from raygrpo.config_file import load_config
from raygrpo.evaluate import evaluate
from tests.test_train import TASK
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("evaluate")
    tiny_model(directory / "model", max_positions=256)
    (directory / "evaluate_task.py").write_text(TASK)
    settings = {
        "num_steps": 1,
        "groups_per_step": 1,
        "model": {"path": "model"},
        "data": {"source": "evaluate_task:rows"},
        "reward": {"functions": [{"use": "evaluate_task:share"}], "max_error_share": 1.0},
        "generator": {"engine": "transformers", "sampling": {"max_tokens": 6}},
    }
    (directory / "run.yaml").write_text(yaml.safe_dump(settings))
    return directory


def test_every_prompt_is_sampled_as_often_as_asked_and_the_mean_is_that_of_the_rewards(directory):
    config = load_config(directory / "run.yaml")
    result = evaluate(config, directory, samples=3, num_threads=1)
    assert [scored.group.prompt.answer for scored in result.groups] == list("abcdefghij")
    assert all(len(scored.rewards) == 3 for scored in result.groups)
    for scored in result.groups:
        for rollout, reward in zip(scored.group.rollouts, scored.rewards, strict=True):
            distance = sum(-abs(ord(c) - ord(scored.group.prompt.answer)) for c in rollout.text)
            assert reward.total == pytest.approx(distance / 100 / max(1, len(rollout.text)))
    totals = [reward.total for scored in result.groups for reward in scored.rewards]
    assert result.mean == pytest.approx(statistics.mean(totals)) and result.num_failed == 0
    means = [statistics.mean(totals[i : i + 3]) for i in range(0, 30, 3)]
    assert result.standard_error == pytest.approx(statistics.pstdev(means) / math.sqrt(10))
    texts = [rollout.text for scored in result.groups for rollout in scored.group.rollouts]
    assert len(set(texts)) > 25, "samples differ"
    again = evaluate(config, directory, samples=3, num_threads=1)
    assert again.rewards == result.rewards, "the same seed samples the same"
    other = evaluate(load_config(directory / "run.yaml", ["seed=1"]), directory, samples=3, num_threads=1)
    assert other.rewards != result.rewards


def test_failed_rewards_are_counted(directory):
    config = load_config(directory / "run.yaml", ["reward.functions=[{use: evaluate_task:moody}]"])
    result = evaluate(config, directory, samples=4, num_threads=1)
    failed = sum(len(rollout.text) % 5 == 0 for scored in result.groups for rollout in scored.group.rollouts)
    assert result.num_failed == failed > 0
    assert len(result.rewards) == 40
