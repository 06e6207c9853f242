"""The launcher files: Ray's schema, who runs where, and that the nodes hold the run. No cloud is asked."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from raygrpo.config_file import load_config
from raygrpo.placement import ROLE_LABEL
from raygrpo.sizing import GIB, ModelSize, memory, object_store_bytes
from tests.cluster.fit import Nodes, check_fit, run_of
from tests.cluster.shapes import CLUSTER, PROMPT_TOKENS, SHAPES, SIZES

LAUNCHERS = {path.stem: path for path in (CLUSTER / "launcher").glob("*.yaml")}
CLOUDS = ("aws", "gcp")
# Memory of the machines that the files name, in GiB: of the host, and of each GPU. From the clouds' machine catalogues.
MACHINES = {
    "m7i.2xlarge": (32, 0),
    "p4de.24xlarge": (1152, 80),
    "g6e.4xlarge": (128, 44.7),
    "c7i.4xlarge": (32, 0),
    "n2-standard-8": (32, 0),
    "a2-ultragpu-8g": (1266, 80),
    "a2-ultragpu-1g": (158, 80),
    "c2-standard-16": (64, 0),
}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load(LAUNCHERS[name].read_text())


def test_there_is_a_file_for_each_kind_of_cluster():
    assert set(LAUNCHERS) == {"aws", "gcp", "on_premise"}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_takes_the_file(name):
    """As `ray up` does: its defaults are filled in, and the result is held against its schema."""
    config = prepare_config(read(name))
    validate_config(config)


def test_ray_refuses_a_key_that_it_does_not_know():
    with pytest.raises(Exception, match="idle_minutes"):
        validate_config(prepare_config(read("aws") | {"idle_minutes": 1}))


@pytest.mark.parametrize("name", CLOUDS)
def test_node_types_hold_the_run_that_they_are_for(name):
    config = read(name)
    types = {}
    for role, node_type in config["available_node_types"].items():
        node = node_type["node_config"]
        host, gpu = MACHINES[node.get("InstanceType") or node["machineType"]]
        types[role] = Nodes(
            labels=node_type["labels"],
            num_cpus=node_type["resources"]["CPU"],
            num_gpus=node_type["resources"].get("GPU", 0),
            host_bytes=host * 2**30,
            gpu_bytes=gpu * 2**30,
            least=1 if role == "head" else node_type["min_workers"],
            most=1 if role == "head" else node_type["max_workers"],
        )
    assert set(types) == {"head", "learner", "generator", "reward"}
    assert config["head_node_type"] == "head"
    assert config["max_workers"] == sum(nodes.most for role, nodes in types.items() if role != "head")
    check_fit("8b", types)


@pytest.mark.parametrize("name", CLOUDS)
def test_generators_alone_may_be_taken_away(name):
    types = read(name)["available_node_types"]
    mortal = {role for role, node in types.items() if any(word in str(node) for word in ("spot", "preemptible"))}
    assert mortal == {"generator"}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_ray_has_a_token_and_a_dashboard_on_localhost(name):
    config = read(name)
    assert list(config["file_mounts"].values()) == ["~/.ray/auth_token"]
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    starts = [command for command in starts if "ray start" in command]
    assert len(starts) == 2
    in_containers = "--env=RAY_AUTH_MODE=token" in config.get("docker", {}).get("run_options", [])
    for command in starts:
        assert in_containers or "export RAY_AUTH_MODE=token" in command
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "0.0.0.0" not in LAUNCHERS[name].read_text()


@pytest.mark.parametrize("name", LAUNCHERS)
def test_nodes_idle_for_longer_than_a_step_and_not_for_hours(name):
    assert 5 <= read(name)["idle_timeout_minutes"] <= 60


def stand_in(path: Path, script: str) -> Path:
    """An executable for a program that is not to run here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def on_host(command: str, home: Path, path: str = "/usr/bin:/bin") -> subprocess.CompletedProcess[str]:
    """Run a command of a launcher file as on a host with that home directory."""
    environment = {"HOME": str(home), "RAY_HEAD_IP": "10.0.0.1", "PATH": path}
    return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_jobs_on_a_host_find_raygrpo(kind, tmp_path):
    """A job's command has the environment of the Ray that starts it: here one with raygrpo beside it."""
    (tmp_path / "raygrpo-role").write_text("learner\n")
    programs = tmp_path / "raygrpo" / ".venv" / "bin"
    stand_in(programs / "ray", 'echo "$PATH" > ~/path; command -v raygrpo > ~/found')
    raygrpo = stand_in(programs / "raygrpo", "true")
    result = on_host(read("on_premise")[f"{kind}_start_ray_commands"][1], tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "path").read_text().strip() == f"{programs}:/usr/bin:/bin"
    assert (tmp_path / "found").read_text().strip() == str(raygrpo)


@pytest.mark.parametrize("mounted", [False, True])
@pytest.mark.parametrize("name", CLOUDS)
def test_the_images_user_may_write_to_the_shared_file_system(name, mounted, tmp_path):
    """A new one belongs to root."""
    config = read(name)
    stand_in(tmp_path / "bin" / "sudo", 'echo "$@" >> ~/as_root')
    stand_in(tmp_path / "bin" / "mountpoint", f"exit {0 if mounted else 1}")
    for command in config["initialization_commands"]:
        assert on_host(command, tmp_path, f"{tmp_path}/bin:/usr/bin:/bin").returncode == 0
    done = [line.split() for line in (tmp_path / "as_root").read_text().splitlines()]
    assert [line[0] for line in done] == ["mkdir", *["mount"] * (not mounted), "chown"]
    assert done[-1] == ["chown", "1000:1000", "/mnt/raygrpo"] and {line[-1] for line in done} == {"/mnt/raygrpo"}
    assert "--volume=/mnt/raygrpo:/runs" in config["docker"]["run_options"]
    for kind in ("cpu", "gpu"):
        assert "--uid 1000 ray" in (CLUSTER / "containers" / f"{kind}.Containerfile").read_text()


@pytest.mark.parametrize("name", CLOUDS)
def test_every_machine_has_an_image_that_is_named(name):
    """Ray has a default for AWS, which is years old."""
    for node_type in read(name)["available_node_types"].values():
        node = node_type["node_config"]
        image = node["ImageId"] if name == "aws" else node["disks"][0]["initializeParams"]["sourceImage"]
        assert image.isupper() and "DOCKER" in image and "NVIDIA" in image, "what is in capitals is to be replaced"
        assert image in (CLUSTER / "README.md").read_text()


@pytest.mark.parametrize(("role", "joins"), [("generator", True), (None, False)])
def test_a_host_joins_with_the_role_in_its_file_and_not_without_one(role, joins, tmp_path):
    """The worker's command as it stands, with a `ray` that writes down what it was told."""
    stand_in(tmp_path / "raygrpo" / ".venv" / "bin" / "ray", 'echo "$RAY_AUTH_MODE $@" > ~/told')
    if role is not None:
        (tmp_path / "raygrpo-role").write_text(role + "\n")
    result = on_host(read("on_premise")["worker_start_ray_commands"][1], tmp_path)
    assert (result.returncode == 0) is joins
    told = Path(tmp_path, "told")
    assert told.exists() is joins
    if joins:
        assert told.read_text().split() == [
            "token", "start", "--address=10.0.0.1:6379", f"--labels={ROLE_LABEL}=generator"
        ]  # fmt: skip


@pytest.mark.parametrize("begun", [False, True])
def test_a_job_goes_on_with_a_run_that_was_begun(begun, tmp_path):
    if begun:
        (tmp_path / "first-latest").mkdir()
    told = ["train", str(CLUSTER / "runs" / "8b.yaml"), "name='first'", f"output_dir={tmp_path}", "seed=1"]
    assert run_or_resume(tmp_path, "8b", "first", "seed=1") == told + ["--resume"] * begun


def run_or_resume(directory: Path, *arguments: str) -> list[str]:
    """What the script calls raygrpo with."""
    stand_in(directory / "raygrpo", 'for argument in "$@"; do echo "$argument"; done')
    command = [CLUSTER / "run_or_resume.sh", *arguments]
    environment = {"PATH": f"{directory}:/usr/bin:/bin", "RUNS_DIR": str(directory)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


@pytest.mark.parametrize("name", ["first", "2", "1e3", "true", "null", "2026-11-26", "0x10"])
def test_any_name_of_a_job_is_text(name, tmp_path):
    _, path, *overrides = run_or_resume(tmp_path, "1.5b", name)
    assert load_config(Path(path), overrides).name == name


@pytest.mark.parametrize("size", SIZES)
def test_the_readmes_table_of_sizes_is_what_the_estimate_says(size):
    config, shape = run_of(size), ModelSize.of(SHAPES[size])
    learner, generator, _ = memory(config, shape, PROMPT_TOKENS)
    [row] = [line for line in (CLUSTER / "README.md").read_text().splitlines() if line.startswith(f"| {size} (ZeRO")]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        f"{size} (ZeRO {config.learner.zero_stage})",
        f"{learner.num_processes} x {learner.num_gpus:g}",
        f"{learner.gpu_share / GIB:.1f}",
        f"{generator.num_processes}..{config.generator.max_actors} x {generator.num_gpus:g}",
        f"{generator.gpu_share / GIB:.1f}",
        f"{object_store_bytes(config, shape) / GIB:.1f}",
    ]
