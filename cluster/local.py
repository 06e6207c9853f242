"""A Ray cluster of three nodes and an MLflow server, all on this machine, and one run on them: `make cluster-local`.

    head       dashboard, job server and the job's driver; it has no CPUs for anything else
    learner    a node for the learners          (label raygrpo-role=learner)
    generator  a node for everything else       (label raygrpo-role=generator)

The quickstart is submitted to it as a user would submit it to a cluster elsewhere, and its log is followed. Whatever
happens, everything that was started ends with this script, and it says so only after having looked. Nothing that runs
here already is touched: ports, directories and the token are this cluster's own.

    python cluster/local.py [--keep DIRECTORY] [--config FILE] [key=value ...]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

PROJECT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
MARK = "RAYGRPO_CLUSTER_LOCAL"  # in the environment of all that is started here, and of what that starts in turn
START_LIMIT_S = 300.0
STOP_LIMIT_S = 30.0
NODE_STARTS = 4
NODES = {"head": 0, "learner": 2, "generator": 2}  # logical CPUs


class LocalCluster:
    """Starts the processes, knows their addresses, and ends them."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.mark = secrets.token_hex(8)
        self.token = secrets.token_hex(32)
        names = ("gcs", "dashboard", "mlflow", *[f"{node} {use}" for node in NODES for use in ("agent", "grpc", "env")])
        self._ports = dict(zip(names, free_ports(len(names)), strict=True))
        self._processes: dict[str, subprocess.Popen] = {}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
        self.environment = inherited | {
            MARK: self.mark,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # where the job finds `raygrpo`
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_TMPDIR": str(directory),
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self._ports['dashboard']}"

    @property
    def mlflow(self) -> str:
        return f"http://127.0.0.1:{self._ports['mlflow']}"

    def start(self) -> None:
        """Everything, until all of it answers. Raises RuntimeError with the end of the log of what does not."""
        store = f"sqlite:///{self.directory}/mlflow.db"
        artifacts = str(self.directory / "artifacts")
        self._launch(
            "mlflow",
            *("mlflow", "server", "--host", "127.0.0.1", "--port", str(self._ports["mlflow"]), "--workers", "1"),
            *("--backend-store-uri", store, "--artifacts-destination", artifacts),
        )
        self._start_node("head", "--head", "--port", str(self._ports["gcs"]), *self._dashboard_options())
        for node in list(NODES)[1:]:
            self._start_node(node, "--address", f"127.0.0.1:{self._ports['gcs']}")
        self._await("mlflow", lambda: answer(f"{self.mlflow}/health") is not None)

    def num_nodes(self) -> int:
        """Alive ones, as the dashboard knows them."""
        text = answer(f"{self.dashboard}/nodes?view=summary", {"Authorization": f"Bearer {self.token}"})
        if text is None:
            return 0
        summary: list[dict[str, Any]] = json.loads(text)["data"]["summary"]
        return sum(node["raylet"].get("state") == "ALIVE" for node in summary)

    def run(self, command: list[str]) -> int:
        """The command's exit status, its output shown here."""
        self._launch("raygrpo", *command, to_log=False)
        return self._processes["raygrpo"].wait()

    def stop(self) -> list[str]:
        """End all of it, the newest first; what is left, in words."""
        for process in reversed(self._processes.values()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_LIMIT_S)
        for remaining in self.descendants():  # raylets end their workers themselves, most of the time
            with contextlib.suppress(psutil.NoSuchProcess):
                remaining.kill()
        psutil.wait_procs(self.descendants(), STOP_LIMIT_S)
        return [f"process {process.pid}: {process.name()}" for process in self.descendants()]

    def descendants(self) -> list[psutil.Process]:
        """Processes that were started here, by whatever detours: they carry the mark in their environment."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and process.pid != os.getpid() and process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found

    def _dashboard_options(self) -> list[str]:
        return [
            *("--include-dashboard", "true", "--dashboard-host", "127.0.0.1"),
            *("--dashboard-port", str(self._ports["dashboard"])),
        ]

    def _start_node(self, node: str, *options: str) -> None:
        """Until the dashboard knows it. Ray gives a node 30 s to start, too few on a busy machine: then once more."""
        expected = self.num_nodes() + 1
        for remaining in reversed(range(NODE_STARTS)):
            self._launch_node(node, *options)
            try:
                self._await(node, lambda: self.num_nodes() == expected)
                return
            except RuntimeError as error:
                if not remaining or "timed out during startup" not in str(error):
                    raise
                say(f"the {node} node did not start in time; trying again")

    def _launch_node(self, node: str, *options: str) -> None:
        agent, grpc, env = (str(self._ports[f"{node} {use}"]) for use in ("agent", "grpc", "env"))
        self._launch(
            node,
            *("ray", "start", "--block", "--disable-usage-stats", "--node-ip-address", "127.0.0.1"),
            *("--num-cpus", str(NODES[node]), "--labels", f"raygrpo-role={node}"),
            # Ray's default ports are those of one node on a machine.
            *("--dashboard-agent-listen-port", agent, "--dashboard-agent-grpc-port", grpc),
            *("--runtime-env-agent-port", env, "--min-worker-port", "0", "--max-worker-port", "0"),
            *("--object-store-memory", str(200 * 2**20)),
            *options,
        )

    def _launch(self, name: str, program: str, *arguments: str, to_log: bool = True) -> None:
        log = open(self._log(name), "wb") if to_log else None  # noqa: SIM115  (the process keeps it)
        self._processes[name] = subprocess.Popen(
            self._command(name, program, *arguments),
            cwd=PROJECT,
            env=self.environment,
            stdout=log,
            stderr=subprocess.STDOUT if log else None,
            start_new_session=True,
        )

    def _command(self, name: str, program: str, *arguments: str) -> list[str]:
        return [str(BIN / program), *arguments]

    def _log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def _await(self, what: str, is_ready: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + START_LIMIT_S
        while not is_ready():
            dead = [name for name, process in self._processes.items() if process.poll() is not None]
            if dead or time.monotonic() > deadline_s:
                name = dead[0] if dead else what
                logs = [self._log(name)] if dead else sorted(self.directory.glob("*.log"))
                tails = "\n".join(f"{log.name}:\n{log.read_text(errors='replace')[-2000:]}" for log in logs)
                raise RuntimeError(f"{name} {'ended' if dead else f'is not there after {START_LIMIT_S:g} s'}\n{tails}")
            time.sleep(0.5)


def free_ports(num: int) -> list[int]:
    """Ports that nobody listens on now; all are held until the last is found, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def answer(url: str, headers: dict[str, str] | None = None) -> str | None:
    """What the server says; None while it does not."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=10) as response:
            return response.read().decode()
    except (urllib.error.URLError, OSError):
        return None


def say(text: str) -> None:
    print(f"cluster-local: {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="A Ray cluster of three nodes on this machine, and one run on it.")
    parser.add_argument("--config", default="pipelines/quickstart.yaml", help="the run's YAML")
    parser.add_argument("--keep", type=Path, help="copy the runs and the nodes' logs into this directory at the end")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the run")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    directory = Path(tempfile.mkdtemp(prefix="rg-", dir="/tmp"))  # short: Ray's sockets lie in it
    cluster = LocalCluster(directory)
    status = 1
    try:
        say(f"starting {len(NODES)} nodes and an MLflow server in {directory}")
        cluster.start()
        say(f"dashboard {cluster.dashboard} (token {cluster.token}), MLflow {cluster.mlflow}")
        command = ["raygrpo", "submit", arguments.config, "--address", cluster.dashboard]
        command += [f"output_dir={directory / 'runs'}", f"tracking.uri={cluster.mlflow}"]
        command += [f"{role}.label_selector={{raygrpo-role: {role}}}" for role in ("learner", "generator")]
        command += arguments.overrides
        say(shlex.join(command))
        status = cluster.run(command)
    except RuntimeError as error:
        say(str(error))
    except KeyboardInterrupt:
        say("interrupted")
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # ending it takes seconds, and half an end is none
        left = cluster.stop()
        if arguments.keep is not None:
            keep(directory, arguments.keep)
        shutil.rmtree(directory, ignore_errors=True)
    left += [f"directory {directory}"] if directory.exists() else []
    say("left behind:\n  " + "\n  ".join(left) if left else "all is down, and nothing is left")
    return status or bool(left)


def keep(directory: Path, target: Path) -> None:
    """Runs, logs of our processes, and Ray's own logs."""
    target.mkdir(parents=True, exist_ok=True)
    for log in directory.glob("*.log"):
        shutil.copy(log, target)
    if (directory / "runs").exists():
        shutil.copytree(directory / "runs", target / "runs", symlinks=True, dirs_exist_ok=True)
    for logs in (directory / "ray").glob("session_2*/logs"):
        shutil.copytree(
            logs, target / "ray_logs", symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.sock")
        )


if __name__ == "__main__":
    sys.exit(main())
