"""A cluster of one machine that Ray's own autoscaler grows and shrinks, and what can be seen of it from outside."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from ray.util import get_node_ip_address

REPOSITORY = Path(__file__).parents[2]
CONFIG = REPOSITORY / "cluster" / "fake_multinode.yaml"
START_LIMIT_S = 240.0


@dataclass(frozen=True, kw_only=True)
class View:
    """The cluster at one moment."""

    time_s: float  # unix time
    nodes: int  # that are alive, the head among them
    versions: dict[str, int]  # generators -> the version that they hold; -1: none yet

    @property
    def serving(self) -> int:
        """How many generators can be given work."""
        return sum(version >= 0 for version in self.versions.values())


@dataclass
class AutoscalingCluster:
    address: str
    environment: dict[str, str]  # of processes that use it
    log: Path
    directory: Path
    process: subprocess.Popen
    family: set[psutil.Process] = field(default_factory=set)

    def look(self) -> dict[int, str]:
        """The processes of all its nodes: their command lines."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.family |= set(psutil.Process(self.process.pid).children(recursive=True))
        lines = {}
        for process in self.family:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                lines[process.pid] = " ".join(process.cmdline())
        return lines

    def monitor_log(self) -> str:
        return "\n".join(path.read_text() for path in self.directory.glob("session_2*/logs/monitor.*"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def autoscaling_cluster(directory: Path, *, max_workers: int, version: int) -> Iterator[AutoscalingCluster]:
    """The head of cluster/fake_multinode.yaml on ports of its own, with up to max_workers nodes beside it, and nothing
    left of them at the end.

    version: of Ray's autoscaler. directory: empty, with a short name: sockets lie in it.
    """
    # Ray takes 127.0.0.1 in an address for the machine's own, which a head that listens there does not answer.
    address = f"{get_node_ip_address()}:{free_port()}"
    config = yaml.safe_load(CONFIG.read_text())
    config["provider"]["gcs_address"] = address
    config["max_workers"] = config["available_node_types"]["generator"]["max_workers"] = max_workers
    (directory / "autoscaling.yaml").write_text(yaml.safe_dump(config))
    head_id = config["provider"]["head_node_id"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "PYTHONPATH": str(REPOSITORY)}
    of_head = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_TRAIN_V2_ENABLED": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_METRIC_PORT": str(free_port()),
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": head_id,  # the provider knows its nodes by these
        "RAY_CLOUD_INSTANCE_ID": head_id,
        "RAY_enable_autoscaler_v2": str(int(version == 2)),
    }
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--port={address.rpartition(':')[2]}", "--include-dashboard=false"]
    command += [f"--temp-dir={directory}", f"--autoscaling-config={directory}/autoscaling.yaml"]
    command += [f"--num-cpus={config['available_node_types']['ray.head.default']['resources']['CPU']}"]
    command += ["--labels=raygrpo-role=learner", "--object-store-memory=200000000"]
    command += [f"--ray-client-server-port={free_port()}"]
    command += [f"--dashboard-agent-listen-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0"]
    log = directory / "head.log"
    with open(log, "w") as stream:
        process = subprocess.Popen(
            command, env=environment | of_head, stdout=stream, stderr=stream, start_new_session=True, cwd=directory
        )
    environment["RAY_ADDRESS"] = address
    cluster = AutoscalingCluster(address, environment, log, directory, process)
    try:
        deadline_s = time.monotonic() + START_LIMIT_S
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.2)
        yield cluster
    finally:
        cluster.look()
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        for left in [*cluster.family, process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait()


@contextlib.contextmanager
def observed(cluster: AutoscalingCluster) -> Iterator[Path]:
    """A process that looks at the cluster twice a second; yields the file that it writes. See `views`."""
    path = cluster.directory / "views.jsonl"
    path.touch()
    with open(cluster.directory / "observer.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.autoscaling", str(path)],
            cwd=REPOSITORY,
            env=cluster.environment,
            stdout=log,
            stderr=log,
        )
    try:
        yield path
    finally:
        process.kill()
        process.wait()


def views(path: Path) -> list[View]:
    """What was seen so far."""
    complete = path.read_text().rpartition("\n")[0]
    return [View(**json.loads(line)) for line in complete.splitlines()]


def observe(path: str) -> None:
    import ray
    from ray.util import list_named_actors

    ray.init(logging_level="ERROR", log_to_driver=False)
    with open(path, "w", buffering=1) as stream:
        while True:
            asked: dict[Any, str] = {}
            for actor in list_named_actors(all_namespaces=True):
                _, is_generator, number = actor["name"].partition("-generator-")
                with contextlib.suppress(ValueError):  # it has just gone
                    if is_generator:
                        handle = ray.get_actor(actor["name"], namespace=actor["namespace"])
                        asked[handle.status.remote()] = f"generator-{number}"
            versions = dict.fromkeys(asked.values(), -1)
            answers, _ = ray.wait(list(asked), num_returns=len(asked), timeout=2) if asked else ([], [])
            for answer in answers:
                with contextlib.suppress(ray.exceptions.RayError):
                    status = ray.get(answer)
                    versions[asked[answer]] = status.version if status.attempt else -1
            nodes = sum(node["Alive"] for node in ray.nodes())
            stream.write(json.dumps({"time_s": time.time(), "nodes": nodes, "versions": versions}) + "\n")
            time.sleep(0.5)


if __name__ == "__main__":
    observe(sys.argv[1])
