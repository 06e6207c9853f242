"""What a run shows on the screen while it goes: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from raygrpo.config import AlgorithmConfig, RunConfig
from raygrpo.presets import preset_fields

if TYPE_CHECKING:
    from raygrpo.train import Watcher
    from raygrpo.types import StepMetrics

LINE_PERIOD_S = 5.0  # between lines about steps: in a long run all of them would bury what else is said
RECENT_STEPS = 20  # that tell how long the others will take
STEP_LINE = re.compile(r" *[\d.]+ s  step (\d+)/(\d+)  (.*)")  # as LineWatcher writes it


@contextmanager
def show_progress(config: RunConfig, console: Console) -> Iterator[Watcher]:
    """A watcher that shows the run on the console."""
    if not console.is_terminal:
        yield LineWatcher(config, console)
        return
    pace = Pace(config.num_steps)
    with _progress(console, _TimeLeft(pace)) as progress:
        yield BarWatcher(config, progress, pace)


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


def _progress(console: Console, *further: ProgressColumn) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.fields[phase]}", markup=False),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),  # what the others leave
        MofNCompleteColumn(),
        TextColumn("{task.description}", markup=False),
        *further,
        console=console,
        expand=True,
        refresh_per_second=4,
    )


def print_preset(algorithm: AlgorithmConfig, console: Console) -> None:
    """What the chosen preset set, and what of it the run's own settings overrode; nothing without a preset."""
    for field in preset_fields(algorithm):
        console.print(f"preset {algorithm.preset}: {field}", highlight=False, markup=False, soft_wrap=True)


def describe_step(metrics: StepMetrics) -> str:
    """The figures of a step that one looks at while it runs."""
    return (
        f"reward {metrics['reward/mean']:.3f}  staleness {metrics['staleness/max']:.0f}  "
        f"{metrics['perf/tokens_per_s']:.0f} tokens/s"
    )


class Pace:
    """How long the steps that are left will take, if they take as long as the last ones did."""

    def __init__(self, num_steps: int, clock: Callable[[], float] = time.monotonic):
        self._num_steps = num_steps
        self._clock = clock
        self._num_left = num_steps
        self._seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._num_seen = 0
        self._step_s = 0.0  # when the last one was seen

    def on_step(self, step: int, metrics: StepMetrics) -> None:
        self._num_left = self._num_steps - step - 1
        self._step_s = self._clock()
        self._num_seen += 1
        if self._num_seen == 2:
            self._seconds.clear()  # the first has waited for the stream to start
        self._seconds.append(metrics["timing_s/step"])

    @property
    def left_s(self) -> float | None:
        """None before the first step."""
        if not self._seconds:
            return None
        mean_s = sum(self._seconds) / len(self._seconds)
        under_way_s = min(mean_s, self._clock() - self._step_s)
        return max(0.0, self._num_left * mean_s - under_way_s)

    def describe(self) -> str:
        left_s = self.left_s
        return "" if left_s is None else f"{format_time(left_s)} left"


def format_time(seconds: float) -> str:
    """As one reads a clock: 0:07, 12:34, 3:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _TimeLeft(ProgressColumn):
    def __init__(self, pace: Pace):
        super().__init__(Column(no_wrap=True))
        self._pace = pace

    def render(self, task: Task) -> Text:
        return Text(self._pace.describe(), style="progress.remaining")


def describe_evaluation(version: int, metrics: StepMetrics) -> str:
    """The mean reward of each set."""
    rewards = {name: value for name, value in metrics.items() if re.fullmatch(r"eval/[^/]+/reward", name)}
    shown = ", ".join(f"{name.split('/')[1]} {value:.3f}" for name, value in rewards.items())
    return f"{shown} after {version} steps"


class BarWatcher:
    """One line that moves, and warnings above it."""

    def __init__(self, config: RunConfig, progress: Progress, pace: Pace):
        self._progress = progress
        self._pace = pace
        self._task = progress.add_task("", total=config.num_steps, phase=config.name)

    def on_phase(self, text: str) -> None:
        self._progress.update(self._task, phase=text)

    def on_link(self, title: str, address: str) -> None:
        self._progress.console.print(f"{title}: {address}", markup=False, highlight=False, soft_wrap=True)

    def on_step(self, step: int, metrics: StepMetrics) -> None:
        self._pace.on_step(step, metrics)
        self._progress.update(self._task, completed=step + 1, description=describe_step(metrics))

    def on_evaluation(self, version: int, metrics: StepMetrics) -> None:
        text = f"evaluation: {describe_evaluation(version, metrics)}"
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def on_warning(self, text: str) -> None:
        self._progress.console.print(text, style="yellow", markup=False, highlight=False)


class LineWatcher:
    """Lines for logs and pipes: what changes, and every few seconds the step."""

    def __init__(self, config: RunConfig, console: Console, clock: Callable[[], float] = time.monotonic):
        self._num_steps = config.num_steps
        self._console = console
        self._clock = clock
        self._start_s = clock()
        self._pace = Pace(config.num_steps, clock)
        self._line_s = -LINE_PERIOD_S

    def on_phase(self, text: str) -> None:
        self._say(text)

    def on_link(self, title: str, address: str) -> None:
        self._say(f"{title}: {address}")

    def on_step(self, step: int, metrics: StepMetrics) -> None:
        self._pace.on_step(step, metrics)
        is_last = step + 1 == self._num_steps
        if is_last or self._clock() >= self._line_s + LINE_PERIOD_S:
            self._line_s = self._clock()
            self._say(f"step {step + 1}/{self._num_steps}  {describe_step(metrics)}  {self._pace.describe()}")

    def on_evaluation(self, version: int, metrics: StepMetrics) -> None:
        self._say(f"evaluation: {describe_evaluation(version, metrics)}")

    def on_warning(self, text: str) -> None:
        self._say(f"warning: {text}")

    def _say(self, text: str) -> None:
        line = f"{self._clock() - self._start_s:7.1f} s  {text}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
