"""`raygrpo sweep`: the same run with every combination of some settings, one after another.

    output_dir/<name>-sweep-<time>/
      sweep.json                 the combinations, and what became of each
      <name>-00-<time>/          the first one's run, as `raygrpo train` writes it
      ...

Each combination is a `raygrpo train` in a process of its own, so that one that fails leaves the others alone. Their
MLflow runs are nested under that of the sweep, which ends with a table and a picture of all of them.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table

from raygrpo.config import RunConfig
from raygrpo.config_file import load_config
from raygrpo.run_directory import latest_run_directory, new_run_directory
from raygrpo.summary import summarise
from raygrpo.types import StepMetrics

if TYPE_CHECKING:
    from raygrpo.tracking import Tracker

PLAN_FILE = "sweep.json"
FIGURE_FILE = "sweep.png"
OWN_KEYS = ("name", "output_dir", "tracking.uri", "tracking.parent_run")
START_TIMEOUT_S = 120.0  # for MLflow to answer, without which the runs could not be nested
COLUMNS = ["run", "status", "reward first", "reward last", "reward best", "s per step", "tokens/s"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One combination."""

    name: str  # of its run
    overrides: list[str]  # key=value of the settings that are swept
    status: Literal["waiting", "finished", "failed"] = "waiting"


def split_values(text: str) -> list[str]:
    """The values in `a,b,c`: commas inside brackets, braces and quotes belong to a value, as in `[1,2],[3,4]`."""
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and depth == 0:
            values.append("")
            continue
        values[-1] += character
    return values


def combinations(name: str, overrides: Sequence[str]) -> tuple[list[str], list[Trial]]:
    """(settings with one value, a trial for each combination of those with several; the last key varies fastest).

    Raises ValueError where nothing is swept, a value is empty, or a key stands twice or is the sweep's own.
    """
    fixed, swept = [], {}
    for override in overrides:
        key, _, text = override.partition("=")
        values = split_values(text)
        if len(values) == 1:
            fixed.append(override)
        elif not all(value.strip() for value in values):
            raise ValueError(f"{override!r} has an empty value; an empty text is '' in quotes")
        elif key in OWN_KEYS:
            raise ValueError(f"{key} cannot be swept: the sweep gives each run its own place and name")
        elif key in swept:
            raise ValueError(f"{key} is swept twice")
        else:
            swept[key] = [f"{key}={value.strip()}" for value in values]
    if not swept:
        raise ValueError("nothing is swept: give a setting several values, for example seed=0,1,2")
    width = max(2, len(str(len(list(itertools.product(*swept.values()))) - 1)))
    chosen = itertools.product(*swept.values())
    return fixed, [Trial(name=f"{name}-{i:0{width}d}", overrides=list(some)) for i, some in enumerate(chosen)]


def sweep(
    path: Path,
    overrides: Sequence[str],
    console: Console,
    *,
    resume: bool = False,
    options: Sequence[str] = (),
    command: str = "",
) -> bool:
    """Train every combination; True if all of them finished. resume: go on with the newest sweep of this name, whose
    finished runs are skipped. options: of each `raygrpo train`. command: what a user would type to resume.

    Raises ValueError, before anything starts, for settings that are wrong in any combination.
    """
    config = load_config(path, [override for override in overrides if len(split_values(override)) == 1])
    fixed, trials = combinations(config.name, overrides)
    for trial in trials:
        load_config(path, [*fixed, *trial.overrides])
    parent = config.model_copy(update={"name": f"{config.name}-sweep"})
    sweep_dir = latest_run_directory(parent) if resume else new_run_directory(parent)
    trials = _planned(sweep_dir, trials) if resume else trials
    tracker = _parent_run(parent, sweep_dir, command)
    status = "KILLED"
    try:
        links = tracker.links(START_TIMEOUT_S)
        if links.run_id is None:
            raise ValueError(
                f"MLflow at {links.tracking_uri} does not answer: runs could not be nested under the sweep's"
            )
        own = [f"output_dir={json.dumps(str(sweep_dir))}", f"tracking.parent_run={links.run_id}"]
        if config.tracking.uri is None and not os.environ.get("MLFLOW_TRACKING_URI"):
            own.append(f"tracking.uri={json.dumps(links.tracking_uri)}")  # by default a run's lies in its output_dir
        for place, trial in enumerate(trials):
            _write_plan(sweep_dir, trials)
            if trial.status == "finished":
                continue
            console.rule(f"run {place + 1} of {len(trials)}: {' '.join(trial.overrides)}")
            settings = [*fixed, *trial.overrides, *own, f"name={trial.name}"]
            goes_on = ["--resume"] * (sweep_dir / f"{trial.name}-latest").exists()
            done = _train([str(path), *settings, *options, *goes_on])
            trials[place] = replace(trial, status="finished" if done else "failed")
        _write_plan(sweep_dir, trials)
        complete = all(trial.status == "finished" for trial in trials)
        status = "FINISHED" if complete else "FAILED"
    finally:
        rows = _show(sweep_dir, trials, tracker)
        tracker.finish(status)
    _print(rows, trials, console)
    return complete


def _parent_run(config: RunConfig, sweep_dir: Path, command: str) -> Tracker:
    from raygrpo.tracking import Tracker

    tracker = Tracker(
        config, str(sweep_dir), tags={"mlflow.source.name": "raygrpo sweep"}, resume_command=command or None
    )
    tracker.start()
    return tracker


def _planned(sweep_dir: Path, trials: list[Trial]) -> list[Trial]:
    """The trials with what is known of them. Raises ValueError where the sweep had other ones."""
    try:
        plan = [Trial(**entry) for entry in json.loads((sweep_dir / PLAN_FILE).read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{sweep_dir / PLAN_FILE} cannot be read: {error}") from None
    before, now = ([trial.overrides for trial in some] for some in (plan, trials))
    if before != now:
        raise ValueError(f"the sweep in {sweep_dir} has other combinations: begin a new one without --resume")
    return plan


def _write_plan(sweep_dir: Path, trials: list[Trial]) -> None:
    partial = sweep_dir / f"{PLAN_FILE}.partial"
    partial.write_text(json.dumps([asdict(trial) for trial in trials], indent=1) + "\n")
    os.replace(partial, sweep_dir / PLAN_FILE)


def _train(arguments: list[str]) -> bool:
    """Whether the run came to its end."""
    process = subprocess.Popen([sys.executable, "-m", "raygrpo", "train", *arguments])
    try:
        return process.wait() == 0
    except KeyboardInterrupt:  # the child got it too, and keeps what it has
        process.wait()
        raise


def _show(sweep_dir: Path, trials: list[Trial], tracker: Tracker) -> list[list[Any]]:
    """Put the table and the picture of what there is onto the sweep's page; returns the table's rows."""
    from raygrpo.tracking import read_history
    from raygrpo.tracking.figures import draw_comparison

    histories = {trial.name: read_history(str(sweep_dir / f"{trial.name}-latest")) for trial in trials}
    rows = [_row(trial, histories[trial.name]) for trial in trials]
    keys = [override.partition("=")[0] for override in trials[0].overrides]
    tracker.log_table("sweep.json", [*keys, *COLUMNS], rows)
    curves = {" ".join(trial.overrides): histories[trial.name] for trial in trials if histories[trial.name]}
    if curves:
        draw_comparison(curves, "reward/mean", sweep_dir / FIGURE_FILE)
        tracker.log_artifact(str(sweep_dir / FIGURE_FILE))
    return rows


def _row(trial: Trial, history: dict[int, StepMetrics]) -> list[Any]:
    values = [override.partition("=")[2] for override in trial.overrides]
    facts: list[float | None] = [None] * 5
    if history:
        summary = summarise(history)
        tokens = sum(metrics.get("completions/num_tokens", 0.0) for metrics in history.values())
        seconds = summary.step_s or float("nan")
        facts = [summary.reward_first, summary.reward_last, summary.reward_best]
        facts += [seconds / len(history), tokens / seconds]
    return [*values, trial.name, trial.status, *(None if f is None or f != f else round(f, 4) for f in facts)]


def _print(rows: list[list[Any]], trials: list[Trial], console: Console) -> None:
    table = Table()
    for column in [*(re.sub(r".*\.", "", o.partition("=")[0]) for o in trials[0].overrides), *COLUMNS]:
        table.add_column(column, overflow="fold", no_wrap=column in ("run", "status"))  # nothing is cut off
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    console.print(table)
