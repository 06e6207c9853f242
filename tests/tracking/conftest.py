"""A real MLflow store on sqlite. It is made once, by a tracker in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from raygrpo.config import RunConfig
from raygrpo.tracking.store import MlflowRun
from raygrpo.types import Prompt, Reward, Rollout, RolloutGroup, ScoredGroup

FIRST_RUN = """
import sys
from raygrpo.config import RunConfig
from raygrpo.tracking import Tracker

config = RunConfig.model_validate_json(sys.argv[1])
tracker = Tracker(config, config.output_dir + "/first")
tracker.start()
tracker.log_step(0, {"reward/mean": 0.5})
tracker.finish(summary={"reward": 0.5})
"""

MakeConfig = Callable[..., RunConfig]


def make_config(output_dir: Path, **overrides: Any) -> RunConfig:
    """Small, with `section={...}` merged into its sections."""
    tree: dict[str, Any] = {
        "name": "testrun",
        "num_steps": 8,
        "groups_per_step": 2,
        "group_size": 4,
        "output_dir": str(output_dir),
        "model": {"path": "model"},
        "data": {"source": "data.jsonl"},
        "reward": {"functions": [{"use": "exact_match"}, {"use": "format", "weight": 0.2}]},
        "tracking": {"finish_timeout_s": 60.0, "system_metrics": False, "samples_every": 1},
    }
    for key, value in overrides.items():
        tree[key] = tree.get(key, {}) | value if isinstance(value, dict) else value
    return RunConfig.model_validate(tree)


@dataclass(frozen=True)
class FirstRun:
    output_dir: Path
    printed: str  # stdout and stderr of its process


@pytest.fixture(scope="session")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> FirstRun:
    directory = tmp_path_factory.mktemp("store")
    config = make_config(directory)
    done = subprocess.run(
        [sys.executable, "-c", FIRST_RUN, config.model_dump_json()],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return FirstRun(directory, done.stdout + done.stderr)


@pytest.fixture
def configure(first_run: FirstRun, tmp_path: Path, request: pytest.FixtureRequest) -> MakeConfig:
    """Makes a configuration of that store, with an experiment of the test's own."""

    def configured(**overrides: Any) -> RunConfig:
        store = {"uri": f"sqlite:///{first_run.output_dir / 'mlflow.db'}", "experiment": request.node.name}
        return make_config(tmp_path, tracking=store | overrides.pop("tracking", {}), **overrides)

    return configured


@pytest.fixture
def delivered_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but metrics reaches MLflow twice, as after a lost acknowledgement."""
    deliver = MlflowRun.deliver

    def deliver_twice(run: MlflowRun, item: dict[str, Any]) -> None:
        deliver(run, item)
        deliver(run, item)

    monkeypatch.setattr(MlflowRun, "deliver", deliver_twice)


def make_group(ticket: int, rewards: list[list[float]], *, error: str = "", answer: Any = "42") -> ScoredGroup:
    """A group whose completion i has the components rewards[i] (weights 1 and 0.2), i + 1 tokens, half a second more
    than the one before, and a rationale of the first component."""
    prompt = Prompt(prompt_id=100 + ticket, prompt_ids=[1] * 30, text=f"Question {ticket}?", answer=answer)
    rollouts = [
        Rollout(
            completion_ids=[7] * (i + 1),
            behaviour_logprobs=[-0.5] * (i + 1),
            finish_reason="stop",
            text=f"completion {i}",
            end_s=1001.0 + ticket + 0.5 * i,
        )
        for i in range(len(rewards))
    ]
    group = RolloutGroup(
        ticket=ticket,
        prompt=prompt,
        policy_version=3,
        rollouts=rollouts,
        generator="generator-0",
        generate_start_s=1000.0 + ticket,
        generate_end_s=1002.5 + ticket,
        error=error,
    )
    scored = [
        Reward(total=r[0] + 0.2 * r[1], components=r, rationales=[f"extracted {i}", ""]) for i, r in enumerate(rewards)
    ]
    return ScoredGroup(group=group, rewards=scored, score_start_s=1002.5 + ticket, score_end_s=1003.0 + ticket)


class Store:
    """What MLflow has, read through its public client."""

    def __init__(self, uri: str) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient(tracking_uri=uri)

    def runs(self, experiment: str) -> list[Any]:
        found = self.client.get_experiment_by_name(experiment)
        return list(self.client.search_runs([found.experiment_id])) if found else []

    def points(self, run_id: str, name: str) -> list[tuple[int, float]]:
        """(step, value) of every stored point, doubled ones twice."""
        return sorted((point.step, point.value) for point in self.client.get_metric_history(run_id, name))

    def artifacts(self, run_id: str, path: str | None = None) -> list[str]:
        return sorted(file.path for file in self.client.list_artifacts(run_id, path))

    def text(self, run_id: str, path: str, directory: Path) -> str:
        return Path(self.client.download_artifacts(run_id, path, str(directory))).read_text()
