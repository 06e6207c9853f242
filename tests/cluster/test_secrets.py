"""cluster/kuberay/make_secrets.sh: what it makes, and that it can be run again."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cluster.shapes import CLUSTER

SCRIPT = CLUSTER / "kuberay" / "make_secrets.sh"
NAMES = ["raygrpo-ray-token", "raygrpo-valkey", "raygrpo-postgres", "raygrpo-object-store"]
KUBECTL = """#!/usr/bin/env bash
# Keeps secrets as files, and like kubectl refuses to make one twice.
set -eu
cd "$SECRETS"
case $1 in
    get) for name in *; do [ -e "$name" ] && echo "secret/$name" || true; done ;;
    create)
        if [ -e "$4" ]; then
            echo "Error from server (AlreadyExists): secrets \\"$4\\" already exists" >&2
            exit 1
        fi
        printf "%s\\n" "${@:5}" > "$4"
        ;;
esac
"""


@pytest.fixture
def secrets(tmp_path) -> Path:
    """A directory with a file for each secret of the cluster."""
    directory = tmp_path / "secrets"
    directory.mkdir()
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    return directory


def make(secrets: Path, *options: str) -> list[str]:
    """Run the script; the names that it makes."""
    before = set(secrets.iterdir())
    environment = {"PATH": f"{secrets.parent}:/usr/bin:/bin", "SECRETS": str(secrets)}
    result = subprocess.run([SCRIPT, *options], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return sorted(path.name for path in set(secrets.iterdir()) - before)


def test_what_exists_stays_and_what_is_missing_is_made(secrets):
    assert make(secrets) == sorted(NAMES)
    first = {path.name: path.read_text() for path in secrets.iterdir()}
    assert all(text.startswith("--namespace\nraygrpo\n--from-literal=") for text in first.values())
    assert make(secrets) == []
    assert {path.name: path.read_text() for path in secrets.iterdir()} == first
    for name in NAMES:  # as where the script was interrupted
        (secrets / name).unlink()
        assert make(secrets) == [name]
        assert (secrets / name).read_text() != first[name]
    again = {path.name: path.read_text() for path in secrets.iterdir()}
    assert set(again) == set(NAMES)


def test_options_go_to_kubectl(secrets):
    make(secrets, "--save-config")
    assert all(path.read_text().endswith("\n--save-config\n") for path in secrets.iterdir())


def test_the_object_stores_keys_are_those_that_mlflow_is_given(secrets):
    make(secrets)
    made = dict(
        line.removeprefix("--from-literal=").split("=", 1)
        for line in (secrets / "raygrpo-object-store").read_text().splitlines()
        if line.startswith("--from-literal=")
    )
    [identity] = json.loads(made["s3.json"])["identities"]
    assert identity["credentials"] == [{"accessKey": made["access_key"], "secretKey": made["secret_key"]}]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl makes secrets")
def test_secrets_are_random_and_made_in_the_namespace():
    """A dry run shows all of them, and asks no cluster."""
    script = [SCRIPT, "--dry-run=client", "-o", "json"]
    outputs = [subprocess.run(script, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert outputs[0] != outputs[1]
    decoder, text, secrets = json.JSONDecoder(), outputs[0].lstrip(), []
    while text:
        secret, end = decoder.raw_decode(text)
        secrets.append(secret)
        text = text[end:].lstrip()
    assert len(secrets) == 4 and {secret["metadata"]["namespace"] for secret in secrets} == {"raygrpo"}
