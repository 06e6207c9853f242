"""Sweeps: which runs a command stands for, and what becomes of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from raygrpo.sweep import combinations, split_values, sweep
from tests.conftest import TINY_RUN
from tests.test_train import TASK
from tests.tiny_models import tiny_model
from tests.tracking.conftest import Store


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0,1,2", ["0", "1", "2"]),
        ("1e-5", ["1e-5"]),
        ("[1,2],[3,4]", ["[1,2]", "[3,4]"]),
        ("[1,2]", ["[1,2]"]),
        ("{a: 1, b: [2, 3]}", ["{a: 1, b: [2, 3]}"]),
        ("[{use: a},{use: b}],[{use: a}]", ["[{use: a},{use: b}]", "[{use: a}]"]),
        ('"a,b",c', ['"a,b"', "c"]),
        ("'it, too'", ["'it, too'"]),
        ("a,", ["a", ""]),
    ],
)
def test_commas_outside_brackets_and_quotes_separate_values(text: str, values: list[str]) -> None:
    assert split_values(text) == values


@given(st.lists(st.text("ab1 :", max_size=6), min_size=1))
def test_what_was_joined_by_commas_is_split_into_the_same(texts: list[str]) -> None:
    assert split_values(",".join(texts)) == texts
    listed = [f"[{text},{{{text},}}]" for text in texts]
    assert split_values(",".join(listed)) == listed


def test_every_combination_is_a_trial_and_the_last_key_varies_fastest() -> None:
    fixed, trials = combinations("run", ["seed=0,1", "num_steps=3", "learner.optimizer.lr=1e-5, 1e-4"])
    assert fixed == ["num_steps=3"]
    assert [(trial.name, trial.overrides) for trial in trials] == [
        ("run-00", ["seed=0", "learner.optimizer.lr=1e-5"]),
        ("run-01", ["seed=0", "learner.optimizer.lr=1e-4"]),
        ("run-02", ["seed=1", "learner.optimizer.lr=1e-5"]),
        ("run-03", ["seed=1", "learner.optimizer.lr=1e-4"]),
    ]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["seed=1"], "nothing is swept: give a setting several values, for example seed=0,1,2"),
        (["seed=1,,2"], "'seed=1,,2' has an empty value"),
        (["seed=1,2", "seed=3,4"], "seed is swept twice"),
        (["name=a,b"], "name cannot be swept"),
        (["num_steps=1,no"], "num_steps"),
        (["sed=1,2"], "did you mean 'seed'"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused_before_anything_starts(
    tmp_path: Path, overrides: list[str], said: str
) -> None:
    from rich.console import Console

    (tmp_path / "run.yaml").write_text(yaml.safe_dump(TINY_RUN | {"output_dir": str(tmp_path / "runs")}))
    with pytest.raises(ValueError, match=said):
        sweep(tmp_path / "run.yaml", overrides, Console())
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_are_nested_compared_and_tried_again(tmp_path: Path) -> None:
    (tmp_path / "sweep_task.py").write_text(TASK)
    settings = {
        "num_steps": 2,
        "groups_per_step": 2,
        "group_size": 4,
        "output_dir": str(tmp_path / "runs"),
        "model": {"path": str(tiny_model(tmp_path / "model", max_positions=256))},
        "data": {"source": "sweep_task:rows"},
        "reward": {"functions": [{"use": "sweep_task:share"}]},
        "generator": {"engine": "transformers", "sampling": {"max_tokens": 6}, "num_threads": 1},
        "learner": {"optimizer": {"lr": 1e-2}, "num_threads": 1},
        "tracking": {"samples_every": 0, "figure_every": 0, "system_metrics": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    functions = "reward.functions=[{use: sweep_task:share}],[{use: sweep_task:broken, name: broken}]"
    command = [sys.executable, "-m", "raygrpo", "sweep", str(tmp_path / "run.yaml"), functions, "seed=3", "--local"]
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], capture_output=True, text=True, env=environment, timeout=400)

    first = run()
    assert first.returncode == 1, first.stderr
    assert "some runs failed" in first.stderr and "run-00" in first.stdout and "finished" in first.stdout
    (sweep_dir,) = (path for path in (tmp_path / "runs").glob("run-sweep-*") if not path.is_symlink())
    plan = json.loads((sweep_dir / "sweep.json").read_text())
    assert [trial["status"] for trial in plan] == ["finished", "failed"]

    store = Store(f"sqlite:///{tmp_path}/runs/mlflow.db")
    runs = {run.info.run_name.rpartition("-2")[0]: run for run in store.runs("raygrpo")}
    parent = runs["run-sweep"]
    assert {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs.items()} == {
        "run-sweep": None,
        "run-00": parent.info.run_id,
        "run-01": parent.info.run_id,
    }
    assert (parent.info.status, runs["run-00"].info.status) == ("FAILED", "FINISHED")
    assert runs["run-00"].data.params["seed"] == "3"
    assert {"sweep.json", "sweep.png"} <= set(store.artifacts(parent.info.run_id))
    table = json.loads(store.text(parent.info.run_id, "sweep.json", tmp_path))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [(row["run"], row["status"]) for row in rows] == [("run-00", "finished"), ("run-01", "failed")]
    assert rows[0]["reward.functions"] == "[{use: sweep_task:share}]"
    last = store.points(runs["run-00"].info.run_id, "reward/mean")[-1][1]
    assert rows[0]["reward last"] == pytest.approx(last, abs=1e-4)
    assert rows[0]["s per step"] > 0 and rows[1]["reward last"] is None

    (tmp_path / "sweep_task.py").write_text(TASK.replace('raise KeyError("gold")', "return 0.5"))
    second = run("--resume")
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("run 1 of 2") == 0 and second.stdout.count("run 2 of 2") == 1
    runs = {run.info.run_name.rpartition("-2")[0]: run for run in store.runs("raygrpo")}
    assert runs["run-sweep"].info.run_id == parent.info.run_id
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert len(store.points(runs["run-00"].info.run_id, "reward/mean")) == 2
