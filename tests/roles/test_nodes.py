"""System metrics of every node that hosts a part of the run."""

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
from pathlib import Path

import pytest

from raygrpo.roles.nodes import NodeMetrics, hosting_nodes

NAMES = {
    "cpu_utilization_percentage",
    "system_memory_usage_megabytes",
    "system_memory_usage_percentage",
    "disk_usage_percentage",
}


def test_on_one_node_there_is_no_sampler(ray_session) -> None:
    machines = NodeMetrics(period_s=0.05)
    machines()
    time.sleep(0.5)  # the thread has looked
    assert {f"system/{name}" for name in NAMES} <= set(machines())
    assert not any(name.count("/") > 1 for name in machines())
    assert hosting_nodes() <= {ray_session.get_runtime_context().get_node_id()}
    assert machines._samplers == {}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_on_several_nodes_each_that_hosts_an_actor_has_metrics_of_its_own() -> None:
    directory = tempfile.mkdtemp(prefix="rg-", dir="/tmp")  # short: Ray's sockets lie in it
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_TMPDIR": directory, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.roles.nodes_on_a_cluster"],
        cwd=Path(__file__).parents[2],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=350)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(directory, ignore_errors=True)
    assert process.returncode == 0
    said = json.loads(printed.splitlines()[-1])
    assert set(said["alone"]) >= {f"system/{name}" for name in NAMES}
    nodes = {name.split("/")[1] for name in said["both"]}
    assert len(nodes) == 2 and said["work"] in nodes and nodes < set(said["all"])
    assert {f"system/{node}/{name}" for node in nodes for name in NAMES} <= set(said["both"])
    assert not any(name.count("/") > 1 for name in said["after"]), "the sampler keeps no node in the run"
