"""Whether nodes of given sizes hold a run of cluster/runs, by raygrpo's own account of what it needs."""

from __future__ import annotations

from dataclasses import dataclass

from raygrpo.config import RunConfig
from raygrpo.config_file import load_config
from raygrpo.placement import ROLE_LABEL, Role, capacity, missing_nodes, roles
from raygrpo.sizing import GIB, ModelSize, RoleMemory, memory, object_store_bytes
from tests.cluster.shapes import CLUSTER, PROMPT_TOKENS, SHAPES

OBJECT_STORE_SHARE = 0.3  # of a node's memory: Ray's default


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """Of one type."""

    labels: dict[str, str]
    num_cpus: float
    num_gpus: float
    host_bytes: float
    gpu_bytes: float
    least: int
    most: int

    def as_ray_lists_them(self, count: int) -> list[dict]:
        resources = {"CPU": self.num_cpus, "GPU": self.num_gpus}
        return [{"Alive": True, "Labels": self.labels, "Resources": resources}] * count


def run_of(size: str) -> RunConfig:
    return load_config(CLUSTER / "runs" / f"{size}.yaml")


def check_fit(size: str, types: dict[str, Nodes]) -> None:
    """types: by role."""
    config = run_of(size)
    shape = ModelSize.of(SHAPES[size])
    from_the_start = [node for nodes in types.values() for node in nodes.as_ray_lists_them(nodes.least)]
    assert missing_nodes(config, from_the_start) == []
    for role, nodes in types.items():
        assert nodes.labels[ROLE_LABEL] == role
        if role == "head":
            assert nodes.num_cpus == 0, "nothing but the driver's own actors runs there"
    needs = {need.role: need for need in memory(config, shape, PROMPT_TOKENS)}
    for role in roles(config):
        assert dict(role.label_selector) == {ROLE_LABEL: role.name}
        check_memory(role, needs[role.name], types[role.name], object_store_bytes(config, shape))
    [generator] = [role for role in roles(config) if role.name == "generator"]
    most = types["generator"].as_ray_lists_them(types["generator"].most)
    assert capacity(generator, most) == config.generator.max_actors, "neither idle nor in want"
    assert types["learner"].least == types["learner"].most, "the gang is fixed"


def check_memory(role: Role, need: RoleMemory, nodes: Nodes, store_bytes: float) -> None:
    on_a_node = capacity(role, nodes.as_ray_lists_them(1))
    processes = min(on_a_node, role.num_processes)
    if role.num_gpus:
        assert need.gpu_share < 0.9 * nodes.gpu_bytes, f"a {role.name} needs {need.gpu_share / GIB:.1f} GiB of a GPU"
        assert store_bytes < OBJECT_STORE_SHARE * nodes.host_bytes, f"two versions are {store_bytes / GIB:.0f} GiB"
    else:
        store_bytes = 0
    host = processes * need.host_peak + store_bytes
    assert host < nodes.host_bytes, f"a {role.name} node needs {host / GIB:.0f} GiB"
