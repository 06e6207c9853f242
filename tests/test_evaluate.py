"""A model evaluated in one process, as `raygrpo evaluate` does it."""

from __future__ import annotations

import math
import statistics

import pytest
import yaml

from raygrpo.config_file import load_config
from raygrpo.evaluate import describe, evaluate
from raygrpo.evaluation import EvaluatedSet
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


def rewards(sets: list[EvaluatedSet]) -> list[float]:
    return [reward.total for evaluated in sets for scored in evaluated.groups for reward in scored.rewards]


def texts(evaluated: EvaluatedSet) -> list[list[str]]:
    return [[rollout.text for rollout in scored.group.rollouts] for scored in evaluated.groups]


def test_without_a_section_training_prompts_are_sampled_as_in_training(directory):
    config = load_config(directory / "run.yaml")
    [result] = evaluate(config, directory, samples=3, num_threads=1)
    assert result.name == "data" and result.settings.sampling.temperature == 1.0
    assert [scored.group.prompt.answer for scored in result.groups] == list("abcdefghij")
    assert all(len(scored.rewards) == 3 for scored in result.groups)
    for scored in result.groups:
        for rollout, reward in zip(scored.group.rollouts, scored.rewards, strict=True):
            distance = sum(-abs(ord(c) - ord(scored.group.prompt.answer)) for c in rollout.text)
            assert reward.total == pytest.approx(distance / 100 / max(1, len(rollout.text)))
    totals = rewards([result])
    assert result.metrics["eval/data/reward"] == pytest.approx(statistics.mean(totals))
    assert result.metrics["eval/data/num_failed"] == 0
    means = [statistics.mean(totals[i : i + 3]) for i in range(0, 30, 3)]
    assert result.metrics["eval/data/standard_error"] == pytest.approx(statistics.pstdev(means) / math.sqrt(10))
    assert len({text for group in texts(result) for text in group}) > 25, "samples differ"
    assert rewards(evaluate(config, directory, samples=3, num_threads=1)) == totals, "the same seed samples the same"
    other = evaluate(load_config(directory / "run.yaml", ["seed=1"]), directory, samples=3, num_threads=1)
    assert rewards(other) != totals


def test_sets_are_sampled_each_in_its_own_way(directory):
    section = {
        "greedy": {"data": {"source": "evaluate_task:rows", "max_rows": 4}},
        "short": {
            "data": {"source": "evaluate_task:rows", "max_rows": 2},
            "sampling": {"temperature": 1.0, "max_tokens": 3},
            "samples": 5,
            "pass_at": [1, 5],
            "pass_reward": -0.2,
        },
        "narrow": {"data": {"source": "evaluate_task:rows", "max_rows": 2}, "sampling": {"temperature": 1, "top_k": 1}},
    }
    config = load_config(directory / "run.yaml", [f"eval.sets={section}"])
    greedy, short, narrow = evaluate(config, directory, num_threads=1)
    assert [len(s.groups) for s in (greedy, short, narrow)] == [4, 2, 2]
    assert texts(greedy)[:2] == texts(narrow), "of one token to choose from, sampling takes the most likely"
    other_seed = load_config(directory / "run.yaml", [f"eval.sets={section}", "seed=9"])
    assert texts(evaluate(other_seed, directory, num_threads=1)[0]) == texts(greedy), "greedy has no seed"
    assert all(len(r.completion_ids) <= 3 for g in short.groups for r in g.group.rollouts)
    passed = [sum(reward.total >= -0.2 for reward in scored.rewards) for scored in short.groups]
    assert short.metrics["eval/short/pass_at_1"] == pytest.approx(statistics.mean(c / 5 for c in passed))
    assert short.metrics["eval/short/pass_at_5"] == pytest.approx(statistics.mean(c > 0 for c in passed))
    description = describe(short, 1)
    assert description.startswith(f"short: mean reward {short.metrics['eval/short/reward']:.3f} (standard error")
    assert "pass@5" in description and "of 5 x 2 completions" in description and len(description.splitlines()) == 2


def test_failed_rewards_are_counted(directory):
    config = load_config(directory / "run.yaml", ["reward.functions=[{use: evaluate_task:moody}]"])
    [result] = evaluate(config, directory, samples=4, num_threads=1)
    failed = sum(len(text) % 5 == 0 for group in texts(result) for text in group)
    assert result.metrics["eval/data/num_failed"] == failed > 0
    assert len(rewards([result])) == 40
