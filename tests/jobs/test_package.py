"""Which files of a project travel with a job, and what a run's paths become in the copy."""

from __future__ import annotations

import os
import shlex
import subprocess
import zipfile
from pathlib import Path

import pytest
import yaml

from raygrpo.config_file import load_config
from raygrpo.jobs import package
from raygrpo.jobs.client import plan
from raygrpo.jobs.package import find_project, pack
from tests.conftest import TINY_RUN

REPOSITORY = Path(__file__).parents[2]


def git(directory: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    subprocess.run(["git", *identity, *arguments], cwd=directory, check=True, capture_output=True)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A repository with a run in `tasks/`, its small model and data tracked, a large model and data ignored."""
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "project"
    settings = {key: value for key, value in TINY_RUN.items() if key != "name"}
    settings |= {"model": {"path": "small"}, "data": {"source": "rows.jsonl"}}
    write(
        root,
        {
            "tasks/run.yaml": yaml.safe_dump(settings),
            "tasks/rows.jsonl": "{}\n",
            "tasks/small/config.json": "{}",
            "tasks/gone.py": "",
            "models/large/config.json": "{}",
            "big.jsonl": "{}\n",
            ".gitignore": "models/\nbig.jsonl\n.venv/\n",
            ".venv/bin/python": "",
        },
    )
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "all")
    (root / "tasks/gone.py").unlink()
    write(root, {"tasks/reward.py": "new", "runs/run-1/checkpoints/weights": "large", "tasks/__init__.py": ""})
    monkeypatch.chdir(root)
    return root


def planned(*overrides: str, config: str = "tasks/run.yaml", **options):
    return plan(Path(config), list(overrides), None, **({"resume": False} | options))


def in_the_copy(submission, copy: Path, monkeypatch):
    """The configuration that the job would load, in an unpacked package that lies elsewhere."""
    pack(submission.project, copy.with_suffix(".zip"))
    zipfile.ZipFile(copy.with_suffix(".zip")).extractall(copy)
    directory, _, command = submission.entrypoint.rpartition(" && ")
    monkeypatch.chdir(copy / directory.removeprefix("cd ") if directory else copy)
    program, verb, config, *overrides = shlex.split(command)
    assert (program, verb) == ("raygrpo", "train")
    return load_config(config, [override for override in overrides if override != "--resume"])


# What travels.


def test_what_git_would_commit_travels(project):
    files = find_project("tasks/run.yaml", "runs").files
    expected = {"run.yaml", "rows.jsonl", "small/config.json", "reward.py", "__init__.py"}
    assert set(files) == {".gitignore"} | {f"tasks/{name}" for name in expected}


def test_output_dir_stays_even_where_git_tracks_it(project):
    git(project, "add", "runs")
    checkpoint = "runs/run-1/checkpoints/weights"
    assert checkpoint not in find_project("tasks/run.yaml", project / "runs").files
    assert checkpoint in find_project("tasks/run.yaml", "elsewhere").files


def test_links_bring_nothing_from_outside(project, tmp_path):
    write(tmp_path, {"storage/data.jsonl": "much"})
    (project / "storage").symlink_to(tmp_path / "storage")
    (project / "data.jsonl").symlink_to(tmp_path / "storage/data.jsonl")
    (project / "inner").symlink_to("tasks/reward.py")
    files = find_project("tasks/run.yaml", "runs").files
    assert "inner" in files and "data.jsonl" not in files and not any("storage" in file for file in files)


def test_a_repository_inside_travels_by_its_own_rules(project):
    write(project, {"lib/code.py": "", "lib/.gitignore": "weights\n", "lib/weights": "large"})
    git(project / "lib", "init", "-q")
    git(project / "lib", "add", ".")
    files = find_project("tasks/run.yaml", "runs").files
    assert "lib/code.py" in files and "lib/weights" not in files


def test_outside_a_repository_hidden_files_caches_and_environments_stay(tmp_path):
    write(
        tmp_path,
        {"run.yaml": "", "a/reward.py": "", ".env": "", ".cache/x": "", "a/__pycache__/x": "", "env/pyvenv.cfg": ""},
    )
    assert find_project(tmp_path / "run.yaml", tmp_path / "runs").files == ["a/reward.py", "run.yaml"]


def test_equal_projects_make_equal_packages(project, tmp_path):
    (project / "tasks/reward.py").chmod(0o755)
    pack(find_project("tasks/run.yaml", "runs"), tmp_path / "1.zip")
    for path in project.rglob("*.py"):
        os.utime(path, (1, 1))
    pack(find_project("tasks/run.yaml", "runs"), tmp_path / "2.zip")
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    entry = zipfile.ZipFile(tmp_path / "1.zip").getinfo("tasks/reward.py")
    assert entry.external_attr >> 16 & 0o777 == 0o755


def test_a_project_too_large_for_ray_names_its_largest_files(project, tmp_path, monkeypatch):
    monkeypatch.setattr(package, "MAX_PACKAGE_BYTES", 2**20)
    pack(find_project("tasks/run.yaml", "runs"), tmp_path / "small.zip")
    write(project, {"tasks/weights.bin": "x" * 3 * 2**19})
    with pytest.raises(ValueError, match=r"(?s)1\.5 MiB of files .* up to 1 MiB.*1\.5 MiB  tasks/weights\.bin"):
        pack(find_project("tasks/run.yaml", "runs"), tmp_path / "large.zip")


# What paths become.


def test_paths_in_the_project_are_those_of_the_copy(project, tmp_path, monkeypatch):
    config = in_the_copy(planned(), tmp_path / "copy", monkeypatch)
    assert config.model.path == str(tmp_path / "copy/tasks/small")
    odd = in_the_copy(planned("output_dir='/shared/a: b #1'"), tmp_path / "odd", monkeypatch)
    assert odd.output_dir == "/shared/a: b #1"
    monkeypatch.chdir(project)
    assert config.data.source == str(tmp_path / "copy/tasks/rows.jsonl")
    assert config.output_dir == str(project / "runs"), "not in the copy"


@pytest.mark.parametrize("here", [".", "tasks", ".."])
def test_overrides_mean_the_same_from_any_directory(project, tmp_path, monkeypatch, here):
    write(project, {"tasks/other.jsonl": "", "tasks/more/config.json": ""})
    monkeypatch.chdir(project / here)
    relative = os.path.relpath(project / "tasks", Path.cwd())
    overrides = [f"data.source={relative}/*.jsonl", f"model={{path: ./{relative}/more}}", "output_dir=out"]
    submission = planned(*overrides, config=f"{relative}/run.yaml")
    config = in_the_copy(submission, tmp_path / "copy", monkeypatch)
    assert config.data.source == str(tmp_path / "copy/tasks/*.jsonl")
    assert config.model.path == str(tmp_path / "copy/tasks/more")
    assert config.output_dir == str((project / here / "out").resolve())


@pytest.mark.parametrize("here", [".", "tasks", ".."])
def test_data_of_evaluations_is_found_from_any_directory(project, tmp_path, monkeypatch, here):
    write(project, {"held.jsonl": ""})
    write(tmp_path, {"storage/hard.jsonl": ""})
    (project / "linked").symlink_to(tmp_path / "storage")
    monkeypatch.chdir(project / here)
    root = os.path.relpath(project, Path.cwd())
    single = planned(f"eval.data.source={root}/held.jsonl", "eval.every=5", config=f"{root}/tasks/run.yaml")
    evaluation = in_the_copy(single, tmp_path / "copy", monkeypatch).eval
    assert evaluation is not None and evaluation.every == 5
    assert evaluation.sets["held_out"].data.source == str(tmp_path / "copy/held.jsonl")

    monkeypatch.chdir(project / here)
    names = {"near": "held.jsonl", "far": "linked/hard.jsonl"}
    sets = [f"eval.sets.{name}.data.source={root}/{file}" for name, file in names.items()]
    several = planned(*sets, "eval.every=7", config=f"{root}/tasks/run.yaml")
    evaluation = in_the_copy(several, tmp_path / "again", monkeypatch).eval
    assert evaluation is not None and evaluation.every == 7
    assert evaluation.sets["near"].data.source == str(tmp_path / "again/held.jsonl")
    assert evaluation.sets["far"].data.source == str(tmp_path / "storage/hard.jsonl"), "it stays where it is"


def test_paths_outside_the_project_and_names_stay(project, tmp_path, monkeypatch):
    write(tmp_path, {"models/config.json": ""})
    (project / "linked").symlink_to(tmp_path / "models")
    submission = planned("model.path=./linked", "data.source=openai/gsm8k", "output_dir=/shared/runs")
    config = in_the_copy(submission, tmp_path / "copy", monkeypatch)
    assert config.model.path == str(tmp_path / "models")
    assert config.data.source == "openai/gsm8k"
    assert config.output_dir == "/shared/runs"


def test_data_and_models_that_git_ignores_are_refused(project):
    with pytest.raises(
        ValueError, match=r"model\.path: .*/large/config\.json does not travel with the job: git ignores it"
    ):
        planned("model.path=models/large")
    with pytest.raises(ValueError, match=r"data\.source: .*/big\.jsonl does not travel .* absolute path"):
        planned("data.source=big.jsonl")
    with pytest.raises(ValueError, match=r"data\.source: .*/big\.jsonl does not travel"):
        planned("data.source=./*.jsonl")
    with pytest.raises(ValueError, match=r"eval\.data\.source: .*/big\.jsonl does not travel"):
        planned("eval.data.source=big.jsonl")
    with pytest.raises(ValueError, match=r"data\.source: .*/none\.jsonl does not exist"):
        planned("data.source=none.jsonl")
    write(project, {"half/config.json": "{}", "half/weights.bin": "", "half/.DS_Store": "", "half/.gitignore": "*.bin"})
    with pytest.raises(ValueError, match=r"half/weights\.bin does not travel"):
        planned("model.path=half")
    write(project, {"models/run.yaml": (project / "tasks/run.yaml").read_text()})
    with pytest.raises(ValueError, match=r"models/run\.yaml does not travel"):
        planned("model.path=tasks/small", "data.source=tasks/rows.jsonl", config="models/run.yaml")


def test_the_quickstart_brings_its_model(monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    config = in_the_copy(planned(config="pipelines/quickstart.yaml"), tmp_path / "copy", monkeypatch)
    assert (tmp_path / "copy/pipelines/juice_bar.py").exists()
    assert (Path(config.model.path) / "model.safetensors").is_relative_to(tmp_path / "copy")
    assert (Path(config.model.path) / "model.safetensors").stat().st_size > 10**6


# The rest of what is sent.


def test_a_relative_output_dir_is_probed_and_an_absolute_one_is_not(project):
    assert Path(planned().probe or "").parent == project / "runs"
    assert planned("output_dir=/shared/runs").probe is None


def test_where_runs_are_tracked_goes_along(project, monkeypatch):
    assert "MLFLOW_TRACKING_URI" not in planned().env_vars
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert planned().env_vars["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert "MLFLOW_TRACKING_URI" not in planned("tracking.uri=http://other:5000").env_vars
    absolute = planned("tracking.uri=sqlite:///tracked.db").entrypoint
    assert f"tracking.uri=sqlite:///{project}/tracked.db" in absolute


def test_resuming_is_said_to_the_job_and_to_the_user(project):
    first = plan(Path("tasks/run.yaml"), ["seed=1"], "http://head:8265", resume=False)
    assert "--resume" not in first.entrypoint
    assert first.resume_command == "raygrpo submit tasks/run.yaml seed=1 --address http://head:8265 --resume"
    assert planned("seed=1", resume=True).entrypoint.endswith(" --resume")
