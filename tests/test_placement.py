"""Roles run on the nodes that their label selectors name, and who waits for a node says so."""

from __future__ import annotations

from typing import Any

import pytest
from ray._private.label_utils import validate_label_selector

from raygrpo.connect import connect_to_ray
from raygrpo.placement import capacity, missing_nodes, one_machine_problems, roles, satisfies
from raygrpo.prepare import required_resources
from tests.conftest import run_config
from tests.own_cluster import results_of


def node(labels: dict[str, str] | None = None, *, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"Alive": alive, "Labels": labels or {}, "Resources": {"CPU": 4.0} | resources}


@pytest.mark.parametrize(
    ("selector", "fits"),
    [
        ({}, {"a", "b", "none"}),
        ({"role": "a"}, {"a"}),
        ({"role": "!a"}, {"b", "none"}),
        ({"role": "in(a, b)"}, {"a", "b"}),
        ({"role": "!in(a,b)"}, {"none"}),
        ({"role": "a", "zone": "x"}, set()),
    ],
)
def test_a_selector_takes_the_nodes_that_ray_would_take(selector, fits):
    """Ray's parser takes these selectors; that it places by them is what the run on labelled nodes below shows."""
    labels = {"a": {"role": "a"}, "b": {"role": "b"}, "none": {}}
    assert {name for name, of_node in labels.items() if satisfies(of_node, selector)} == fits
    assert validate_label_selector(selector) is None


def test_a_cluster_that_can_hold_every_role_lacks_nothing():
    config = run_config(
        generator={"label_selector": {"raygrpo-role": "generator"}, "num_gpus": 1, "num_actors": 2},
        learner={"label_selector": {"raygrpo-role": "learner"}, "num_gpus": 1},
    )
    nodes = [
        node(),
        node({"raygrpo-role": "learner"}, GPU=1),
        node({"raygrpo-role": "generator"}, GPU=2),
    ]
    assert missing_nodes(config, nodes) == []


def test_a_role_without_a_node_is_named_with_its_selector_and_what_is_there():
    config = run_config(learner={"label_selector": {"raygrpo-role": "lerner"}})
    [sentence] = missing_nodes(config, [node({"raygrpo-role": "learner"}), node(), node({"a": "b"}, alive=False)])
    assert sentence == (
        "no node satisfies learner.label_selector {'raygrpo-role': 'lerner'}; "
        "the 2 that are there have raygrpo-role=None, raygrpo-role=learner"
    )


def test_nodes_that_hold_too_few_of_a_role_are_counted_by_what_each_process_needs():
    config = run_config(groups_per_step=4, learner={"num_workers": 4, "num_gpus": 1, "label_selector": {"x": "y"}})
    nodes = [node({"x": "y"}, GPU=2), node({"x": "y"}), node({"x": "y"}, alive=False, GPU=8), node(GPU=8)]
    [sentence] = missing_nodes(config, nodes)
    assert sentence == (
        "the 2 nodes that satisfy learner.label_selector {'x': 'y'} hold 2 of 4 learner processes "
        "(learner.num_workers; 0.5 CPUs and 1 GPUs each)"
    )
    learner = next(role for role in roles(config) if role.name == "learner")
    assert capacity(learner, [node({"x": "y"}, CPU=1.0, GPU=8)]) == 2, "0.5 CPUs each: two on one CPU"


def test_a_run_with_selectors_does_not_start_a_ray_without_labels(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = run_config(reward={"label_selector": {"raygrpo-role": "reward"}})
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with (
        pytest.raises(ValueError, match=r"reward.label_selector is .*: set RAY_ADDRESS to a cluster, or"),
        connect_to_ray(config, verbose=False),
    ):
        raise AssertionError("connected")
    assert one_machine_problems(run_config(reward={"label_selector": None})) == []
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert one_machine_problems(config) == []


@pytest.mark.parametrize(
    "selector", [{"a b": "c"}, {"a": "in()"}, {"a": "x y"}, {"a": "!!b"}, {"a": "in(b"}, {"a": ""}, {"a": 1}]
)
def test_a_selector_that_ray_would_not_read_is_refused(selector):
    with pytest.raises(ValueError, match="label"):
        run_config(generator={"label_selector": selector})


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_on_labelled_nodes_waits_loudly_and_places_every_role():
    with results_of("tests.labelled_nodes", deadline_s=500) as run:
        assert run["steps"] == [0, 1, 2]
        assert run["places"] == {
            "generator": ["generator"],
            "learner": ["learner"],
            "reward": ["reward"],
            "rollout": ["reward"],
            "controller": ["head"],
            "tracker": ["head"],
        }
        lacking = "no node satisfies generator.label_selector {'raygrpo-role': 'generator'}; the 3 that are there have"
        assert [problem for problem in run["problems"] if problem.startswith(lacking)] == run["problems"]
        assert any("no machine has room for" in text and lacking in text for text in run["warnings"])
        assert run["problems_later"] == []


@pytest.mark.parametrize(("address", "refused"), [(None, True), ("10.0.0.1:6379", False)])
def test_gpus_that_never_come_are_refused_where_ray_is_the_runs_own(address, refused, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 1.0})
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr("raygrpo.connect._start_ray", lambda options: "dashboard")
    monkeypatch.setenv("RAY_ADDRESS", address) if address else monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with connect_to_ray(run_config(learner={"num_gpus": 0.5}, generator={"num_gpus": 0.5}), verbose=False) as there:
        assert there == "dashboard"
    config = run_config(learner={"num_gpus": 1}, generator={"num_gpus": 1})
    if refused:
        with (
            pytest.raises(ValueError, match=r"asks for 2 GPUs .*, and this machine has 1: set RAY_ADDRESS"),
            connect_to_ray(config, verbose=False),
        ):
            raise AssertionError("connected")
    else:
        with connect_to_ray(config, verbose=False) as there:
            assert there == "dashboard"


@pytest.mark.parametrize(
    ("num_workers", "dynamic_sampling", "groups_per_block", "scorers", "proxies"),
    [(3, 0, 1, 3, 2), (3, 0, 2, 3, 1), (3, 4, 1, 3, 0), (1, 4, 1, 2, 0), (1, 4, 2, 1, 0)],
)
def test_what_a_run_reserves_counts_every_actor(num_workers, dynamic_sampling, groups_per_block, scorers, proxies):
    """Without blocks, 128 groups in flight are 2 proxies, which score as well with dynamic sampling."""
    config = run_config(
        groups_per_step=64,
        max_staleness=1,
        groups_per_block=groups_per_block,
        reward={"num_workers": num_workers, "num_cpus": 0.5},
        generator={"num_actors": 2, "num_cpus": 3.0},
        learner={"num_workers": 4, "num_cpus": 2.0},
        algorithm={"dynamic_sampling": dynamic_sampling},
    )
    expected = 2 * 3.0 + 4 * 2.0 + scorers * 0.5 + proxies * 0.01
    assert required_resources(config).num_cpus == pytest.approx(expected)
