"""The benchmark of the pipeline runs what it says: every ticket goes through the real controller and stream once, in
order (its learner asserts that), and CPU time is booked on the process that spent it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from raygrpo.bench import pipeline
from raygrpo.bench.pipeline_roles import Point
from raygrpo.bench.processes import CpuWatch, cpu_seconds

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("point", [Point(2, 24, 4, 1, 2), Point(1, 8, 2, 0, 1)])
def test_a_stream_is_measured_from_end_to_end(ray_session, point):
    cost = pipeline.measure_stream(point)
    assert cost.groups_per_s > 0 and cost.start_s > 0
    assert "controller" in cost.cpu_ms and pipeline.THIS not in cost.cpu_ms


def test_claims_are_those_of_the_controller(ray_session):
    cost = pipeline.measure_claims(2, 4, 64)
    assert cost.claims_per_s > 0 and cost.claims_per_call == 4


def test_steps_are_measured_alone(ray_session):
    steps = pipeline.measure_steps(num=16)
    assert all(cost > 0 for cost in steps.values()), steps


def test_the_command_prints_marks_and_json(ray_session, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "MARK", Point(1, 8, 4, 1, 2))
    monkeypatch.setattr(pipeline, "QUICK", pipeline.Extent(pools=(1,), lengths=(8,), blocks=(), claims=16))
    pipeline.main(quick=True)
    printed = capsys.readouterr().out
    assert "groups/s with 1 generator (mark: 200)" in printed and "rollout proxies" in printed
    pipeline.main(quick=True, json=True)
    result = json.loads(capsys.readouterr().out)
    assert [cost["point"]["num_groups"] for cost in result["streams"]] == [8]


def test_cpu_time_is_booked_between_the_given_times_also_of_processes_that_end():
    burn = "import time; end = time.time() + 0.5\nwhile time.time() < end: pass  # NullLearner"
    with CpuWatch(period_s=0.05) as watch:
        time.sleep(0.2)
        start_s = time.time()
        subprocess.run([sys.executable, "-c", burn], check=True)
        time.sleep(0.2)
        end_s = time.time()
    seconds, totals = watch.between(start_s, end_s)
    assert end_s - start_s <= seconds < end_s - start_s + 1.0
    assert 0 < totals["learner"] <= seconds * os.cpu_count()
    _, later = watch.between(end_s - 0.1, end_s)
    assert later.get("learner", 0.0) == 0.0
    assert cpu_seconds()[os.getpid()][0] == "this process"
