"""What NodeMetrics says on a Ray of three nodes: test_nodes.py runs this as a process and asserts about what it prints.

`head` hosts what calls NodeMetrics, `work` an actor of the job, `idle` nothing.
"""

from __future__ import annotations

import json
import time
from typing import Any

import ray
from ray.cluster_utils import Cluster

from raygrpo.roles.nodes import NodeMetrics, node_names


class Caller:
    """In the tracker's place."""

    def __init__(self, machines: NodeMetrics):
        self._machines = machines

    def call(self) -> dict[str, float]:
        return self._machines()


class Worker:
    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


def wait_for(caller: Any, is_as_wanted: Any) -> dict[str, float]:
    deadline = time.monotonic() + 90
    while not is_as_wanted(metrics := ray.get(caller.call.remote())) and time.monotonic() < deadline:
        time.sleep(0.3)
    return metrics


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"head": 1}})
    for name in ("work", "idle"):
        cluster.add_node(num_cpus=1, resources={name: 1})
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    caller = ray.remote(Caller).options(num_cpus=0, resources={"head": 0.1}).remote(NodeMetrics(period_s=0.5))
    alone = ray.get(caller.call.remote())
    worker = ray.remote(Worker).options(num_cpus=0, resources={"work": 0.1}).remote()
    node = node_names()[ray.get(worker.node.remote())]
    both = wait_for(caller, lambda metrics: f"system/{node}/cpu_utilization_percentage" in metrics)
    ray.kill(worker)
    after = wait_for(caller, lambda metrics: "system/cpu_utilization_percentage" in metrics)
    print(json.dumps({"alone": alone, "both": both, "after": after, "work": node, "all": list(node_names().values())}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
