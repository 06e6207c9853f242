"""Which nodes of a cluster a role's processes may use: label selectors, and whether the cluster has such nodes.

Ray places by `generator.label_selector`, `learner.label_selector` and `reward.label_selector`; train.py and stream.py
hand them over. Tracker and controller stay on the driver's node, whose end is the run's end anyway. Here is what Ray
does not say: that a process waits because no node that is there could ever hold it.

A node is what `ray.nodes()` lists: a dict with Alive, Labels and Resources.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raygrpo.config import RewardConfig, RunConfig

CALLS_PER_PROXY = 64  # blocks of groups that one proxy of the stream waits for at a time; beyond that, more proxies
PROXY_CPUS = 0.01  # of one that only waits
ROLE_LABEL = "raygrpo-role"  # the node label of the files in cluster/: head, learner, generator or reward
_VALUES = re.compile(r"(?P<negated>!?)(?:in\((?P<several>[^)]*)\)|(?P<one>.*))")


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """Processes of one kind: how many there are from the start, and what each needs of its node."""

    name: str
    setting: str  # how many, as a key
    selector_setting: str
    num_processes: int
    num_cpus: float
    num_gpus: float
    label_selector: Mapping[str, str]

    @property
    def needs(self) -> str:
        gpus = f" and {self.num_gpus:g} GPUs" if self.num_gpus else ""
        return f"{self.num_cpus:g} CPUs{gpus} each"


def proxies(blocks_in_flight: int, reward: RewardConfig, *, score: bool) -> tuple[int, float]:
    """How many stages of the stream wait for generators, and the CPUs of each. score: they are the scorers as well, as
    for dynamic sampling."""
    num = math.ceil(blocks_in_flight / CALLS_PER_PROXY)
    return (max(num, reward.num_workers), reward.num_cpus) if score else (num, PROXY_CPUS)


def roles(config: RunConfig) -> list[Role]:
    generator, learner, reward = config.generator, config.learner, config.reward
    return [
        Role(
            name=name,
            setting=f"{name}.{setting}",
            selector_setting=f"{name}.label_selector",
            num_processes=num_processes,
            num_cpus=section.num_cpus,
            num_gpus=num_gpus,
            label_selector=section.label_selector,
        )
        for name, section, setting, num_processes, num_gpus in (
            ("generator", generator, "num_actors", generator.num_actors, generator.num_gpus),
            ("learner", learner, "num_workers", learner.num_workers, learner.num_gpus),
            ("reward", reward, "num_workers", reward.num_workers, 0.0),
        )
    ]


def satisfies(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node with these labels may be used. As in Ray, a value is `a`, `!a`, `in(a, b)` or `!in(a, b)`, and a
    node without the label satisfies the negated ones."""
    for key, expression in selector.items():
        found = _VALUES.fullmatch(expression)
        assert found is not None
        values = found["one"] or found["several"]
        if (labels.get(key) in re.split(", ?", values)) == bool(found["negated"]):
            return False
    return True


def capacity(role: Role, nodes: Sequence[Mapping[str, Any]]) -> int:
    """How many of the role's processes the nodes could hold, had they nothing else to do."""
    return sum(_fits(role, node["Resources"]) for node in _usable(role, nodes))


def missing_nodes(config: RunConfig, nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each role whose processes these nodes cannot hold, not even with nothing else to do."""
    alive = [node for node in nodes if node["Alive"]]
    sentences = []
    for role in roles(config):
        usable, held = _usable(role, nodes), capacity(role, nodes)
        selector = f"{role.selector_setting} {dict(role.label_selector)}"
        if role.label_selector and not usable:
            labels = sorted({f"{key}={node['Labels'].get(key)}" for node in alive for key in role.label_selector})
            sentences.append(f"no node satisfies {selector}; the {len(alive)} that are there have {', '.join(labels)}")
        elif held < role.num_processes:
            sentences.append(
                f"the {len(usable)} nodes that satisfy {selector} hold {held} of {role.num_processes} {role.name} "
                f"processes ({role.setting}; {role.needs})"
            )
    return sentences


def one_machine_problems(config: RunConfig) -> list[str]:
    """What stands against a Ray that the run starts by itself on this machine: its only node has no labels."""
    return [
        f"{role.selector_setting} is {dict(role.label_selector)}, and the Ray that a run starts on one machine has no "
        f"labels: set RAY_ADDRESS to a cluster, or {role.selector_setting}=null"
        for role in roles(config)
        if role.label_selector and not os.environ.get("RAY_ADDRESS")
    ]


def _usable(role: Role, nodes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [node for node in nodes if node["Alive"] and satisfies(node["Labels"], role.label_selector)]


def _fits(role: Role, resources: Mapping[str, float]) -> int:
    """Processes of the role on a node with these resources."""
    wanted = {"CPU": role.num_cpus, "GPU": role.num_gpus}
    bounds = [int(resources.get(key, 0.0) / amount + 1e-9) for key, amount in wanted.items() if amount]
    return min(bounds, default=role.num_processes)
