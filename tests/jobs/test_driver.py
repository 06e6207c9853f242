"""What a driver insists on when it runs on a cluster."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from raygrpo.jobs import driver
from raygrpo.jobs.driver import current_job, identify, metadata_of, require_lasting_paths, require_shared_storage
from raygrpo.tracking import commit_tags
from tests.conftest import run_config

COPY = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_0"


@pytest.fixture
def job(monkeypatch):
    """job(**metadata): as Ray tells the driver of a job."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def job(**metadata: str) -> None:
        config = {"runtime_env": {}, "metadata": {"job_submission_id": "raysubmit_1"} | metadata}
        monkeypatch.setenv(driver.JOB_VARIABLE, json.dumps(config))

    return job


def test_outside_a_job_there_is_none(monkeypatch):
    monkeypatch.delenv(driver.JOB_VARIABLE, raising=False)
    assert current_job() is None
    assert identify(None) == ({}, {})
    assert identify("127.0.0.1:8265") == ({}, {"Ray dashboard": "http://127.0.0.1:8265"})
    require_lasting_paths(run_config(output_dir="runs"))


def test_a_job_is_identified_as_its_submitter_reaches_it(job):
    job()
    tags, links = identify("10.0.0.1:8265")
    assert tags == {"ray.job_id": "raysubmit_1"}
    assert links == {"Ray job raysubmit_1": "http://10.0.0.1:8265/#/jobs/raysubmit_1"}
    job(**metadata_of("https://ray.example.org/", "raygrpo submit x --resume", None))
    assert identify("10.0.0.1:8265")[1] == {"Ray job raysubmit_1": "https://ray.example.org/#/jobs/raysubmit_1"}
    found = current_job()
    assert found is not None and found.resume_command == "raygrpo submit x --resume" and found.probe is None


def test_a_job_knows_the_commit_of_the_project_that_was_packed(job, tmp_path):
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    (tmp_path / "reward.py").write_text("1")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True)
    expected = {"ray.job_id": "raysubmit_1", "mlflow.source.git.commit": head.stdout.strip()}
    job(**metadata_of("http://head", "again", None, commit_tags(tmp_path)))
    assert identify(None)[0] == expected | {"git.dirty": "false"}
    (tmp_path / "reward.py").write_text("2")
    job(**metadata_of("http://head", "again", None, commit_tags(tmp_path)))
    assert identify(None)[0] == expected | {"git.dirty": "true"}
    assert commit_tags(tmp_path / "gone") == {}


@pytest.mark.parametrize("output_dir", ["runs", "./runs", f"{COPY}/runs"])
def test_outputs_in_the_copy_of_the_working_directory_are_refused(job, output_dir):
    job()
    with pytest.raises(ValueError, match=r"which Ray deletes\. Set output_dir to an absolute path, on storage"):
        require_lasting_paths(run_config(output_dir=output_dir))
    require_lasting_paths(run_config(output_dir="/shared/runs"))


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", f"sqlite:///{COPY}/mlflow.db"])
def test_a_record_in_the_copy_is_refused(job, monkeypatch, uri):
    job()
    with pytest.raises(ValueError, match=r"Set tracking\.uri to a server, or to sqlite:/// and an absolute path"):
        require_lasting_paths(run_config(output_dir="/shared", tracking={"uri": uri}))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ValueError, match=r"Set tracking\.uri"):
        require_lasting_paths(run_config(output_dir="/shared"))
    require_lasting_paths(run_config(output_dir="/shared", tracking={"uri": "sqlite:////shared/mlflow.db"}))
    require_lasting_paths(run_config(output_dir="/shared", tracking={"uri": "http://mlflow:5000"}))


def test_an_output_dir_of_the_submitters_machine_must_be_there(job, tmp_path):
    probe = tmp_path / "probe"
    job(**metadata_of("http://head", "again", str(probe)))
    with pytest.raises(ValueError, match="is on the machine that submitted the job"):
        require_lasting_paths(run_config(output_dir=str(tmp_path)))
    probe.touch()
    require_lasting_paths(run_config(output_dir=str(tmp_path)))
    assert not probe.exists(), "nothing of it stays"


def test_one_node_needs_neither_shared_storage_nor_a_server(ray_session, tmp_path):
    require_shared_storage(run_config(output_dir=str(tmp_path / "runs"), tracking={"uri": None}))
    assert not (tmp_path / "runs").exists()


def test_nodes_that_see_no_output_or_no_model_are_named(tmp_path):
    nodes = {"a": "head (a)", "b": "gpu-1 (b)", "c": "gpu-2 (c)"}
    config = run_config(output_dir="/data/runs", model={"path": "/data/model"})
    driver.check_answers(config, nodes, {"a": (True, True), "b": (True, True)})  # c died meanwhile
    with pytest.raises(ValueError, match=r"output_dir /data/runs .*: gpu-1 \(b\), gpu-2 \(c\) \(2 of 3\) do not see"):
        driver.check_answers(config, nodes, {"a": (True, True), "b": (False, True), "c": (False, False)})
    with pytest.raises(ValueError, match=r"model\.path /data/model is not there on gpu-2 \(c\) \(1 of 3 nodes\)"):
        driver.check_answers(config, nodes, {"a": (True, True), "b": (True, True), "c": (True, False)})


def test_a_node_asked_looks_for_what_it_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "SHARED_FILE_WAIT_S", 0.0)
    Path(tmp_path / "probe").touch()
    assert driver._look(str(tmp_path / "probe"), None) == (True, True)
    assert driver._look(str(tmp_path / "none"), str(tmp_path / "none")) == (False, False)
