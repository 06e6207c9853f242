"""`raygrpo ui`: MLflow's UI on the store of a run, for as long as one looks at it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from raygrpo.cli import app
from tests.conftest import TINY_RUN
from tests.tracking.conftest import FirstRun


def test_a_store_behind_a_server_is_only_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example:5000")
    done = CliRunner().invoke(app, ["ui", "--no-browser"])
    assert done.exit_code == 0
    assert done.output == "MLflow shows https://me:***@mlflow.example:5000 at https://me:***@mlflow.example:5000\n"


def test_a_store_that_does_not_exist_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["ui"])
    assert done.exit_code == 1
    assert f"there is no MLflow store at {tmp_path}/runs/mlflow.db yet" in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_server_answers_and_leaves_nothing_behind(first_run: FirstRun, tmp_path: Path, interruptible: None) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(TINY_RUN | {"output_dir": str(first_run.output_dir)}))
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    command = [sys.executable, "-u", "-m", "raygrpo", "ui", str(tmp_path / "run.yaml"), "--no-browser"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "starting MLflow; Ctrl-C ends it\n"
        line = process.stdout.readline()
        assert line.startswith(f"MLflow shows sqlite:///{first_run.output_dir}/mlflow.db at http://127.0.0.1:")
        with urllib.request.urlopen(line.split()[-1], timeout=60) as page:
            assert b"MLflow" in page.read()
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert not psutil.wait_procs(children, timeout=20)[1]
    finally:
        process.kill()
        process.wait()
