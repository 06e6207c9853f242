"""What the machines of a run are doing: CPU, memory, disk and GPUs of each node that hosts one of its actors.

Owns a thread in the tracker's process, which looks for those nodes every PERIOD_S and has a small actor on each of the
others say what tracking/machine.py measures there. A run on one node has no such actor.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from raygrpo.tracking.machine import MachineMetrics, of_node
from raygrpo.types import StepMetrics

logger = logging.getLogger(__name__)

PERIOD_S = 10.0
ANSWER_TIMEOUT_S = 5.0


class Sampler:
    """On another node."""

    def __init__(self) -> None:
        self._machine = MachineMetrics()

    def sample(self) -> StepMetrics:
        return self._machine()


class NodeMetrics:
    """Called by the tracker at each step, in whose process its thread starts with the first call.

    On one node, values of this moment; on several, the last ones that each node gave.
    """

    def __init__(self, period_s: float = PERIOD_S):
        self._period_s = period_s
        self._own = MachineMetrics()
        self._samplers: dict[str, Any] = {}  # node id -> actor
        self._others: dict[str, StepMetrics] = {}  # name of a node -> what it said last
        self._own_name = ""
        self._thread: threading.Thread | None = None

    def __call__(self) -> StepMetrics:
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="nodes", daemon=True)
            self._thread.start()
        own, others = self._own(), self._others
        if not others:
            return own
        return of_node(own, self._own_name) | {
            name: value for node, metrics in others.items() for name, value in of_node(metrics, node).items()
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return NodeMetrics, (self._period_s,)  # a copy in another process begins anew

    def _watch(self) -> None:
        pause = threading.Event()
        while True:
            try:
                self._look()
            except Exception as error:  # the run is worth more than knowing how busy its machines are
                logger.warning("the machines of the run cannot be looked at: %s", error)
            pause.wait(self._period_s)

    def _look(self) -> None:
        import ray
        import ray.exceptions
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        own = ray.get_runtime_context().get_node_id()
        names = node_names()
        wanted = names.keys() & hosting_nodes() - {own}
        for node in self._samplers.keys() - wanted:
            ray.kill(self._samplers.pop(node))
        for node in wanted - self._samplers.keys():
            place = NodeAffinitySchedulingStrategy(node, soft=False)
            self._samplers[node] = ray.remote(Sampler).options(num_cpus=0, scheduling_strategy=place).remote()
        answers = {sampler.sample.remote(): node for node, sampler in self._samplers.items()}
        ready, _ = ray.wait(list(answers), num_returns=len(answers), timeout=ANSWER_TIMEOUT_S) if answers else ([], [])
        said: dict[str, StepMetrics] = {}
        for answer in ready:
            node = answers[answer]
            try:
                said[names[node]] = ray.get(answer)
            except ray.exceptions.RayError:  # its node is going; the next look makes another where there is need
                del self._samplers[node]
        self._own_name, self._others = names[own], said


def node_names() -> dict[str, str]:
    """Node id -> a name for metrics, of the nodes that are alive: several may share a host."""
    import ray

    return {n["NodeID"]: f"{n['NodeManagerHostname']}-{n['NodeID'][:6]}" for n in ray.nodes() if n["Alive"]}


def hosting_nodes() -> set[str]:
    """Ids of the nodes with an actor of this job, samplers apart."""
    import ray
    from ray._private import state  # the state API asks the dashboard, which an embedded Ray does not have

    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    actors = state.actors(job_id=job, actor_state_name="ALIVE").values()
    return {actor["Address"]["NodeID"] for actor in actors if not actor["ActorClassName"].endswith(Sampler.__name__)}
