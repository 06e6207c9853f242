"""Ray's own autoscaler adds nodes for a pool of generators that grows, and takes them away when it shrinks.

pytest tests/cluster/test_autoscaler.py -m slow -s        prints the course of nodes and generators
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chaos import Outcome, record, train
from tests.cluster.autoscaling import View, autoscaling_cluster, observed, views
from tests.tiny_models import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

NUM_STEPS, GROUPS_PER_STEP, GROUP_SIZE = 10, 8, 4
MIN, MAX = 1, 3  # generators; the head has room for the first
LIMIT_S = 900.0

TASK = '''
import time
from pathlib import Path

SLOW = Path(__file__).with_name("slow")


def rows():
    for i in range(10):
        letter = chr(97 + i)
        yield {"prompt": f"Write the letter {letter} as often as you can. " * 3, "answer": letter}


def share(completion, answer):
    """A judge that sometimes takes its time: generators have nothing to do meanwhile."""
    while SLOW.exists():
        time.sleep(0.1)
    return sum(-abs(ord(c) - ord(answer)) for c in completion) / 100 / max(1, len(completion))
'''


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("autoscaler")
    tiny_model(directory / "model", max_positions=512)
    (directory / "letters.py").write_text(TASK)
    settings: dict[str, Any] = {
        "num_steps": NUM_STEPS,
        "groups_per_step": GROUPS_PER_STEP,
        "group_size": GROUP_SIZE,
        "deterministic": True,
        "output_dir": str(directory / "runs"),
        "model": {"path": "model"},
        "data": {"source": "letters:rows"},
        "reward": {"functions": [{"use": "letters:share", "timeout_s": LIMIT_S}]},
        "generator": {
            "engine": "transformers",
            "num_actors": MIN,
            "num_cpus": 1,  # as many as a node of cluster/fake_multinode.yaml has
            "sampling": {"max_tokens": 128},
        },
        "learner": {"num_threads": 1, "optimizer": {"lr": 1e-3}},
        "checkpoint": {"every": NUM_STEPS},
        "tracking": {"samples_every": 0, "figure_every": 0, "system_metrics": False},
    }
    path = directory / "letters.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def alone(config) -> Outcome:
    """The same run with one generator, in one process."""
    return train(config, "alone", (), "--local")


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="rg-", dir="/tmp"))  # short: Ray's sockets lie in it
    yield path
    shutil.rmtree(path, ignore_errors=True)


@dataclass
class Elastic:
    """A run on a cluster that grows, and what was seen of both."""

    said: str
    views: list[View]
    learners: set[int] = field(default_factory=set)  # pids


def run_elastic(config: Path, directory: Path, name: str, version: int) -> Elastic:
    """Train while a first load makes the pool grow, then a slow judge idles it, then the load comes back."""
    log, slow = config.parent / f"{name}.log", config.parent / "slow"
    command = [str(Path(sys.executable).parent / "raygrpo"), "train", str(config), f"name={name}"]
    command += [f"generator.max_actors={MAX}", "generator.target_groups=2", "generator.scale_down_after_s=15"]
    # Without the label, v2 takes an idle generator's node for the one that the learners' standing request is about.
    command += ["learner.label_selector={raygrpo-role: learner}"]
    with autoscaling_cluster(directory, max_workers=MAX - 1, version=version) as cluster, observed(cluster) as path:
        with open(log, "w") as stream:
            run = subprocess.Popen(command, cwd=config.parent, env=cluster.environment, stdout=stream, stderr=stream)
        elastic = Elastic("", [])

        def wait(condition: Callable[[View], bool] | None, what: str) -> None:
            """None: for the run's end."""
            deadline_s = time.monotonic() + LIMIT_S
            while True:
                ended = run.poll() is not None
                elastic.learners |= {pid for pid, line in cluster.look().items() if "RayTrainWorker" in line}
                elastic.said, elastic.views = log.read_text(), views(path)
                if ended if condition is None else elastic.views and condition(elastic.views[-1]):
                    return
                story = f"{what}\n{course(elastic.views)}\n{elastic.said[-5000:]}"
                assert not ended, f"the run ended before {story}"
                assert time.monotonic() < deadline_s, f"not seen: {story}\n{cluster.monitor_log()[-5000:]}"
                time.sleep(0.5)

        try:
            wait(lambda view: (view.nodes, view.serving) == (1, MIN), "the head with one generator")
            wait(lambda view: (view.nodes, view.serving) == (MAX, MAX), "three nodes with three generators")
            slow.touch()
            wait(lambda view: (view.nodes, view.serving) == (1, MIN), "the head alone again")
            slow.unlink()
            wait(None, "the end")
        finally:
            slow.unlink(missing_ok=True)
            if run.poll() is None:
                run.kill()
            run.wait()
    assert run.returncode == 0, elastic.said[-3000:]
    return elastic


@pytest.mark.parametrize("version", [1, 2])
def test_nodes_and_generators_come_under_load_and_go_again_and_nothing_else_changes(config, alone, directory, version):
    name = f"elastic-{version}"
    elastic = run_elastic(config, directory, name, version)
    print(course(elastic.views))
    assert max(view.nodes for view in elastic.views) == MAX
    for number in range(1, MAX):
        assert f"generator-{number} has joined, with version" in elastic.said
        assert f"generator-{number} has left" in elastic.said
    assert len(elastic.learners) == 1, "one process was the learner all along"

    run_dir = config.parent / "runs" / f"{name}-latest"
    steps = record(run_dir)
    assert sorted(steps) == list(range(NUM_STEPS))
    for step, metrics in steps.items():
        assert metrics["run/attempt"] == 1 and metrics["staleness/max"] == 0
        assert metrics["faults/generator_failures"] == metrics["faults/groups_failed"] == 0
        assert metrics["completions/num"] == GROUPS_PER_STEP * GROUP_SIZE
        assert metrics["reward/mean"] == alone.steps[step]["reward/mean"]
    assert hashlib.sha256((run_dir / "model" / "model.safetensors").read_bytes()).hexdigest() == alone.digest


def course(seen: list[View]) -> str:
    """When nodes and generators became how many."""
    lines = []
    for (nodes, serving, starting), group in groupby(
        seen, key=lambda view: (view.nodes, view.serving, len(view.versions) - view.serving)
    ):
        first = next(group)
        lines.append(
            f"{first.time_s - seen[0].time_s:6.1f} s  {nodes} nodes  {serving} generators serve  {starting} start"
        )
    return "\n".join(lines)
