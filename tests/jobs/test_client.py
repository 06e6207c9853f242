"""What is said to a cluster and what its answers become; the cluster is a small HTTP server that answers as Ray does.

test_cluster.py has the real one.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from raygrpo.cli import app
from raygrpo.console import STEP_LINE, LineWatcher, show_log
from raygrpo.jobs import client, package
from raygrpo.jobs.client import Lines, RayJobs
from tests.conftest import TINY_RUN, run_config

STEP = {
    "reward/mean": 0.5,
    "completions/mean_length": 12.0,
    "staleness/max": 1.0,
    "perf/tokens_per_s": 100.0,
    "timing_s/step": 1.0,
}


class Head(ThreadingHTTPServer):
    """A job server: `answers` of POST /api/jobs/ in order, and what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[tuple[int, str]] = []
        self.refusal: tuple[int, str] | None = None
        self.submitted: list[dict] = []
        self.packages: list[bytes] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Head

    def do_GET(self) -> None:
        if self.path == "/api/version":
            self.answer(200, json.dumps({"version": "4", "ray_version": "2.60.0", "ray_commit": ""}))
        else:
            self.answer(404, "there is none")

    def do_PUT(self) -> None:
        self.server.packages.append(self.body())
        self.answer(200, "")

    def do_POST(self) -> None:
        request = json.loads(self.body())
        status, text = self.server.answers.pop(0) if self.server.answers else (200, "")
        if status == 200:
            self.server.submitted.append(request)
            text = json.dumps({"job_id": request["submission_id"], "submission_id": request["submission_id"]})
        self.answer(status, text)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def answer(self, status: int, text: str) -> None:
        status, text = self.server.refusal or (status, text)
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def head(monkeypatch) -> Iterator[Head]:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(client, "RETRY_S", 0.01)
    with Head() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def run_yaml(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({k: v for k, v in TINY_RUN.items() if k != "name"}))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "run.yaml"


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def test_a_run_is_sent_with_its_package_and_who_submitted_it(head, run_yaml):
    result = invoke("submit", "run.yaml", "seed=3", "--address", head.address, "--no-wait")
    assert result.exit_code == 0, result.output
    (request,) = head.submitted
    assert f"job {request['submission_id']}: {head.address}/#/jobs/{request['submission_id']}" in result.stderr
    assert request["entrypoint"].startswith("raygrpo train run.yaml seed=3 ")
    assert "model.path=./model data.source=./rows.jsonl" in request["entrypoint"]
    assert request["runtime_env"]["working_dir"].startswith("gcs://_ray_pkg_")
    assert int(request["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) > 3
    assert request["metadata"]["raygrpo_dashboard"] == head.address
    assert Path(request["metadata"]["raygrpo_probe"]).exists()
    assert request["metadata"]["raygrpo_commit"] == "{}", "its directory is in no repository"
    assert len(head.packages) == 1 and head.packages[0].startswith(b"PK")


def test_a_project_that_cannot_be_sent_leaves_nothing_behind(head, run_yaml, monkeypatch):
    monkeypatch.setattr(package, "MAX_PACKAGE_BYTES", 1)
    result = invoke("submit", "run.yaml", "--address", head.address)
    assert result.exit_code == 1 and "The largest files" in result.stderr and not head.submitted
    assert not list(run_yaml.parent.glob("runs/.submitted-*"))
    monkeypatch.setattr(package, "MAX_PACKAGE_BYTES", 2**20)
    head.answers = [(500, "something else")]
    assert invoke("submit", "run.yaml", "--address", head.address).exit_code == 1 and not head.answers
    assert not list(run_yaml.parent.glob("runs/.submitted-*"))


def test_a_cluster_that_has_no_agent_yet_is_asked_again(head, run_yaml):
    head.answers = [(500, "No available agent to submit job, please try again later.")] * 2
    result = invoke("submit", "run.yaml", "--address", head.address, "--no-wait")
    assert result.exit_code == 0 and len(head.submitted) == 1
    assert result.stderr.count("no agent that takes jobs yet; trying again") == 2
    head.answers = [(500, "something else"), (500, "No available agent")]
    result = invoke("submit", "run.yaml", "--address", head.address, "--no-wait")
    assert result.exit_code == 1 and "something else" in result.stderr and len(head.answers) == 1


@pytest.mark.parametrize("arguments", [("submit", "run.yaml"), ("status", "j"), ("logs", "j"), ("stop", "j")])
def test_a_missing_or_wrong_token_is_said_with_what_to_set(head, run_yaml, arguments):
    head.refusal = (401, "Unauthorized: Missing authentication token")
    result = invoke(*arguments, "--address", head.address)
    assert result.exit_code == 1
    assert f"the cluster at {head.address} wants a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN" in result.stderr
    head.refusal = (403, "Forbidden: Invalid authentication token")
    result = invoke(*arguments, "--address", head.address)
    assert result.exit_code == 1 and "does not accept the token given: set RAY_AUTH_TOKEN" in result.stderr


def test_where_no_ray_answers_the_address_is_asked_for(head, run_yaml):
    address = head.address
    head.shutdown()
    head.server_close()
    result = invoke("status", "j", "--address", address)
    assert result.exit_code == 1
    assert f"no Ray answers at {address}" in result.stderr and "--address http://HOST:8265" in result.stderr


def test_a_given_address_wins_over_the_environment(head, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    assert RayJobs(head.address).address == head.address
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.address)
    assert RayJobs().address == head.address


def test_a_job_that_is_not_there(head):
    result = invoke("logs", "nowhere", "--follow", "--address", head.address)
    assert result.exit_code == 1 and "404" in result.stderr


def test_nothing_is_sent_of_a_run_that_cannot_work(head, run_yaml):
    result = invoke("submit", "run.yaml", "group_sise=3", "--address", head.address)
    assert result.exit_code == 1 and "did you mean 'group_size'?" in result.stderr
    assert not head.packages


# The log.


def test_lines_are_shown_once_however_they_come():
    text = "one\ntwo\nthree\nfour"
    for size in range(1, len(text) + 1):
        shown: list[str] = []
        lines = Lines(shown.append)
        for lost_at in (0, 5, 9, len(text)):  # the connection is lost there, and the log comes again from its beginning
            lines.begin_again()
            for start in range(0, lost_at, size):
                lines.add(text[start : min(start + size, lost_at)])
        lines.end()
        assert shown == text.split("\n"), size


def test_the_steps_of_a_log_move_a_bar():
    written = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    watcher = LineWatcher(run_config(num_steps=40), written)
    watcher.on_step(2, STEP)
    line = written.export_text().rstrip("\n")
    match = STEP_LINE.match(line)
    assert match is not None and match.groups()[:2] == ("3", "40") and match.group(3).startswith("reward 0.500")
    terminal = Console(record=True, force_terminal=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    with show_log(terminal) as show:
        show("something [else]")
        show(line)
    shown = terminal.export_text()
    assert "something [else]" in shown and "3/40" in shown and "reward 0.500" in shown and "step 3" not in shown
