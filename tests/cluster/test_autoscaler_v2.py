"""What Ray's autoscaler v2 does with the node types of the shipped files, for what run 8b asks of it.

Its scheduler decides from three things: node types, nodes as they are, and what is asked for. Here it gets the types of
a file, nodes made up from them, and the requests that a run with labels makes. No Ray is started and no cloud is asked:
how nodes come up and how Ray finds out that one is idle are not tested.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.schema import AutoscalerInstance
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint, NodeState, ResourceRequestByCount  # pyright: ignore
from ray.core.generated.common_pb2 import LabelSelectorOperator  # pyright: ignore
from ray.core.generated.instance_manager_pb2 import Instance, NodeKind  # pyright: ignore

from raygrpo.config import RunConfig
from raygrpo.placement import CALLS_PER_PROXY, PROXY_CPUS, ROLE_LABEL, Role, roles
from tests.cluster.fit import run_of
from tests.cluster.shapes import CLUSTER
from tests.cluster.test_manifests import ray_resource

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl renders the manifests")
FILES = ["aws", "gcp", pytest.param("kuberay", marks=needs_kubectl)]


def autoscaling_config(name: str) -> AutoscalingConfig:
    """Of a launcher file; of overlays/8b, as the autoscaler of a KubeRay cluster derives it."""
    if name == "kuberay":
        content = _derive_autoscaling_config_from_ray_cr(ray_resource("overlays/8b"))
    else:
        content = yaml.safe_load((CLUSTER / "launcher" / f"{name}.yaml").read_text())
    return AutoscalingConfig(content, skip_content_hash=True)


@dataclass
class Nodes:
    """Nodes that are up, made up from the types of a file, whose names are those of roles."""

    config: AutoscalingConfig
    instances: list[AutoscalerInstance] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.types = self.config.get_node_type_configs()
        self.head = self.config.get_head_node_type()

    def add(self, role: str, count: int, *, idle_s: float = 0.0, free: bool = False) -> Nodes:
        """idle_s: for how long. free: all resources can be given to something new."""
        node_type = self.types[self.head if role == "head" else role]
        for _ in range(count):
            number = len(self.instances)
            resources = {"memory": 16e9, "object_store_memory": 8e9} | node_type.resources  # Ray measures the first two
            node = NodeState(
                node_id=f"node-{number}".encode(),
                instance_id=f"cloud-{number}",
                ray_node_type_name=node_type.name,
                total_resources=resources,
                available_resources=resources if free or idle_s else {},
                labels=node_type.labels,
                idle_duration_ms=int(1000 * idle_s),
            )
            instance = Instance(
                instance_id=f"instance-{number}",
                cloud_instance_id=f"cloud-{number}",
                instance_type=node_type.name,
                status=Instance.RAY_RUNNING,
                node_id=f"node-{number}",
                node_kind=NodeKind.HEAD if role == "head" else NodeKind.WORKER,
                launch_config_hash=node_type.launch_config_hash,
            )
            self.instances.append(AutoscalerInstance(f"cloud-{number}", node, instance))
        return self

    def the_least(self) -> Nodes:
        """The head and as many others as there always are, all of them at work."""
        self.add("head", 1)
        for name, node_type in self.types.items():
            self.add(name, node_type.min_worker_nodes)
        return self


@dataclass(frozen=True)
class Decision:
    launch: Counter[str]  # node types
    terminate: Counter[str]
    infeasible: int  # requests that no node type satisfies


def request(role: Role, count: int, selector: dict[str, str] | None = None) -> ResourceRequestByCount:
    """What the processes of a role ask for: resources, and the label of their nodes."""
    resources = {name: value for name, value in (("CPU", role.num_cpus), ("GPU", role.num_gpus)) if value}
    labels = role.label_selector if selector is None else selector
    wanted = [(key, LabelSelectorOperator.LABEL_OPERATOR_IN, [value]) for key, value in labels.items()]
    made = ResourceRequestUtil.make(resources, label_selectors=[wanted] if wanted else None)
    return ResourceRequestByCount(request=made, count=count)


def decide(
    nodes: Nodes, pending: Iterable[ResourceRequestByCount] = (), held: Iterable[ResourceRequestByCount] = ()
) -> Decision:
    """pending: actors and tasks without a place. held: what Ray Train and Ray Data ask the cluster to have room for as
    long as they run, whether they use it or not (`request_resources`)."""
    held = list(held)
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=nodes.config.disable_launch_config_check(),
            node_type_configs=nodes.types,
            max_num_nodes=nodes.config.get_max_num_nodes(),
            idle_timeout_s=nodes.config.get_idle_timeout_s(),
            resource_requests=list(pending),
            cluster_resource_constraints=[ClusterResourceConstraint(resource_requests=held)] if held else [],
            current_instances=nodes.instances,
        )
    )
    assert not reply.infeasible_cluster_resource_constraints
    return Decision(
        Counter({launch.instance_type: launch.count for launch in reply.to_launch}),
        Counter(termination.instance_type for termination in reply.to_terminate),
        len(reply.infeasible_resource_requests),
    )


def run_roles(config: RunConfig | None = None) -> dict[str, Role]:
    return {role.name: role for role in roles(config or run_of("8b"))}


def stream(num_workers: int, selector: dict[str, str] | None = None) -> list[ResourceRequestByCount]:
    """The actors of the stream's two pools, which have one size from a run's beginning to its end: reward.num_workers
    that score, and those that wait for generators (stream.py)."""
    reward, config = run_roles()["reward"], run_of("8b")
    groups_in_flight = (config.max_staleness + 1) * config.groups_per_step
    waiting = replace(reward, num_cpus=PROXY_CPUS)
    return [request(reward, num_workers, selector), request(waiting, -(-groups_in_flight // CALLS_PER_PROXY), selector)]


@pytest.mark.parametrize("name", FILES)
def test_generators_that_wait_bring_generator_nodes_and_no_others(name):
    generator = run_roles()["generator"]
    nodes = Nodes(autoscaling_config(name)).the_least()
    assert decide(nodes, [request(generator, 3)]) == Decision(Counter(generator=3), Counter(), 0)
    most = run_of("8b").generator.max_actors
    assert most is not None
    room = nodes.types["generator"].max_worker_nodes - nodes.types["generator"].min_worker_nodes
    assert decide(nodes, [request(generator, most - generator.num_processes)]).launch == Counter(generator=room)
    assert decide(nodes, [request(generator, room + 5)]) == Decision(Counter(generator=room), Counter(), 5)


@pytest.mark.parametrize("name", FILES)
def test_idle_generators_go_after_the_timeout_down_to_the_least_and_nothing_else_goes(name):
    """While the gang trains and the stream runs, for which Ray Train and Ray Data ask for room as long as they run: Ray
    Train with the learners' labels, Ray Data for no more than its pools and without labels."""
    learner = run_roles()["learner"]
    held = [request(learner, learner.num_processes), *stream(run_roles()["reward"].num_processes, {})]
    timeout_s = autoscaling_config(name).get_idle_timeout_s()
    assert timeout_s == 600
    for idle_s, gone in ((timeout_s - 1, 0), (timeout_s + 1, 6)):
        nodes = Nodes(autoscaling_config(name)).the_least()
        assert nodes.types["generator"].min_worker_nodes == 4
        nodes.add("generator", 6, idle_s=idle_s)
        assert decide(nodes, held=held) == Decision(Counter(), Counter({"generator": gone} if gone else {}), 0)


@pytest.mark.parametrize("name", FILES)
def test_between_runs_the_least_stays_and_all_else_goes(name):
    nodes = Nodes(autoscaling_config(name)).add("head", 1, idle_s=3600)
    for role, count in (("learner", 1), ("generator", 16), ("reward", 4)):
        nodes.add(role, count, idle_s=3600)
    assert decide(nodes) == Decision(Counter(), Counter(generator=12, reward=3), 0)


@pytest.mark.parametrize("name", FILES)
def test_a_label_that_no_node_type_has_brings_no_node(name):
    nodes = Nodes(autoscaling_config(name)).the_least()
    mistyped = request(run_roles()["generator"], 3, {ROLE_LABEL: "generators"})
    assert decide(nodes, [mistyped]) == Decision(Counter(), Counter(), 3)


@pytest.mark.parametrize("name", FILES)
def test_a_second_reward_node_comes_when_a_run_asks_for_more_cpus_than_one_has(name):
    """As cluster/README.md says."""
    least = Nodes(autoscaling_config(name)).add("head", 1).add("learner", 1).add("reward", 1, free=True)
    least.add("generator", least.types["generator"].min_worker_nodes)
    assert run_roles()["reward"].num_processes == 8 and least.types["reward"].resources["CPU"] == 16
    for num_workers, brought in ((8, 0), (15, 0), (16, 1), (31, 1), (32, 2), (1000, 3)):
        assert decide(least, stream(num_workers)).launch == Counter({"reward": brought} if brought else {})


def test_a_held_request_without_a_label_may_keep_an_idle_generator():
    """The cluster of cluster/fake_multinode.yaml: learners without labels fit the head and an idle generator's node."""
    config = AutoscalingConfig(yaml.safe_load((CLUSTER / "fake_multinode.yaml").read_text()), skip_content_hash=True)
    learner = Role(
        name="learner", setting="", selector_setting="", num_processes=1, num_cpus=1, num_gpus=0, label_selector={}
    )
    nodes = Nodes(config).add("head", 1).add("generator", 2, idle_s=3600)
    assert decide(nodes).terminate == Counter(generator=2)
    assert decide(nodes, held=[request(learner, 1)]).terminate == Counter(generator=1)
