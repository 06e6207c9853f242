"""What of a step's rollouts MLflow shows: tables, traces, and which of them."""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from raygrpo.tracking import Tracker
from raygrpo.tracking.samples import choose_groups, sample_table, shown_groups
from raygrpo.tracking.traces import group_trace
from raygrpo.types import Reward, ScoredGroup
from tests.tracking.conftest import MakeConfig, Store, make_group

WEIGHTS = {"exact_match": 1.0, "format": 0.2}
REWARDS = [[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]
ADVANTAGES = [0.9, -0.7, -1.0, 0.8]


def test_the_table_holds_the_rollouts_that_were_sampled(
    configure: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [make_group(8, REWARDS), make_group(9, REWARDS[:2], answer={"value": 7})]
    tracker = Tracker(configure(tracking={"num_samples": 100, "num_traces": 0}), str(tmp_path / "run"))
    tracker.log_samples(4, groups, [ADVANTAGES, ADVANTAGES[:2]])
    links = tracker.finish()
    store = Store(links.tracking_uri)
    assert store.artifacts(links.run_id, "samples") == ["samples/step_000004.json"]
    table = json.loads(store.text(links.run_id, "samples/step_000004.json", tmp_path))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [(row["prompt_id"], row["sample"]) for row in rows] == [
        (108, 0),
        (108, 3),
        (108, 1),
        (108, 2),
        (109, 0),
        (109, 1),
    ]
    assert rows[2] == {
        "prompt": "Question 8?",
        "completion": "completion 1",
        "answer": "42",
        "reward": 0.2,
        "advantage": -0.7,
        "reward/exact_match": 0.0,
        "reward/format": 1.0,
        "finish_reason": "stop",
        "num_tokens": 2,
        "num_prompt_tokens": 30,
        "policy_version": 3,
        "prompt_id": 108,
        "sample": 1,
        "step": 4,
        "generator": "generator-0",
        "error": "",
    }
    assert rows[4]["answer"] == {"value": 7}
    tables = json.loads(store.client.get_run(links.run_id).data.tags["mlflow.loggedArtifacts"])
    assert tables == [{"path": "samples/step_000004.json", "type": "table"}]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", links.tracking_uri)
    frame = store.client.load_table(store.client.get_run(links.run_id).info.experiment_id, "samples/step_000004.json")
    assert list(frame["advantage"]) == pytest.approx([0.9, 0.8, -0.7, -1.0, 0.9, -0.7])  # read_json is inexact


def test_the_draw_is_uniform_without_repetition_and_follows_the_seed() -> None:
    groups = [make_group(0, REWARDS), make_group(1, REWARDS)]

    def drawn(step: int, seed: int) -> list[tuple[int, int]]:
        table = sample_table(step, groups, [ADVANTAGES] * 2, list(WEIGHTS), 3, seed)
        places = [
            (row[table["columns"].index("prompt_id")], row[table["columns"].index("sample")]) for row in table["data"]
        ]
        assert len(set(places)) == len(places) == 3
        return places

    assert drawn(5, 0) == drawn(5, 0)
    assert len({tuple(drawn(step, 0)) for step in range(20)}) > 10
    assert drawn(5, 0) != drawn(5, 1)
    counts = [
        sum(place in drawn(step, 0) for step in range(400)) for place in [(p, s) for p in (100, 101) for s in range(4)]
    ]
    assert sum(counts) == 3 * 400
    assert all(100 < count < 200 for count in counts)  # 150 each; five standard deviations are 48


def test_values_that_are_no_json_become_null_and_a_step_without_rollouts_has_no_table() -> None:
    group = make_group(0, [[float("nan"), 1.0]])
    table = sample_table(0, [group], [[float("inf")]], list(WEIGHTS), 8, 0)
    row = dict(zip(table["columns"], table["data"][0], strict=True))
    assert (row["reward"], row["advantage"], row["reward/exact_match"], row["reward/format"]) == (None, None, None, 1.0)
    assert sample_table(0, [make_group(0, [], error="engine died")], [[]], list(WEIGHTS), 8, 0) is None


def test_traces_show_the_best_the_worst_and_then_others() -> None:
    groups = [make_group(t, [[value, 0.0]]) for t, value in enumerate([0.5, 1.0, 0.0, 0.2, 0.4])]
    assert choose_groups(0, groups, 2, seed=0) == [("best", 1), ("worst", 2)]
    chosen = choose_groups(0, groups, 9, seed=0)
    assert [why for why, _ in chosen] == ["best", "worst", "random", "random", "random"]
    assert sorted(g for _, g in chosen) == [0, 1, 2, 3, 4]
    assert {tuple(choose_groups(step, groups, 3, seed=0))[2][1] for step in range(30)} == {0, 3, 4}
    groups.append(make_group(5, [], error="engine died"))
    assert choose_groups(0, groups, 2, seed=0) == [("best", 1), ("worst", 5)]
    assert choose_groups(0, groups[:1], 3, seed=0) == [("best", 0)]
    assert choose_groups(0, [], 3, seed=0) == []


@pytest.mark.parametrize("num_learners", [2, 3])
@pytest.mark.parametrize("num_samples, num_traces", [(1, 0), (3, 1), (2, 4), (100, 9)])
def test_of_what_each_learner_may_show_the_same_is_chosen_as_of_the_whole_step(
    num_learners: int, num_samples: int, num_traces: int
) -> None:
    for step in range(20):
        values = random.Random(step).choices([0.0, 0.25, 0.5, 1.0], k=12)  # with ties
        groups = [make_group(t, [[value, 0.0], [value, 1.0]]) for t, value in enumerate(values)]
        groups[step % 12] = make_group(step % 12, [], error="engine died")
        shares = [groups[rank::num_learners] for rank in range(num_learners)]
        shown = [share[g] for share in shares for g in shown_groups(step, share, num_samples, num_traces, seed=7)]
        shown.sort(key=lambda scored: scored.group.ticket)

        def chosen(of: list[ScoredGroup], step: int = step) -> tuple[Any, Any]:
            advantages = [[0.5] * len(scored.rewards) for scored in of]
            table = sample_table(step, of, advantages, list(WEIGHTS), num_samples, seed=7)
            return table, [(why, of[g].group.ticket) for why, g in choose_groups(step, of, num_traces, seed=7)]

        assert chosen(shown) == chosen(groups)
        if (num_samples, num_traces) == (3, 1):
            assert len(shown) <= num_learners * 5


def find_traces(store: Store, links) -> list:
    experiment = store.client.get_run(links.run_id).info.experiment_id
    return list(store.client.search_traces(locations=[experiment], run_id=links.run_id))


@pytest.mark.usefixtures("delivered_twice")
def test_a_trace_holds_the_group_with_its_times_tokens_and_rewards(configure: MakeConfig, tmp_path: Path) -> None:
    tracker = Tracker(configure(tracking={"num_traces": 2}), str(tmp_path / "run"))
    tracker.log_samples(4, [make_group(8, REWARDS), make_group(9, [], error="engine died")], [ADVANTAGES, []])
    links = tracker.finish()
    store = Store(links.tracking_uri)
    traces = find_traces(store, links)
    best, worst = sorted(traces, key=lambda trace: trace.info.tags["group"])
    assert (best.info.tags["mlflow.traceName"], best.info.tags["step"]) == ("step 4: best group", "4")
    assert best.info.trace_metadata["mlflow.trace.session"] == f"#108 of run {links.run_id[:8]}"
    assert (best.info.request_time, best.info.execution_duration) == (1_008_000, 3_000)
    assert json.loads(best.info.trace_metadata["mlflow.trace.tokenUsage"])["output_tokens"] == 1 + 2 + 3 + 4

    (root,) = [span for span in best.data.spans if span.parent_id is None]
    assert root.inputs == {"prompt": "Question 8?", "answer": "42"}
    totals = [1.2, 0.2, 0.0, 1.0]
    assert root.outputs["rewards"] == totals
    assert root.outputs["advantages"] == ADVANTAGES
    assert root.outputs["reward_mean"] == pytest.approx(0.6, abs=1e-6)
    assert root.outputs["reward_std"] == pytest.approx(statistics.stdev(totals), abs=1e-6)
    assert root.outputs["best_completion"] == "completion 0"
    completions = sorted((s for s in best.data.spans if s.parent_id == root.span_id), key=lambda span: span.name)
    assert [span.outputs["completion"] for span in completions] == [f"completion {i}" for i in range(4)]
    for i, span in enumerate(completions):
        assert (span.start_time_ns, span.end_time_ns) == (1_008_000_000_000, 1_009_000_000_000 + i * 500_000_000)
        assert span.get_attribute("mlflow.chat.tokenUsage")["output_tokens"] == i + 1
        assert (span.get_attribute("advantage"), span.get_attribute("mean_logprob")) == (ADVANTAGES[i], -0.5)
        scores = {s.name: s.outputs["score"] for s in best.data.spans if s.parent_id == span.span_id}
        assert scores == dict(zip(WEIGHTS, REWARDS[i], strict=True))
        (said,) = [
            s.outputs["rationale"] for s in best.data.spans if s.parent_id == span.span_id and "rationale" in s.outputs
        ]
        assert said == f"extracted {i}"
    assert len(best.data.spans) == 1 + 4 * (1 + 2)

    feedback = [a for a in best.info.assessments if a.feedback is not None]
    assert len(feedback) == 4 * 3
    for i, span in enumerate(completions):
        values = {a.name: a.feedback.value for a in feedback if a.span_id == span.span_id}
        assert values == {"exact_match": REWARDS[i][0], "format": REWARDS[i][1], "reward": totals[i]}
        said = {a.name: a.rationale for a in feedback if a.span_id == span.span_id}
        assert said["exact_match"] == f"completion {i}: extracted {i} (counts 1 x)"
        assert said["format"] == f"completion {i}: format gave {REWARDS[i][1]:g} (counts 0.2 x)"
    (expectation,) = [a for a in best.info.assessments if a.expectation is not None]
    assert (expectation.name, expectation.expectation.value) == ("answer", "42")

    assert worst.info.state == "ERROR"
    assert [span.status.description for span in worst.data.spans] == ["engine died"]


def test_a_step_trained_again_replaces_its_trace(configure: MakeConfig, tmp_path: Path) -> None:
    for rewards in (REWARDS, REWARDS[::-1]):
        tracker = Tracker(configure(tracking={"num_traces": 1}), str(tmp_path / "run"))
        tracker.log_samples(2, [make_group(4, rewards)], [ADVANTAGES])
        tracker.close(60)
    store = Store(tracker.links().tracking_uri)
    (trace,) = find_traces(store, tracker.links())
    assert trace.data.spans[0].outputs["rewards"] == [1.0, 0.0, 0.2, 1.2]
    assert sorted(a.feedback.value for a in trace.info.assessments if a.name == "reward") == [0.0, 0.2, 1.0, 1.2]


def test_a_reward_that_failed_shows_its_error(configure: MakeConfig, tmp_path: Path) -> None:
    scored = make_group(0, [[float("nan"), 1.0]])
    failed = Reward(total=0.0, components=[float("nan"), 1.0], error="exact_match took longer than 30 s")
    scored = dataclasses.replace(scored, rewards=[failed])
    item = group_trace(0, "best", scored, [0.0], WEIGHTS)
    assert item["rollouts"][0]["components"] == {"exact_match": None, "format": 1.0}
    table = sample_table(0, [scored], [[0.0]], list(WEIGHTS), 1, 0)
    row = dict(zip(table["columns"], table["data"][0], strict=True))
    assert (row["reward"], row["error"]) == (None, "exact_match took longer than 30 s")
    tracker = Tracker(configure(), str(tmp_path / "run"))
    tracker.log_samples(0, [scored], [[0.0]])
    links = tracker.finish()
    (trace,) = find_traces(Store(links.tracking_uri), links)
    for name, value in (("exact_match", None), ("format", 1.0), ("reward", None)):
        (shown,) = [a for a in trace.info.assessments if a.name == name]
        assert shown.feedback.value == value
        assert "took longer than 30 s" in f"{shown.feedback.error.error_message} {shown.feedback.error.error_code}"


def test_rewards_that_do_not_match_the_functions_are_said_at_once(
    configure: MakeConfig, tmp_path: Path, caplog
) -> None:
    tracker = Tracker(configure(), str(tmp_path / "run"))
    tracker.log_samples(0, [make_group(0, [[1.0, 0.0]]), make_group(1, [[1.0, 0.0]])], [[0.0, 0.0], [0.0]])
    assert any("the samples of step 0 cannot be shown" in message for message in caplog.messages)
    assert not list((tmp_path / "run").glob("spool/*"))
    assert tracker.close(60)


def test_samples_that_cannot_be_shown_do_not_stop_the_run(configure: MakeConfig, tmp_path: Path, caplog) -> None:
    tracker = Tracker(configure(), str(tmp_path / "run"))
    tracker.log_samples(0, [make_group(0, REWARDS)], [])  # no advantages
    tracker.log_step(0, {"reward/mean": 1.0})
    assert tracker.close(60)
    assert any("the samples of step 0 cannot be shown" in message for message in caplog.messages)
