"""Runs that a study compares: started as a user starts them, and found again when the study is repeated."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from raygrpo.config import RunConfig
from raygrpo.config_file import load_config
from raygrpo.summary import FIRST_STEPS, LAST_STEPS
from raygrpo.types import StepMetrics

REPOSITORY = Path(__file__).parents[1]
QUICKSTART = REPOSITORY / "pipelines" / "quickstart.yaml"
QUIET = [f"tracking.{key}=0" for key in ("samples_every", "num_traces", "figure_every")] + [
    "tracking.system_metrics=false"
]


def study_arguments(description: str | None, output: str) -> argparse.ArgumentParser:
    """What every study asks for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--output", type=Path, default=REPOSITORY / output, help=f"where runs go; default: {output}")
    parser.add_argument("--steps", type=int, help="of each run; default: as in the YAML")
    return parser


def train(name: str, overrides: Sequence[str], output: Path, yaml_path: Path = QUICKSTART) -> list[StepMetrics]:
    """The metrics of each step of `raygrpo train`, from a process of its own, or from the run of this name in `output`
    if one was finished with the same settings. Raises RuntimeError with the end of what a failed run said."""
    overrides = [*overrides, *QUIET, f"name={name}", f"output_dir={output.absolute()}"]
    wanted = load_config(yaml_path, overrides)
    directory = output.absolute() / f"{name}-latest"
    if not _is_finished(directory, wanted):
        print(f"{name}: training", file=sys.stderr, flush=True)
        output.mkdir(parents=True, exist_ok=True)
        command = [str(Path(sys.executable).parent / "raygrpo"), "train", str(yaml_path), *overrides]
        with open(output / f"{name}.log", "w") as log:
            code = subprocess.run(command, cwd=output, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        if code:
            tail = "\n".join((output / f"{name}.log").read_text().splitlines()[-20:])
            raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{tail}")
    return _history(directory)


def _history(directory: Path) -> list[StepMetrics]:
    steps = {}  # a run that went on from a checkpoint has written some steps twice
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "reward/mean" in entry["metrics"]:  # else an evaluation's
            steps[entry["step"]] = entry["metrics"]
    return [steps[step] for step in sorted(steps)]


def _is_finished(directory: Path, wanted: RunConfig) -> bool:
    if not (directory / "metrics.jsonl").exists():
        return False
    try:
        found = RunConfig.model_validate(yaml.safe_load((directory / "config.yaml").read_text()))
    except (OSError, ValueError):
        return False
    watched = {"tracking", "checkpoint"}  # sections that change nothing of what is learnt
    same = found.model_dump(exclude=watched) == wanted.model_dump(exclude=watched)
    return same and len(_history(directory)) == wanted.num_steps


@dataclass(frozen=True)
class Summary:
    """One setting over several seeds: mean, lowest and highest of a seed."""

    first: tuple[float, float, float]  # reward of the first FIRST_STEPS steps
    last: tuple[float, float, float]  # reward of the last LAST_STEPS steps
    seconds: float  # of a step, without the first, which waits for engines and stream

    @classmethod
    def of(cls, rewards: Sequence[Sequence[float]], seconds: Sequence[Sequence[float]]) -> Summary:
        """rewards, seconds: of each seed, by step."""

        def over_seeds(values: list[float]) -> tuple[float, float, float]:
            return statistics.fmean(values), min(values), max(values)

        return cls(
            first=over_seeds([statistics.fmean(run[:FIRST_STEPS]) for run in rewards]),
            last=over_seeds([statistics.fmean(run[-LAST_STEPS:]) for run in rewards]),
            seconds=statistics.fmean(value for run in seconds for value in run[1:]),
        )

    def cells(self) -> list[str]:
        """For a row under "first 5", "last 10", "s per step"."""
        ranges = [f"{mean:.3f} ({low:.3f} to {high:.3f})" for mean, low, high in (self.first, self.last)]
        return [*ranges, f"{self.seconds:.2f}"]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
