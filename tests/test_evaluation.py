"""What an evaluation asks, and what its figures say; and the settings that describe it."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from raygrpo.check import batch_algebra
from raygrpo.config import RunConfig
from raygrpo.config_file import load_config
from raygrpo.data import DataReport, PromptSet, sample_seed
from raygrpo.data.prompts import PROMPT_SET_SCHEMA
from raygrpo.evaluation import (
    EvaluatedSet,
    Evaluation,
    EvaluationSet,
    evaluation_metrics,
    findings,
    make_scorers,
    pass_at_k,
)
from raygrpo.prepare import prepare, required_resources
from raygrpo.tracking.samples import evaluation_table
from raygrpo.types import Prompt, Reward, Rollout, RolloutGroup, ScoredGroup
from tests.conftest import run_config
from tests.tiny_models import tiny_model


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_draws_of_k_that_hold_a_completion_that_passes(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([i < c for i in range(n)], k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_is_unbiased_where_the_plug_in_estimate_is_not():
    n, k, p = 5, 3, 0.3
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]  # of c passing, each with chance p
    truth = 1 - (1 - p) ** k
    assert sum(w * pass_at_k(n, c, k) for c, w in enumerate(weights)) == pytest.approx(truth)
    assert sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(weights)) < truth - 0.02


@pytest.mark.parametrize(("n", "c", "k"), [(4, 0, 5), (4, 5, 1), (4, -1, 1), (4, 2, 0)])
def test_pass_at_k_of_what_there_is_not_is_refused(n, c, k):
    with pytest.raises(ValueError, match=f"pass@{k} cannot be estimated from {c} of {n} completions"):
        pass_at_k(n, c, k)


def prompt_set(name: str, num: int) -> PromptSet:
    rows = [
        {"prompt_id": 10 + i, "prompt_ids": [i + 1], "text": f"{name} {i}", "answer": json.dumps("yes"), "row": "{}"}
        for i in range(num)
    ]
    report = DataReport(source=name, num_rows=num, dropped={}, examples=[], columns_left_out={})
    return PromptSet(pa.Table.from_pylist(rows, PROMPT_SET_SCHEMA), report, shuffle=True)


def evaluation(seed: int = 0, **settings: Any) -> Evaluation:
    """Two prompts of one set and three of another."""
    sampled = {"data": {"source": "b.jsonl"}, "samples": 4, "pass_at": [1, 4], "sampling": {"temperature": 0.7}}
    config = run_config(seed=seed, eval={"sets": {"a": {"data": {"source": "a.jsonl"}}, "b": sampled | settings}})
    assert config.eval is not None
    sets = [
        EvaluationSet(name=name, settings=settings, prompts=prompt_set(name, num))
        for (name, settings), num in zip(config.eval.sets.items(), (2, 3), strict=True)
    ]
    return Evaluation(sets=sets, seed=seed)


def test_rows_go_through_the_sets_in_order_each_with_its_own_sampling():
    requests = [evaluation().request(row) for row in range(len(evaluation()))]
    assert [request.prompt.text for request in requests] == ["a 0", "a 1", "b 0", "b 1", "b 2"]
    assert [request.ticket for request in requests] == list(range(5))
    assert [len(request.seeds) for request in requests] == [1, 1, 4, 4, 4]
    assert [request.sampling.temperature for request in requests if request.sampling] == [0, 0, 0.7, 0.7, 0.7]


def test_seeds_are_all_different_and_a_function_of_run_set_prompt_and_sample():
    def seeds(seed: int) -> list[int]:
        return [s for row in range(5) for s in evaluation(seed).request(row).seeds]

    assert len(set(seeds(0))) == 14 and seeds(0) == seeds(0)
    assert not set(seeds(0)) & set(seeds(1))
    assert not set(seeds(0)) & {sample_seed(0, ticket, i) for ticket in range(100) for i in range(8)}
    more = evaluation(samples=6)
    assert more.request(3).seeds[:4] == evaluation().request(3).seeds, "more samples leave the others as they are"


def group(totals: list[float | None], *, clipped: int = 0, version: int = 7) -> ScoredGroup:
    """A prompt's completions with these rewards (None: it failed); as many tokens long as their place + 1."""
    rollouts = [
        Rollout(
            completion_ids=[5] * (i + 1),
            behaviour_logprobs=[-1.0] * (i + 1),
            finish_reason="length" if i < clipped else "stop",
            text=f"completion {i}",
            end_s=1.0,
        )
        for i in range(len(totals))
    ]
    failed = Reward(total=0.0, components=[math.nan], error="x")
    rewards = [failed if total is None else Reward(total=total, components=[total]) for total in totals]
    rolled = RolloutGroup(
        ticket=0,
        prompt=Prompt(prompt_id=3, prompt_ids=[1], text="?", answer="yes"),
        policy_version=version,
        rollouts=rollouts,
        generator="g",
        generate_start_s=0.0,
        generate_end_s=1.0,
        error="" if totals else "too long",
    )
    return ScoredGroup(group=rolled, rewards=rewards, score_start_s=0.0, score_end_s=0.0)


def test_metrics_count_what_failed_as_zero_and_as_not_passed():
    settings = evaluation(pass_at=[1, 2, 4], pass_reward=0.5).sets[1].settings
    groups = [group([1.0, 0.5, 0.4, None], clipped=1), group([0.0, 0.0, 0.0, 0.0], clipped=2), group([])]
    metrics = evaluation_metrics("b", settings, groups)
    means = [1.9 / 4, 0.0, 0.0]
    assert metrics == {
        "eval/b/reward": pytest.approx(statistics.fmean(means)),
        "eval/b/standard_error": pytest.approx(statistics.pstdev(means) / math.sqrt(3)),
        "eval/b/pass_at_1": pytest.approx(0.5 / 3),
        "eval/b/pass_at_2": pytest.approx((1 - 1 / 6) / 3),
        "eval/b/pass_at_4": pytest.approx(1 / 3),
        "eval/b/mean_length": 2.5,
        "eval/b/clipped_ratio": 3 / 8,
        "eval/b/num_failed": 5.0,
    }


def test_only_the_first_prompts_stand_in_the_table_with_all_their_completions():
    part = evaluation().sets[1]
    evaluated = EvaluatedSet(name="b", settings=part.settings, groups=[group([1.0, 0.0, None, 0.5])] * 3)
    metrics, shown = findings([evaluated], 2.5, 2)
    assert metrics["eval/seconds"] == 2.5 and len(shown["b"]) == 2
    table = evaluation_table(20, "b", shown["b"], ["correct"])
    assert table is not None and table["artifact_file"] == "eval/b/step_000020.json"
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert len(rows) == 8
    assert rows[3] == {
        "prompt": "?", "completion": "completion 3", "answer": "yes", "reward": 0.5, "reward/correct": 0.5,
        "finish_reason": "stop", "num_tokens": 4, "num_prompt_tokens": 1, "policy_version": 7, "prompt_id": 3,
        "sample": 3, "generator": "g", "error": "",
    }  # fmt: skip
    assert rows[2]["reward"] is None and rows[2]["error"] == "x"
    assert evaluation_table(20, "b", [group([])], ["correct"]) is None


# Settings.


def test_a_single_set_may_stand_in_the_section_itself():
    config = run_config(eval={"every": 3, "data": {"source": "x.jsonl"}, "samples": 2, "sampling": {"temperature": 1}})
    assert config.eval is not None and list(config.eval.sets) == ["held_out"]
    assert config.eval.sets["held_out"].samples == 2 and config.eval.every == 3
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


def test_defaults_are_greedy_and_as_long_as_training():
    config = run_config(eval={"data": {"source": "x.jsonl"}}, generator={"sampling": {"max_tokens": 77, "top_p": 0.9}})
    assert config.eval is not None
    settings = config.eval.sets["held_out"]
    assert (settings.sampling.temperature, settings.sampling.max_tokens, settings.sampling.top_p) == (0, 77, 1)
    longer = run_config(eval={"data": {"source": "x.jsonl"}, "sampling": {"max_tokens": 99}})
    assert longer.eval is not None and longer.eval.sets["held_out"].sampling.max_tokens == 99


@pytest.mark.parametrize(
    ("settings", "versions"),
    [
        ({"every": 4}, [0, 4, 8, 10]),
        ({"every": 4, "at_start": False}, [4, 8, 10]),
        ({"every": 5}, [0, 5, 10]),
        ({"every": 0}, []),
        ({"every": 100}, [0, 10]),
    ],
)
def test_policies_are_evaluated_at_the_start_every_so_many_steps_and_at_the_end(settings, versions):
    config = run_config(num_steps=10, eval={"data": {"source": "x.jsonl"}} | settings)
    assert config.eval is not None
    assert [version for version in range(11) if config.eval.due(version, 10)] == versions
    assert config.evaluates == bool(versions)


DATA = {"data": {"source": "x.jsonl"}}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"eval": {**DATA, "samples": 4}}, "4 samples at temperature 0 gives the same completion 4 times"),
        ({"eval": {**DATA, "pass_at": [8]}}, "pass_at 8 needs as many samples of each prompt: samples is 1"),
        ({"eval": {**DATA, "sampling": {"top_p": 0.9}}}, "top_p=0.9 but temperature 0"),
        ({"eval": {**DATA, "sets": {"a": DATA}}}, "eval.data describes a single set, and eval.sets names several"),
        (
            {"eval": {**DATA, "functions": [{"use": "exact_match"}, {"use": "exact_match"}]}},
            "two reward functions share a name",
        ),
        ({"eval": {"every": 3}}, "sets\n  Field required"),
        ({"eval": {"sets": {"a/b": DATA}}}, "should match pattern"),
        ({"checkpoint": {"best_by": "eval/held_out/reward"}}, "no metric that ranks checkpoints; known here: reward"),
        ({"checkpoint": {"best_by": "eval/held_out/pass_at_2"}, "eval": DATA}, "known here: .*eval/held_out/pass_at_1"),
        (
            {"checkpoint": {"best_by": "eval/held_out/reward", "every": 25}, "eval": DATA},
            r"every 25 steps \(checkpoint.every\) are not all evaluated by one evaluation in 10 steps",
        ),
        (
            {"checkpoint": {"best_by": "eval/held_out/reward"}, "eval": {**DATA, "every": 0}},
            "one evaluation in 0 steps",
        ),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        run_config(**overrides)


@pytest.fixture
def load(tmp_path):
    """load(eval section, *overrides): as a run's YAML is read, beside a tiny model and data."""
    tiny_model(tmp_path / "model", max_positions=256)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "abc", "answer": "x"}\n')
    (tmp_path / "other.jsonl").write_text('{"prompt": "abcdefgh", "answer": "x"}\n{"prompt": "ab", "answer": "y"}\n')

    def load(section: dict[str, Any], *overrides: str) -> RunConfig:
        settings = {
            "num_steps": 10,
            "groups_per_step": 1,
            "model": {"path": "model"},
            "data": {"source": "rows.jsonl"},
            "reward": {"functions": [{"use": "exact_match"}]},
            "generator": {"engine": "transformers", "sampling": {"max_tokens": 6}},
            "eval": section,
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
        return load_config(tmp_path / "run.yaml", list(overrides))

    return load


def test_sources_are_found_beside_the_yaml_and_unknown_keys_name_the_nearest(load, tmp_path):
    for section, key in (
        ({"data": {"source": "other.jsonl"}}, "eval"),
        ({"sets": {"s": {"data": {"source": "other.jsonl"}}}}, "eval.sets.s"),
    ):
        [part] = load(section).eval.sets.values()
        assert part.data.source == str(tmp_path / "other.jsonl")
        [part] = load(section, f"{key}.data.max_rows=1").eval.sets.values()
        assert part.data.max_rows == 1
    with pytest.raises(ValueError, match=r"unknown key 'eval.sets.s.data.promt': did you mean 'prompt'"):
        load({"sets": {"s": {"data": {"source": "other.jsonl", "promt": "x"}}}})
    with pytest.raises(ValueError, match=r"unknown key 'eval.evry': did you mean 'every'"):
        load({"data": {"source": "other.jsonl"}, "evry": 3})


def test_generators_hold_the_longest_prompt_and_completion_of_an_evaluation(load, tmp_path):
    plain = prepare(load({"data": {"source": "rows.jsonl"}}), tmp_path)
    assert plain.max_model_len == 3 + 6
    prepared = prepare(load({"data": {"source": "other.jsonl"}, "sampling": {"max_tokens": 20}}), tmp_path)
    assert prepared.max_model_len == 8 + 20
    assert prepared.evaluation is not None and prepared.evaluation.sizes == [2]
    with pytest.raises(ValueError, match=r"eval.sets.held_out.sampling.max_tokens \(256\) leaves no room"):
        prepare(load({"data": {"source": "other.jsonl"}, "sampling": {"max_tokens": 256}}), tmp_path)
    with pytest.raises(ValueError, match=r"eval.sets.held_out: bad rows in the data(.|\n)*at most 4 are accepted"):
        prepare(load({"data": {"source": "other.jsonl", "max_prompt_tokens": 4}}), tmp_path)
    with pytest.raises(ValueError, match="no_such"):
        prepare(load({"data": {"source": "rows.jsonl"}, "functions": [{"use": "no_such:function"}]}), tmp_path)


def test_what_an_evaluation_takes_is_shown_and_reserved(load, tmp_path):
    section = {"every": 4, "data": {"source": "other.jsonl"}, "samples": 3, "sampling": {"temperature": 0.5}}
    config = load(section)
    rows = {name.strip(): (value, why) for name, value, why in batch_algebra(prepare(config, tmp_path))}
    assert rows["evaluations"] == ("4", "at the start, every 4 steps and at the end")
    assert rows["completions of held_out"] == ("6", "each time: 2 prompts x 3, temperature 0.5, up to 6 tokens")
    without = load(section | {"every": 0})
    assert "evaluations" not in {name for name, _, _ in batch_algebra(prepare(without, tmp_path))}
    difference = required_resources(config).num_cpus - required_resources(without).num_cpus
    assert difference == pytest.approx(config.reward.num_cpus)


def test_sets_score_with_their_own_functions_or_share_those_of_the_run():
    own = {"data": {"source": "c.jsonl"}, "functions": [{"use": "format", "args": {"pattern": "x"}}]}
    config = run_config(eval={"sets": {"a": DATA, "b": DATA, "c": own}})
    made: list[Any] = []

    def make(reward: Any) -> Any:
        made.append([function.use for function in reward.functions])
        return Path(str(len(made)))

    scorers: dict[str, Any] = make_scorers(config, make)
    assert made == [["exact_match"], ["format"]]
    assert scorers["a"] is scorers["b"] and scorers["c"] is not scorers["a"]
