"""What a run shows on the screen: a live bar on a terminal, plain lines elsewhere, and the summary at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeft

from raygrpo.config import RunConfig

if TYPE_CHECKING:
    from raygrpo.train import RunResult
    from raygrpo.types import StepMetrics

OnStep = Callable[[int, "StepMetrics"], None]
OnPhase = Callable[[str], None]


@contextmanager
def show_progress(config: RunConfig) -> Iterator[tuple[OnStep, OnPhase]]:
    """Functions to call as the run proceeds: after each step with its metrics, and at each phase with its name."""
    console = Console(stderr=True)
    if console.is_terminal:
        with _bar(console, config) as functions:
            yield functions
    else:
        yield _lines(config)


def describe_step(metrics: StepMetrics) -> str:
    """The figures of a step that one looks at while it runs."""
    return (
        f"reward {metrics['reward/mean']:.3f}  length {metrics['completions/mean_length']:.0f}  "
        f"staleness {metrics['staleness/max']:.0f}  {metrics['perf/tokens_per_s']:.0f} tokens/s"
    )


@contextmanager
def _bar(console: Console, config: RunConfig) -> Iterator[tuple[OnStep, OnPhase]]:
    columns = [SpinnerColumn(), TextColumn(config.name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")]
    with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeLeft(), console=console) as progress:
        task = progress.add_task("", total=config.num_steps)
        yield (
            lambda step, metrics: progress.update(task, completed=step + 1, description=describe_step(metrics)),
            lambda phase: progress.update(task, description=phase),
        )


def _lines(config: RunConfig) -> tuple[OnStep, OnPhase]:
    start_s = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start_s:6.1f} s] {text}", file=sys.stderr, flush=True)

    return lambda step, metrics: say(f"step {step + 1}/{config.num_steps}  {describe_step(metrics)}"), say


def print_summary(config, result):
    print(result.run_dir, result.links)
