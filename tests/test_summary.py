"""The end of a run, in numbers that follow from its history."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from raygrpo.summary import chart, duration, print_summary, summarise
from raygrpo.tracking import Links

LINKS = Links(
    tracking_uri="sqlite:////runs/mlflow.db",
    experiment="raygrpo",
    run_id="abc",
    run_url="http://127.0.0.1:5000/#/experiments/1/runs/abc",
    ui_command="mlflow ui --backend-store-uri sqlite:////runs/" + "long/" * 30 + "mlflow.db",
    figure="/runs/x/reward_curve.png",
    undelivered=0,
    spool="/runs/x",
)


def make_history(num_steps: int) -> dict[int, dict[str, float]]:
    return {
        step: {
            "reward/mean": step / 100,
            "prefix/tokens_encoded": 1000.0 + step,
            "prefix/tokens_repeated": 5000.0,
            "timing_s/step": 2.0,
            "timing_s/generate": 1.0,
            "timing_s/reward": 0.1,
            "timing_s/learn": 0.6,
            "timing_s/publish": 0.1,
            "timing_s/other": 0.2,
        }
        for step in range(num_steps)
    }


def printed(history: dict[int, dict[str, float]], links: Links = LINKS, **options: object) -> str:
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    print_summary(console, history, links, name="quickstart", **options)
    return console.file.getvalue()


def test_rewards_tokens_and_times_are_those_of_the_history() -> None:
    summary = summarise(make_history(40))
    assert (summary.num_first, summary.num_last) == (5, 10)
    assert summary.reward_first == pytest.approx(0.02)  # steps 0 to 4
    assert summary.reward_last == pytest.approx(0.345)  # steps 30 to 39
    assert summary.reward_best == pytest.approx(0.39)
    assert summary.tokens_encoded == 40 * 1000 + sum(range(40))
    assert summary.tokens_repeated == 200_000
    assert summary.token_ratio == pytest.approx(200_000 / 40_780)
    assert summary.step_s == pytest.approx(80.0)
    expected = {"generate": 40.0, "reward": 4.0, "learn": 24.0, "publish": 4.0, "other": 8.0}
    assert summary.stage_s == pytest.approx(expected)
    assert summary.as_dict()["reward_last"] == summary.reward_last


def test_a_short_run_compares_its_first_third_with_its_last() -> None:
    summary = summarise(make_history(6))
    assert (summary.num_first, summary.num_last) == (2, 2)
    assert (summary.reward_first, summary.reward_last) == pytest.approx((0.005, 0.045))
    assert (summarise(make_history(1)).num_first, summarise(make_history(1)).num_last) == (1, 1)


def test_a_step_without_a_reward_does_not_count() -> None:
    history = make_history(3) | {3: {"reward/mean": math.nan, "timing_s/step": math.nan}, 4: {"eval/accuracy": 1.0}}
    assert summarise(history) == summarise(make_history(3))


def test_the_chart_has_a_column_for_each_share_of_the_values() -> None:
    assert chart([0.0, 0.25, 0.5, 1.0], width=10, height=2) == ["1.00 ┤   █", "0.00 ┤ ▄██"]
    assert chart([0.0, 0.5, 0.75, 1.25], width=2, height=1) == ["0.00 ┤▂█"]  # means 0.25 and 1.0
    assert chart([-1.0, 0.0, 1.0], width=3, height=2) == [" 1.00 ┤  █", "-1.00 ┤ ██"]
    assert chart([0.0, 0.0], width=9, height=1) == ["0.00 ┤  "]
    assert {len(line) for line in chart([0.5] * 1000, width=60, height=6)} == {6 + 60}


def test_the_print_shows_the_numbers_and_whole_paths() -> None:
    text = printed(make_history(40), export_dir="/runs/x/model", seconds=200.0)
    assert "quickstart: 40 steps in 1 min 20 s (3 min 20 s with start-up)" in text
    assert "0.020 (first 5 steps)  →  0.345 (last 10 steps; best step 0.390)" in text
    flat = " ".join(text.split())
    assert "40,780 encoded by the learners; 200,000 if every completion had brought its own prompt (4.90x)" in flat
    assert "generating 40.0 1.00 50% ████████████" in flat
    assert "anything else 8.0 0.20 10%" in flat
    assert "overlap" not in text
    for place in ("/runs/x/model", LINKS.figure, LINKS.ui_command, LINKS.run_url):
        assert any(line.endswith(str(place)) for line in text.splitlines())  # on one line, to be copied


def test_overlapping_stages_faults_and_undelivered_steps_are_said() -> None:
    history = make_history(4)
    for metrics in history.values():
        metrics["timing_s/generate"] = 1.9
    history[2]["faults/reward_failed"] = 3.0
    links = Links(**{name: getattr(LINKS, name) for name in LINKS.__slots__} | {"undelivered": 7, "ui_command": None})
    text = printed(history, links)
    assert "Stages overlap" in text
    assert "faults/reward_failed was not 0 in 1 step" in text
    assert "7 steps and files are not in MLflow yet" in text
    assert "python -m raygrpo.tracking /runs/x" in text
    assert "mlflow ui" not in text


def test_a_run_that_never_trained_says_so() -> None:
    text = printed({})
    assert "No step was trained." in text
    assert LINKS.figure in text


@pytest.mark.parametrize(
    "seconds, text", [(4.25, "4.2 s"), (59.96, "60.0 s"), (192.4, "3 min 12 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_evaluations_are_shown_before_after_and_at_their_best() -> None:
    rewards = {0: 0.1, 10: 0.7, 20: 0.6}
    evaluations = {v: {"eval/held_out/reward": r, "eval/held_out/mean_length": 9.0} for v, r in rewards.items()}
    summary = summarise(make_history(20), evaluations)
    assert list(summary.evaluated) == ["eval/held_out/reward"], "of other metrics, more is not better"
    progress = summary.as_dict()["evaluated"]["eval/held_out/reward"]
    assert progress == {
        "first": 0.1, "first_version": 0, "last": 0.6, "last_version": 20, "best": 0.7, "best_version": 10,
    }  # fmt: skip
    text = printed(make_history(20), evaluations=evaluations, best_checkpoint="/runs/x/checkpoints/step-000010")
    assert "eval/held_out/reward  0.100 (after 0 steps)  →  0.600 (after 20; best 0.700 after 10)" in text
    assert "checkpoint    /runs/x/checkpoints/step-000010" in text
    assert "eval/" not in printed(make_history(20)) and "evaluating" not in printed(make_history(20))
    evaluating = {step: metrics | {"timing_s/evaluate": 0.5} for step, metrics in make_history(20).items()}
    assert summarise(evaluating).stage_s["evaluate"] == pytest.approx(10.0)
    assert "evaluating" in printed(evaluating)
