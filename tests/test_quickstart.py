"""The first thing a user runs: it learns, for every seed, and in the configurations that the README names."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def run_quickstart(directory: Path, *overrides: str) -> list[dict[str, float]]:
    """Metrics by step of a run in a process of its own, as a user starts it."""
    command = [str(Path(sys.executable).parent / "raygrpo"), "train", str(REPOSITORY / "pipelines/quickstart.yaml")]
    done = subprocess.run(
        [*command, f"output_dir={directory}", *overrides], cwd=directory, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mlflow ui" in done.stdout and "anything else" in done.stdout  # the summary
    lines = (directory / "quickstart-latest" / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line)["metrics"] for line in lines]
    return [metrics for metrics in logged if "reward/mean" in metrics]  # else an evaluation's


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=0"],
        ["seed=1"],
        ["seed=2"],
        [
            "seed=3",
            "learner.num_workers=2",
            "generator.num_actors=2",
            "max_staleness=1",
            "learner.deepspeed.zero_optimization.stage=3",
        ],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_the_quickstart_learns(tmp_path: Path, overrides: list[str]) -> None:
    history = run_quickstart(tmp_path, *overrides)
    rewards = [metrics["reward/mean"] for metrics in history]
    assert statistics.fmean(rewards[:5]) < 0.4
    assert statistics.fmean(rewards[-10:]) > 0.8
    assert max(metrics["sampling/logprob_diff"] for metrics in history) < (1e-4 if "seed=3" not in overrides else 1.0)
    assert all(metrics["prefix/token_ratio"] > 4 for metrics in history)
