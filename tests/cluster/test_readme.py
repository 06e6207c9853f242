"""cluster/README.md: commands that cannot be run here are at least commands of the programs that they name."""

from __future__ import annotations

import re
import shlex
import warnings

import pytest
from mlflow.cli import cli as mlflow_cli
from mlflow.server.security_utils import get_default_allowed_hosts, is_allowed_host_header

from tests.cluster.shapes import CLUSTER

README = (CLUSTER / "README.md").read_text()


def commands(program: str) -> list[list[str]]:
    """Lines of the code blocks that call the program, as words; continued lines are joined."""
    lines = README.replace("\\\n", " ").splitlines()
    code = [line.strip() for line in lines if line.startswith("    ")]
    variables = dict(re.findall(r"^([A-Z]+)='(.*)'$", "\n".join(code), flags=re.MULTILINE))
    for name, value in variables.items():
        code = [line.replace(f"${name}", value) for line in code]
    words = [shlex.split(line, comments=True) for line in code if re.match(rf"\S*\b{program} ", line)]
    return [line for line in words if line[0].rpartition("/")[2] == program]


def mlflow_servers() -> list[list[str]]:
    on_hosts = [command[1:] for command in commands("mlflow")]
    in_containers = [
        shlex.split(word)[1:] for command in commands("ray") for word in command if "mlflow server" in word
    ]
    return on_hosts + in_containers


def test_both_kinds_of_head_have_the_command_of_an_mlflow_server():
    assert [arguments[0] for arguments in mlflow_servers()] == ["server", "server"]


@pytest.mark.parametrize("arguments", mlflow_servers())
def test_the_mlflow_server_is_reached_from_other_nodes_and_keeps_what_it_has_on_the_shared_directory(arguments):
    context = mlflow_cli.commands["server"].make_context("server", arguments[1:])
    assert context.params["host"] == "0.0.0.0" and context.params["port"] == 5000
    assert context.params["backend_store_uri"] == "sqlite:////runs/mlflow.db"
    assert context.params["artifacts_destination"].startswith("/runs/")


def test_who_the_mlflow_server_answers_is_as_said():
    hosts = get_default_allowed_hosts()
    for known in ("localhost:5000", "10.0.0.1:5000", "172.16.0.1:5000", "172.31.0.1:5000", "192.168.1.1:5000"):
        assert is_allowed_host_header(hosts, known)
    assert not is_allowed_host_header(hosts, "head:5000") and "--allowed-hosts=NAME:5000" in README


def test_commands_of_ray_have_the_options_that_are_given():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray Serve's, which is imported with it
        from ray.scripts.scripts import cli as ray_cli
    in_text = [shlex.split(command) for command in re.findall(r"`(ray (?:attach|up|down|dashboard) [^`]+)`", README)]
    given = commands("ray") + in_text
    assert {command[1] for command in given} == {"exec", "get-auth-token", "attach", "up", "down", "dashboard"}
    for _, name, *arguments in given:
        ray_cli.commands[name].make_context(name, arguments)


def test_files_that_are_named_exist():
    named = set(re.findall(r"(?<![\w/])cluster/[\w./-]*\w", README))
    assert "cluster/kuberay/jobs/8b" in named
    assert [path for path in sorted(named) if not (CLUSTER.parent / path).exists()] == []
