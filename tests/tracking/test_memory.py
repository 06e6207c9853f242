"""A run may last for weeks: what its tracker holds does not grow with the steps it has delivered."""

from __future__ import annotations

import gc
import time
import tracemalloc
from pathlib import Path

from raygrpo.tracking import Tracker
from raygrpo.tracking.points import Points
from tests.tracking.conftest import MakeConfig, Store

NUM_METRICS = 80
BYTES_PER_STEP = 1000  # a step's metrics alone take ten times that


def test_the_tracker_holds_little_of_a_step_that_mlflow_has(configure: MakeConfig, tmp_path: Path) -> None:
    tracker = Tracker(configure(tracking={"figure_every": 0}), str(tmp_path / "run"))
    tracker.start(60)

    def train(steps: range) -> int:
        """Bytes that are allocated by raygrpo's own code after these steps."""
        for step in steps:
            names = [f"policy/metric_{i}" for i in range(NUM_METRICS)]  # new texts, as a message from a learner brings
            tracker.log_step(step, {"reward/mean": step / 1e3} | {name: step + 0.5 for name in names})
        deadline = time.monotonic() + 120
        while tracker.links().undelivered:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        gc.collect()
        ours = tracemalloc.Filter(True, "*/raygrpo/*"), tracemalloc.Filter(True, "*/tests/tracking/*")
        return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(ours).traces)

    tracemalloc.start()
    try:
        before, after = train(range(100)), train(range(100, 300))
    finally:
        tracemalloc.stop()
    assert (after - before) / 200 < BYTES_PER_STEP
    assert list(tracker.history(298)) == [298, 299]  # of the recent ones
    assert len(tracker.history()) == 300  # of the file
    assert tracker.history()[7]["policy/metric_79"] == 7.5
    links = tracker.finish()
    assert len(Store(links.tracking_uri).points(links.run_id, "policy/metric_79")) == 300


def test_points_know_when_each_metric_was_logged() -> None:
    points = Points()
    points.add("reward/mean", 3, 1000)
    points.add("policy/loss", 3, 1000)
    points.add("eval/reward", 3, 2000)
    assert points.time_ms("policy/loss", 3) == 1000
    assert points.time_ms("eval/reward", 3) == 2000
    assert points.time_ms("eval/reward", 2) is None
    assert points.time_ms("policy/kl", 3) is None
