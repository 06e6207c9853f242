"""Runs as jobs on a real cluster of three nodes with token authentication and an MLflow server (cluster/local.py)."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.chaos import write_task
from tests.tracking.conftest import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
COMMAND_LIMIT_S = 900.0

spec = importlib.util.spec_from_file_location("cluster_local", REPOSITORY / "cluster" / "local.py")
assert spec is not None and spec.loader is not None
local: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(local)


class Cluster(local.LocalCluster):
    """With a directory of which the generator's node sees nothing, as if it were on the other nodes' disks."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.unshared = directory / "unshared"
        self.unshared.mkdir()
        may_mount = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False)
        self.can_hide = may_mount.returncode == 0

    def _command(self, name: str, program: str, *arguments: str) -> list[str]:
        command = super()._command(name, program, *arguments)
        if name != "generator" or not self.can_hide:
            return command
        return ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(self.unshared), *command]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    directory = Path(tempfile.mkdtemp(prefix="rg-", dir="/tmp"))
    cluster = Cluster(directory)
    try:
        cluster.start()
        yield cluster
    finally:
        left = cluster.stop()
        shutil.rmtree(directory, ignore_errors=True)
    assert left == []


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """A project outside any repository: a tiny model, a task, and a run of 3 steps."""
    path = write_task(tmp_path_factory.mktemp("task"))
    settings = yaml.safe_load(path.read_text())
    settings |= {"num_steps": 3, "output_dir": "runs"}
    settings["generator"] = {"engine": "transformers", "num_threads": 1, "sampling": {"max_tokens": 8}}
    settings["learner"] = {"num_threads": 1, "optimizer": {"lr": 1e-2}}
    settings["checkpoint"] = {"every": 1}
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def raygrpo(cluster, task):
    """raygrpo(verb, *arguments, **environment) runs the command where the task is; `start` only starts it."""

    def start(verb: str, *arguments: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [str(BIN / "raygrpo"), verb, *arguments, "--address", cluster.dashboard],
            cwd=task.parent,
            env=cluster.environment | {"COLUMNS": "200"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(verb: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        process = start(verb, *arguments, **environment)
        try:
            out, err = process.communicate(timeout=COMMAND_LIMIT_S)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    run.start = start
    return run


def mlflow_run(cluster: Cluster, run_dir: Path) -> Any:
    identity = json.loads((run_dir / "tracking.json").read_text())
    assert identity["uri"] == cluster.mlflow
    return Store(cluster.mlflow).client.get_run(identity["run_id"])


def job_of(text: str) -> str:
    found = re.search(r"raygrpo_[0-9a-f]{12}", text)
    assert found is not None, text
    return found.group()


def test_a_run_is_submitted_followed_and_found_again(cluster, task, raygrpo):
    done = raygrpo("submit", task.name, "name=whole", f"tracking.uri={cluster.mlflow}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    job = job_of(done.stderr)
    page = f"{cluster.dashboard}/#/jobs/{job}"
    assert f"job {job}: {page}" in done.stderr and f"job {job}: SUCCEEDED" in done.stderr
    assert re.search(r"step 3/3  reward ", done.stdout)
    run_dir = task.parent / "runs" / "whole-latest"
    assert (run_dir / "model" / "config.json").exists() and not list((task.parent / "runs").glob(".*"))
    run = mlflow_run(cluster, run_dir)
    assert f"MLflow: {cluster.mlflow}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}" in done.stdout
    assert run.info.status == "FINISHED" and run.data.tags["ray.job_id"] == job
    note = run.data.tags["mlflow.note.content"]
    assert f"[Ray job {job}]({page})" in note
    assert f"raygrpo submit {task.name} name=whole tracking.uri={cluster.mlflow} --address {cluster.dashboard}" in note
    status = raygrpo("status", job)
    assert status.returncode == 0 and f"{job}, SUCCEEDED" in status.stdout and page in status.stdout
    logs = raygrpo("logs", job)
    assert logs.returncode == 0 and "step 3/3" in logs.stdout
    assert raygrpo("logs", job, "--follow").stdout.splitlines()[-5:] == logs.stdout.splitlines()[-5:]
    assert f"job {job} had ended: SUCCEEDED" in raygrpo("stop", job).stdout


def test_ctrl_c_stops_the_job_which_goes_on_when_resumed(cluster, task, raygrpo, interruptible):
    options = (task.name, "name=halves", f"tracking.uri={cluster.mlflow}")
    process = raygrpo.start("submit", *options, "num_steps=200")
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        if re.search(r"step ([2-9]|\d\d+)/200", line):  # not every step has a line
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=COMMAND_LIMIT_S)
    job = job_of(err)
    assert process.returncode == 130 and f"job {job}: STOPPED" in err, out[-3000:] + err[-3000:]
    assert "stopped; go on with: raygrpo submit" in out, "the driver ended itself"
    run_dir = (task.parent / "runs" / "halves-latest").resolve()
    stopped = mlflow_run(cluster, run_dir)
    assert stopped.info.status == "KILLED"
    trained = max(
        int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-" + "[0-9]" * 6)
    )
    more = raygrpo("submit", *options, f"num_steps={trained + 1}", "--resume")
    assert more.returncode == 0, more.stdout[-3000:] + more.stderr[-3000:]
    finished = mlflow_run(cluster, run_dir)
    assert finished.info.run_id == stopped.info.run_id and finished.info.status == "FINISHED"
    assert finished.data.tags["ray.job_id"] == job_of(more.stderr) != job


def test_a_job_that_was_left_is_stopped_by_its_id(cluster, task, raygrpo):
    options = (task.name, "name=left", f"tracking.uri={cluster.mlflow}", "num_steps=200", "--no-wait")
    job = job_of(raygrpo("submit", *options).stderr)
    run_dir = task.parent / "runs" / "left-latest"
    deadline_s = time.monotonic() + COMMAND_LIMIT_S
    while not list(run_dir.glob("checkpoints/step-000001")):
        assert time.monotonic() < deadline_s
        time.sleep(0.5)
    assert ", RUNNING" in raygrpo("status", job).stdout
    stop = raygrpo("stop", job)
    assert stop.returncode == 0 and f"job {job}: STOPPED" in stop.stdout
    assert mlflow_run(cluster, run_dir).info.status == "KILLED"


def test_a_run_that_fails_fails_the_command(cluster, task, raygrpo):
    done = raygrpo("submit", task.name, f"tracking.uri={cluster.mlflow}", "learner.max_logprob_diff=1e-12")
    assert done.returncode == 1 and "FAILED" in done.stderr
    assert "learner.max_logprob_diff is 1e-12" in done.stdout


def test_several_nodes_without_a_server_or_shared_storage_are_refused(cluster, task, raygrpo):
    done = raygrpo("submit", task.name)
    assert done.returncode == 1
    assert "the cluster has 3 nodes, and the run would be tracked in sqlite:" in done.stdout
    assert "Set tracking.uri (or MLFLOW_TRACKING_URI) to an MLflow server" in done.stdout
    if not cluster.can_hide:
        pytest.skip("hiding a directory from a node takes the right to mount")
    done = raygrpo("submit", task.name, f"tracking.uri={cluster.mlflow}", f"output_dir={cluster.unshared}")
    assert done.returncode == 1
    assert re.search(rf"output_dir {cluster.unshared} is not the same directory .* \(1 of 3\) do not see", done.stdout)
    assert list(cluster.unshared.iterdir()) == [], "no run was begun"


def test_the_clusters_token_is_needed(cluster, task, raygrpo):
    missing = raygrpo("submit", task.name, RAY_AUTH_MODE="disabled")
    assert missing.returncode == 1 and "wants a token: set RAY_AUTH_MODE=token" in missing.stderr
    wrong = raygrpo("submit", task.name, RAY_AUTH_TOKEN="0" * 64)
    assert wrong.returncode == 1 and "does not accept the token given" in wrong.stderr


def test_rays_own_submit_works_with_an_absolute_output_dir(cluster, task, tmp_path):
    def submit(*overrides: str) -> subprocess.CompletedProcess:
        command = [str(BIN / "ray"), "job", "submit", "--address", cluster.dashboard, "--working-dir", "."]
        command += ["--", "raygrpo", "train", task.name, "num_steps=1", f"tracking.uri={cluster.mlflow}", *overrides]
        return subprocess.run(
            command, cwd=task.parent, env=cluster.environment, capture_output=True, text=True, check=False
        )

    refused = submit()
    assert refused.returncode == 1 and "output_dir is runs: in a Ray job that is in a copy" in refused.stdout
    done = submit(f"output_dir={tmp_path}", "name=plain")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    tags = mlflow_run(cluster, tmp_path / "plain-latest").data.tags
    assert tags["ray.job_id"].startswith("raysubmit_") and "/#/jobs/raysubmit_" in tags["mlflow.note.content"]


def test_make_cluster_local_leaves_nothing(tmp_path):
    tiny = ["num_steps=2", "groups_per_step=4"]
    before = set(Path("/tmp").glob("rg-*"))
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "cluster" / "local.py"), "--keep", str(tmp_path), *tiny],
        capture_output=True,
        text=True,
        check=False,
        timeout=COMMAND_LIMIT_S,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "step 2/2" in done.stdout and "all is down, and nothing is left" in done.stderr
    assert (tmp_path / "runs" / "quickstart-latest" / "model" / "config.json").exists()
    ours = set(re.findall(r"/tmp/rg-\w+", done.stderr))
    assert ours and not {str(path) for path in set(Path("/tmp").glob("rg-*")) - before} & ours
    named = [p for p in psutil.process_iter(["cmdline"]) if any(o in " ".join(p.info["cmdline"] or []) for o in ours)]
    assert named == []


def test_an_interrupted_cluster_local_leaves_nothing(tmp_path, interruptible):
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "cluster" / "local.py")], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    directory = re.findall(r"/tmp/rg-\w+", process.stderr.readline())[0]
    while not Path(directory, "head.log").exists():
        time.sleep(0.1)
    time.sleep(5.0)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=COMMAND_LIMIT_S)
    assert process.returncode == 1
    assert "interrupted" in err and "nothing is left" in err and not Path(directory).exists()
