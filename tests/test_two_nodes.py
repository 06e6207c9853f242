"""The stream with generators on one node and learners on another, and what becomes of it when a node goes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.own_cluster import results_of
from tests.two_nodes import BLOCK, GROUPS_PER_STEP

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
DEADLINE_S = 800


@pytest.fixture(scope="module")
def streams() -> Iterator[dict[str, Any]]:
    with results_of("tests.two_nodes", deadline_s=DEADLINE_S) as results:
        yield results


def check(streamed: dict[str, Any], max_staleness: int) -> None:
    """Every ticket once, in order, dealt round robin in blocks, sampled within the bound."""
    num_learners = streamed["num_learners"]
    for step, shares in enumerate(streamed["steps"]):
        first, end = step * GROUPS_PER_STEP, (step + 1) * GROUPS_PER_STEP
        for rank, share in enumerate(shares):
            starts = range(first + rank * BLOCK, end, num_learners * BLOCK)
            assert [ticket for ticket, *_ in share] == [start + i for start in starts for i in range(BLOCK)]
            assert all(step - max_staleness <= version <= step for _, version, _, _ in share)
            assert not any(error for *_, error in share)
    assert all(streamed["at_the_end"])


@pytest.mark.parametrize(("name", "max_staleness"), [("on_policy", 0), ("stale", 1)])
def test_two_learners_on_another_node_than_the_generators_get_every_ticket_in_order(streams, name, max_staleness):
    """With Ray Train's default, a stream split by locality, this stands still."""
    streamed = streams[name]
    check(streamed, max_staleness)
    generator_nodes = {node for shares in streamed["steps"] for share in shares for _, _, node, _ in share}
    assert len(generator_nodes) == 1
    assert not generator_nodes & set(streamed["consumer_nodes"])
    staleness = {
        step - version for step, shares in enumerate(streamed["steps"]) for share in shares for _, version, *_ in share
    }
    assert staleness == set(range(max_staleness + 1))


def test_a_node_with_generators_and_data_workers_may_go_during_a_segment(streams):
    streamed = streams["removal"]
    check(streamed, max_staleness=1)
    nodes = [{node for share in shares for _, _, node, _ in share} for shares in streamed["steps"]]
    assert nodes[0] == {streamed["removed"]}
    spare = nodes[-1]
    assert spare and streamed["removed"] not in spare
    assert nodes[2] & spare, "blocks that were ready and lay in the node's object store are sampled anew"
    assert all(later == spare for later in nodes[3:]), "so are groups that were under way"
    assert any("is back, with version" in warning for warning in streamed["warnings"])
