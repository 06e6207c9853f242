"""What of a project travels with a job, and what its paths become on the cluster.

The project is the git repository that holds the run's YAML, and what travels is what git would commit: files that it
tracks, and new ones that no .gitignore names. Outside a repository it is the YAML's directory, without hidden files,
caches and virtual environments. output_dir never travels.

So the job finds what the repository holds (code, a small model, a small dataset) where the user has it, relative to the
YAML. What lies elsewhere keeps its absolute path and must be there on the cluster. What git ignores inside the project
(data, models) would be missing, and is refused before anything is sent.
"""

from __future__ import annotations

import glob
import json
import os
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from raygrpo.config import RunConfig
from raygrpo.tracking import resolve_tracking_uri

MAX_PACKAGE_BYTES = 500 * 2**20  # Ray keeps packages in the memory of its head, and takes no larger one
NUM_NAMED = 5  # largest files, in a refusal
CACHES = {"__pycache__", "node_modules", "mlruns", "mlartifacts"}
TIMESTAMP = (1980, 1, 1, 0, 0, 0)  # the oldest that a zip file can hold


@dataclass(frozen=True, slots=True)
class Project:
    """A directory and those of its files that travel, as sorted paths relative to it."""

    root: Path
    files: list[str]

    def left_behind(self, path: Path) -> Path | None:
        """A file of this file or directory that does not travel; None where all do. Hidden ones do not count."""
        if not path.is_dir():
            return None if os.path.relpath(path, self.root) in self.files else path
        within = sorted(file for file in path.rglob("*") if file.is_file())
        shown = [file for file in within if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        lacking = [file for file in shown if os.path.relpath(file, self.root) not in self.files]
        return lacking[0] if lacking else None


def find_project(config_path: str | Path, output_dir: str | Path) -> Project:
    """The project of the run's YAML. output_dir is left out."""
    directory = Path(os.path.abspath(config_path)).parent
    top = _git(directory, "rev-parse", "--show-toplevel")
    root = Path(top.strip() if top else directory).resolve()
    files = _git_files(root) if top else _walk(root)
    left_out = os.path.relpath(Path(output_dir).expanduser().resolve(), root)
    files = [file for file in files if not f"{file}{os.sep}".startswith(left_out + os.sep)]
    inside = [file for file in files if (root / file).resolve().is_relative_to(root)]  # a link may lead to any data
    return Project(root, sorted(inside))


def pack(project: Project, target: Path) -> None:
    """Write the project into a zip file. Equal files make an equal one, which Ray then need not be sent again. Raises
    ValueError for more than Ray would take."""
    _check_size(project)
    with zipfile.ZipFile(target, "w") as archive:
        for file in project.files:
            path = project.root / file
            entry = zipfile.ZipInfo(file, TIMESTAMP)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = path.stat().st_mode << 16
            archive.writestr(entry, path.read_bytes(), compresslevel=1)


def job_overrides(
    config: RunConfig, eval_source_keys: dict[str, str], project: Project, job_directory: Path
) -> list[str]:
    """key=value settings that give the job the run's paths as they are meant here. eval_source_keys: see
    config_file.py. job_directory: where in the project the job runs.

    Raises ValueError for a path in the project that does not travel.
    """
    paths = {"output_dir": str(Path(config.output_dir).expanduser().absolute())}
    sets = config.eval.sets if config.eval else {}
    sources = [("model.path", config.model.path), ("data.source", config.data.source)]
    sources += [(eval_source_keys[name], each.data.source) for name, each in sets.items()]
    for setting, value in sources:
        if os.path.isabs(value):
            paths[setting] = _job_path(setting, value, project, job_directory)
    if (config.tracking.uri or "").startswith("sqlite:"):
        paths["tracking.uri"] = resolve_tracking_uri(config)
    # Values are YAML, for which a path may be something else than a text.
    return [f"{key}={path if yaml.safe_load(path) == path else json.dumps(path)}" for key, path in paths.items()]


def _job_path(setting: str, path: str, project: Project, job_directory: Path) -> str:
    """The same file or directory for the job: relative where it travels, absolute where it does not."""
    path = os.path.realpath(path) if not glob.has_magic(path) else path
    if not Path(path).is_relative_to(project.root):
        return path
    matches = sorted(glob.glob(path, recursive=True))
    if not matches:
        raise ValueError(f"{setting}: {path} does not exist")
    for match in matches:
        if lacking := project.left_behind(Path(match)):
            raise ValueError(
                f"{setting}: {lacking} does not travel with the job: git ignores it, or it is in output_dir. Put it "
                f"where the cluster's nodes read it, and set {setting} to that absolute path; or, if it is small, let "
                "git track it"
            )
    relative = os.path.relpath(path, job_directory)
    return relative if relative.startswith("..") else f"./{relative}"


def _check_size(project: Project) -> None:
    sizes = sorted(((project.root / file).stat().st_size, file) for file in project.files)
    total = sum(size for size, _ in sizes)
    if total < MAX_PACKAGE_BYTES:
        return
    largest = "\n".join(f"  {size / 2**20:8.1f} MiB  {file}" for size, file in reversed(sizes[-NUM_NAMED:]))
    raise ValueError(
        f"the project {project.root} has {total / 2**20:.1f} MiB of files that git does not ignore; Ray takes packages "
        f"of up to {MAX_PACKAGE_BYTES / 2**20:g} MiB. Let git ignore what the job does not need, and put data and "
        f"models where the cluster's nodes read them. The largest files:\n{largest}"
    )


def _git_files(root: Path) -> list[str]:
    """Tracked and new files, those of submodules and repositories inside too. A link to a directory is none."""
    listing = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    files = []
    for name in (listing or "").split("\0"):
        path = root / name
        if name and path.is_file():  # not one that is deleted
            files.append(name)
        elif name and path.is_dir() and not path.is_symlink():
            files += [os.path.join(name, inner) for inner in _git_files(path)]
    return list(dict.fromkeys(files))  # an unmerged file is listed once for each side


def _walk(root: Path) -> list[str]:
    files = []
    for directory, names, found in os.walk(root):
        names[:] = [
            name
            for name in names
            if not name.startswith(".") and name not in CACHES and not Path(directory, name, "pyvenv.cfg").exists()
        ]
        paths = [Path(directory, name) for name in found if not name.startswith(".")]
        files += [str(path.relative_to(root)) for path in paths if path.is_file()]
    return files


def _git(directory: Path, *arguments: str) -> str | None:
    """What git answers; None where it is not installed or the directory is in no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
