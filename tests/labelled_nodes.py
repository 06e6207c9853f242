"""A whole run on a cluster whose nodes are labelled by role, all on this machine: what test_placement.py asserts about.

The generators' node joins only after the run has said that it waits for it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ray
import yaml
from ray.cluster_utils import Cluster

import raygrpo.train
from raygrpo.check import resource_problems
from raygrpo.config_file import load_config
from raygrpo.placement import ROLE_LABEL
from raygrpo.prepare import prepare
from tests.chaos import TASK
from tests.own_cluster import DEADLINE_S, add_node
from tests.test_train import Recorder
from tests.tiny_models import tiny_model

CLASSES = {  # of actors, by what their class is called
    "Generator": "generator",
    "RayTrainWorker": "learner",
    "RewardStage": "reward",
    "RolloutStage": "rollout",
    "RolloutController": "controller",
    "Tracker": "tracker",
}


class Census(Recorder):
    """Notes where the run's actors are while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, set[str]] = {}
        self.has_warned = threading.Event()

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        super().on_step(step, metrics)
        for actor in ray._private.state.actors().values():  # type: ignore[attr-defined]
            for part, kind in CLASSES.items():
                if part in actor["ActorClassName"] and actor["State"] == "ALIVE":
                    self.places.setdefault(kind, set()).add(actor["Address"]["NodeID"])

    def on_warning(self, text: str) -> None:
        super().on_warning(text)
        if "no machine has room for" in text:
            self.has_warned.set()


def write_run(directory: Path) -> Path:
    (directory / "labelled_task.py").write_text(TASK)
    settings = {
        "num_steps": 3,
        "groups_per_step": 4,
        "group_size": 2,
        "output_dir": str(directory / "runs"),
        "model": {"path": str(tiny_model(directory / "model", max_positions=256))},
        "data": {"source": "labelled_task:rows"},
        "reward": {"functions": [{"use": "labelled_task:share"}], "label_selector": {ROLE_LABEL: "reward"}},
        "generator": {
            "engine": "transformers",
            "num_threads": 1,
            "sampling": {"max_tokens": 8},
            "label_selector": {ROLE_LABEL: "generator"},
        },
        "learner": {"num_workers": 2, "num_threads": 1, "label_selector": {ROLE_LABEL: "!in(generator, reward, head)"}},
        # Several nodes need a server; that nobody answers does not stop a run.
        "tracking": {"uri": "http://127.0.0.1:9", "finish_timeout_s": 5.0, "samples_every": 0, "system_metrics": False},
    }
    path = directory / "labelled.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def main() -> None:
    cluster = Cluster()
    cluster.add_node(wait=False, num_cpus=0, include_dashboard=False, labels={ROLE_LABEL: "head"})
    environment = {"PYTHONPATH": os.getcwd(), "DS_ACCELERATOR": "cpu", "RAY_TRAIN_V2_ENABLED": "1"}
    os.environ["RAY_ADDRESS"] = cluster.address
    ray.init(logging_level=logging.ERROR, log_to_driver=False, runtime_env={"env_vars": environment})
    nodes = {"head": ray.get_runtime_context().get_node_id()}
    try:
        for role in ("learner", "reward"):
            nodes[role] = add_node(cluster, 2, labels={ROLE_LABEL: role}).node_id
        census = Census()
        with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(1) as pool:
            config = load_config(write_run(Path(directory)))
            problems = resource_problems(config)
            training = pool.submit(raygrpo.train.train, prepare(config, directory), census)
            deadline_s = time.monotonic() + DEADLINE_S
            while not census.has_warned.wait(0.1):
                assert time.monotonic() < deadline_s
                if training.done():
                    training.result()  # raises what it died of
            nodes["generator"] = add_node(cluster, 2, labels={ROLE_LABEL: "generator"}).node_id
            result = training.result(DEADLINE_S)
        report = {
            "problems": problems,
            "problems_later": resource_problems(config),
            "warnings": census.warnings,
            "steps": sorted(result.history),
            "places": {
                kind: sorted(role for role, node in nodes.items() if node in places)
                for kind, places in census.places.items()
            },
        }
    finally:
        ray.shutdown()
        cluster.shutdown()
    Path(sys.argv[1]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
