"""What a run shows on the screen while it goes: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from raygrpo.config import AlgorithmConfig, RunConfig
from raygrpo.presets import preset_fields

if TYPE_CHECKING:
    from raygrpo.train import Watcher
    from raygrpo.types import StepMetrics


STEP_LINE = re.compile(r" *[\d.]+ s  step (\d+)/(\d+)  (.*)")  # as LineWatcher writes it


@contextmanager
def show_progress(config: RunConfig, console: Console) -> Iterator[Watcher]:
    """A watcher that shows the run on the console."""
    if not console.is_terminal:
        yield LineWatcher(config, console)
        return
    with _progress(console) as progress:
        yield BarWatcher(config, progress)


@contextmanager
def show_log(console: Console) -> Iterator[Callable[[str], None]]:
    """Shows the lines of another run's log (LineWatcher's among them) on the console: on a terminal the steps move a
    bar, and the other lines pass above it."""
    if not console.is_terminal:
        yield lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    with _progress(console) as progress:
        task = progress.add_task("", total=None, phase="waiting for the first step")

        def show(line: str) -> None:
            if step := STEP_LINE.match(line):
                completed, total, description = step.groups()
                progress.update(
                    task, completed=int(completed), total=int(total), phase="training", description=description
                )
            else:
                progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

        yield show


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.fields[phase]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def print_preset(algorithm: AlgorithmConfig, console: Console) -> None:
    """What the chosen preset set, and what of it the run's own settings overrode; nothing without a preset."""
    for field in preset_fields(algorithm):
        console.print(f"preset {algorithm.preset}: {field}", highlight=False, markup=False, soft_wrap=True)


def describe_step(metrics: StepMetrics) -> str:
    """The figures of a step that one looks at while it runs."""
    return (
        f"reward {metrics['reward/mean']:.3f}  {metrics['completions/mean_length']:.0f} tokens long  "
        f"staleness {metrics['staleness/max']:.0f}  {metrics['perf/tokens_per_s']:.0f} tokens/s"
    )


class BarWatcher:
    """One line that moves, and warnings above it."""

    def __init__(self, config: RunConfig, progress: Progress):
        self._progress = progress
        self._task = progress.add_task("", total=config.num_steps, phase=config.name)

    def on_phase(self, text: str) -> None:
        self._progress.update(self._task, phase=text)

    def on_link(self, title: str, address: str) -> None:
        self._progress.console.print(f"{title}: {address}", markup=False, highlight=False, soft_wrap=True)

    def on_step(self, step: int, metrics: StepMetrics) -> None:
        self._progress.update(self._task, completed=step + 1, description=describe_step(metrics))

    def on_warning(self, text: str) -> None:
        self._progress.console.print(text, style="yellow", markup=False, highlight=False)


class LineWatcher:
    """A line for each step, for logs and pipes."""

    def __init__(self, config: RunConfig, console: Console):
        self._num_steps = config.num_steps
        self._console = console
        self._start_s = time.monotonic()

    def on_phase(self, text: str) -> None:
        self._say(text)

    def on_link(self, title: str, address: str) -> None:
        self._say(f"{title}: {address}")

    def on_step(self, step: int, metrics: StepMetrics) -> None:
        self._say(f"step {step + 1}/{self._num_steps}  {describe_step(metrics)}")

    def on_warning(self, text: str) -> None:
        self._say(f"warning: {text}")

    def _say(self, text: str) -> None:
        line = f"{time.monotonic() - self._start_s:7.1f} s  {text}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
