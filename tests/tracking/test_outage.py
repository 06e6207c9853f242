"""A real MLflow server that goes away in the middle of a run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from raygrpo.tracking import Tracker
from tests.tracking.conftest import Store, make_config, make_group

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

REWARDS = [[1.0, 1.0], [0.0, 1.0]]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def mlflow_server(directory: Path, port: int) -> Iterator[str]:
    """Ours alone: a process group of its own, which is killed at the end."""
    arguments = ["--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    arguments += [
        "--backend-store-uri",
        f"sqlite:///{directory}/server.db",
        "--artifacts-destination",
        str(directory / "artifacts"),
    ]
    with (directory / "server.log").open("a") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *arguments], stdout=log, stderr=log, start_new_session=True
        )
    uri = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=2).close()
                break
            except OSError:
                assert server.poll() is None, (directory / "server.log").read_text()
                assert time.monotonic() < deadline, "the MLflow server does not start"
                time.sleep(0.5)
        yield uri
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_delivered(tracker: Tracker) -> None:
    deadline = time.monotonic() + 240
    while tracker.links().undelivered:
        assert time.monotonic() < deadline, tracker.links()
        time.sleep(0.2)


def test_a_server_that_dies_and_comes_back_costs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    config = make_config(
        tmp_path,
        tracking={"uri": f"http://127.0.0.1:{port}", "samples_every": 3, "num_traces": 1, "finish_timeout_s": 240},
    )
    tracker = Tracker(config, str(tmp_path / "run"))

    def train(steps: range) -> float:
        longest = 0.0
        for step in steps:
            began = time.monotonic()
            tracker.log_step(step, {"reward/mean": step / 10, "policy/loss": -float(step)})
            tracker.log_samples(step, [make_group(step, REWARDS)], [[0.7, -0.7]])
            longest = max(longest, time.monotonic() - began)
            time.sleep(0.1)
        return longest

    tracker.start()  # before there is a server
    longest = train(range(3))
    with mlflow_server(tmp_path, port):
        longest = max(longest, train(range(3, 6)))
        wait_delivered(tracker)
    longest = max(longest, train(range(6, 30)))  # the server was killed
    assert tracker.links().undelivered >= 24
    assert len(list((tmp_path / "run" / "metrics.jsonl").open())) == 30
    with mlflow_server(tmp_path, port) as uri:
        longest = max(longest, train(range(30, 33)))
        links = tracker.finish(summary={"steps": 33})
        assert links.undelivered == 0
        store = Store(uri)
        (run,) = store.runs("raygrpo")
        assert run.info.status == "FINISHED"
        assert store.points(run.info.run_id, "reward/mean") == [(step, step / 10) for step in range(33)]
        assert store.points(run.info.run_id, "policy/loss") == [(step, -float(step)) for step in range(33)]
        assert len(store.artifacts(run.info.run_id, "samples")) == 11
        traces = store.client.search_traces(locations=[run.info.experiment_id], run_id=run.info.run_id, max_results=100)
        assert sorted(int(trace.info.tags["step"]) for trace in traces) == list(range(0, 33, 3))
        assert {"config.yaml", "reward_curve.png", "summary.json"} <= set(store.artifacts(run.info.run_id))
    assert longest < 2.0  # MLflow's timeouts are 20 s, its retries more; training never saw them
    assert sum("does not work" in message for message in caplog.messages) == 2
    assert sum("works again" in message for message in caplog.messages) == 2
    assert not [record for record in caplog.records if not record.name.startswith("raygrpo")]


def test_a_server_that_is_away_at_the_end_gets_the_rest_by_command(tmp_path: Path) -> None:
    port = free_port()
    config = make_config(tmp_path, tracking={"uri": f"http://127.0.0.1:{port}", "finish_timeout_s": 1.0})
    command = [sys.executable, "-m", "raygrpo.tracking", str(tmp_path / "run"), "--timeout"]
    with mlflow_server(tmp_path, port):
        tracker = Tracker(config, str(tmp_path / "run"))
        tracker.start()
        tracker.log_step(0, {"reward/mean": 0.0})
        wait_delivered(tracker)
    tracker.log_step(1, {"reward/mean": 0.1})
    began = time.monotonic()
    assert tracker.finish().undelivered > 0
    assert time.monotonic() - began < 30
    refused = subprocess.run([*command, "2"], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "still wait" in refused.stderr
    with mlflow_server(tmp_path, port) as uri:
        done = subprocess.run([*command, "240"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (run,) = Store(uri).runs("raygrpo")
        assert run.info.run_id in done.stdout
        assert run.info.status == "FINISHED"
        assert Store(uri).points(run.info.run_id, "reward/mean") == [(0, 0.0), (1, 0.1)]
