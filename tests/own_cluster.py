"""A Ray cluster of several nodes, all on this machine, in a process of its own: its Ray must not meet the session's."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

DEADLINE_S = 240.0  # for a node to start, and for what a test waits for on it


@contextmanager
def results_of(module: str, *, deadline_s: float) -> Iterator[Any]:
    """What `python -m module PATH` writes to PATH as JSON, run with no Ray but its own."""
    directory = tempfile.mkdtemp(prefix="rg-", dir="/tmp")  # short: Ray's sockets lie in it
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "RAY_TMPDIR": directory,
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TRAIN_V2_ENABLED": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", module, f"{directory}/results.json"],
        cwd=Path(__file__).parents[1],
        env=environment,
        stdout=subprocess.DEVNULL,  # Ray's remarks on nodes that go
        start_new_session=True,
    )
    try:
        assert process.wait(timeout=deadline_s) == 0
        yield json.loads(Path(directory, "results.json").read_text())
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(directory, ignore_errors=True)


def add_node(cluster: Cluster, num_cpus: int, **options: Any) -> Any:
    """A node that is there when this returns; Cluster itself gives it 30 s, too few on a busy machine."""
    node = cluster.add_node(wait=False, num_cpus=num_cpus, **options)
    deadline_s = time.monotonic() + DEADLINE_S
    while node.node_id not in {known["NodeID"] for known in ray.nodes() if known["Alive"]}:
        assert time.monotonic() < deadline_s, f"the node with {options} does not start"
        time.sleep(0.2)
    return node
