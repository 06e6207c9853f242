"""What a finished run says on the terminal: did it learn, what did it cost, where is everything."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from raygrpo.tracking import Links
from raygrpo.types import StepMetrics

FIRST_STEPS, LAST_STEPS = 5, 10  # compared with each other; fewer in a run of under 30 steps
CHART_WIDTH, CHART_HEIGHT = 60, 6  # characters
BAR_WIDTH = 24
STAGES = {  # as in timing_s/*
    "generate": "generating",
    "reward": "scoring",
    "learn": "learning",
    "publish": "publishing weights",
    "evaluate": "evaluating",
    "other": "anything else",
}
EIGHTHS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A metric of evaluations: of the first policy that was evaluated, of the last, and of the best."""

    first: float
    first_version: int
    last: float
    last_version: int
    best: float
    best_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """A run in numbers. What a run did not measure is NaN or 0."""

    num_steps: int
    num_first: int  # steps averaged into reward_first
    num_last: int
    reward_first: float
    reward_last: float
    reward_best: float  # of a single step
    tokens_encoded: float  # by the learners, each prompt once for its group
    tokens_repeated: float  # had every completion brought its own prompt
    step_s: float  # all steps together
    stage_s: dict[str, float]  # seconds in which the stage was at work; stages overlap when max_staleness > 0
    evaluated: dict[str, Progress]  # metric of evaluations of which more is better -> how it went

    @property
    def token_ratio(self) -> float:
        return self.tokens_repeated / self.tokens_encoded if self.tokens_encoded else math.nan

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"token_ratio": self.token_ratio}


def summarise(history: dict[int, StepMetrics], evaluations: dict[int, StepMetrics] | None = None) -> RunSummary:
    """The numbers of a run from its metrics by step, and from those of its evaluations by version."""
    rewards = _rewards(history)
    num_first = max(1, min(FIRST_STEPS, len(rewards) // 3))
    num_last = max(1, min(LAST_STEPS, len(rewards) // 3))

    def total(name: str) -> float:
        return math.fsum(value for metrics in history.values() if math.isfinite(value := metrics.get(name, 0.0)))

    return RunSummary(
        num_steps=len(rewards),
        num_first=num_first,
        num_last=num_last,
        reward_first=statistics.fmean(rewards[:num_first]) if rewards else math.nan,
        reward_last=statistics.fmean(rewards[-num_last:]) if rewards else math.nan,
        reward_best=max(rewards, default=math.nan),
        tokens_encoded=total("prefix/tokens_encoded"),
        tokens_repeated=total("prefix/tokens_repeated"),
        step_s=total("timing_s/step"),
        stage_s={stage: s for stage in STAGES if (s := total(f"timing_s/{stage}")) or stage != "evaluate"},
        evaluated=_progress(evaluations or {}),
    )


def _progress(evaluations: dict[int, StepMetrics]) -> dict[str, Progress]:
    names = dict.fromkeys(name for metrics in evaluations.values() for name in metrics if _more_is_better(name))
    progress = {}
    for name in names:
        values = {version: metrics[name] for version, metrics in sorted(evaluations.items()) if name in metrics}
        first, last, best = min(values), max(values), max(values, key=lambda version: values[version])
        progress[name] = Progress(
            first=values[first],
            first_version=first,
            last=values[last],
            last_version=last,
            best=values[best],
            best_version=best,
        )
    return progress


def _more_is_better(name: str) -> bool:
    metric = name.rpartition("/")[2]
    return name.startswith("eval/") and (metric == "reward" or metric.startswith("pass_at_"))


def print_summary(
    console: Console,
    history: dict[int, StepMetrics],
    links: Links,
    *,
    name: str,
    evaluations: dict[int, StepMetrics] | None = None,
    export_dir: str | None = None,
    best_checkpoint: str | None = None,
    seconds: float | None = None,
) -> None:
    """Print it. evaluations: by version. export_dir: the trained policy, if any. seconds: how long the run took,
    start-up included."""
    summary = summarise(history, evaluations)
    title = f"{name}: {summary.num_steps} steps in {duration(summary.step_s)}"
    if seconds is not None:
        title += f" ({duration(seconds)} with start-up)"
    console.rule(Text(title, style="bold"))
    if summary.num_steps == 0:
        console.print("No step was trained.", style="yellow")
    else:
        _print_reward(console, summary, history)
        _print_evaluations(console, summary)
        _print_costs(console, summary)
    _print_faults(console, history)
    _print_places(console, links, export_dir, best_checkpoint)


def chart(values: Sequence[float], width: int, height: int) -> list[str]:
    """`values` as `height` lines of at most `width` columns, with an axis from min(0, lowest) to the highest value.

    More values than columns: a column shows the mean of its share of them.
    """
    width = min(width, len(values))
    edges = [len(values) * column // width for column in range(width + 1)]
    means = [statistics.fmean(values[low:high]) for low, high in itertools.pairwise(edges)]
    bottom, top = min(0.0, *means), max(0.0, *means)
    scale = height * 8 / (top - bottom) if top > bottom else 0.0
    eighths = [round((mean - bottom) * scale) for mean in means]
    labels = {0: f"{top:.2f}", height - 1: f"{bottom:.2f}"}
    margin = max(map(len, labels.values()))
    lines = []
    for row in range(height):
        base = 8 * (height - 1 - row)
        bars = "".join(EIGHTHS[min(8, max(0, value - base))] for value in eighths)
        lines.append(f"{labels.get(row, ''):>{margin}} ┤{bars}")
    return lines


def duration(seconds: float) -> str:
    """4.2 s, 3 min 12 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _rewards(history: dict[int, StepMetrics]) -> list[float]:
    means = [metrics.get("reward/mean", math.nan) for metrics in history.values()]
    return [mean for mean in means if math.isfinite(mean)]


def _print_reward(console: Console, summary: RunSummary, history: dict[int, StepMetrics]) -> None:
    better = summary.reward_last > summary.reward_first
    line = Text.assemble(
        ("reward  ", "bold"),
        f"{summary.reward_first:.3f}",
        (f" ({_steps('first', summary.num_first)})", "dim"),
        "  →  ",
        (f"{summary.reward_last:.3f}", "bold green" if better else "bold yellow"),
        (f" ({_steps('last', summary.num_last)}; best step {summary.reward_best:.3f})", "dim"),
    )
    console.print(line)
    rewards = _rewards(history)
    for row in chart(rewards, min(CHART_WIDTH, console.width - 12), CHART_HEIGHT):
        console.print(Text(f"  {row}", style="blue"), no_wrap=True)
    console.print()


def _print_evaluations(console: Console, summary: RunSummary) -> None:
    for name, progress in summary.evaluated.items():
        better = progress.last > progress.first
        line = Text.assemble(
            (f"{name}  ", "bold"),
            f"{progress.first:.3f}",
            (f" (after {progress.first_version} steps)", "dim"),
            "  →  ",
            (f"{progress.last:.3f}", "bold green" if better else "bold yellow"),
            (f" (after {progress.last_version}; best {progress.best:.3f} after {progress.best_version})", "dim"),
        )
        console.print(line, soft_wrap=True)
    if summary.evaluated:
        console.print()


def _print_costs(console: Console, summary: RunSummary) -> None:
    if summary.tokens_encoded:
        console.print(
            Text.assemble(
                ("tokens  ", "bold"),
                f"{summary.tokens_encoded:,.0f} encoded by the learners; {summary.tokens_repeated:,.0f} if every "
                "completion had brought its own prompt ",
                (f"({summary.token_ratio:.2f}x)", "bold green"),
            )
        )
        console.print()
    if not summary.step_s:
        return
    table = Table(box=None, padding=(0, 2, 0, 0), title="where the time of the steps went", title_justify="left")
    for heading, justify in (("", "left"), ("seconds", "right"), ("a step", "right"), ("share", "right"), ("", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for stage, seconds in summary.stage_s.items():
        share = seconds / summary.step_s
        bar = "█" * round(BAR_WIDTH * min(share, 1.0))
        table.add_row(
            STAGES[stage],
            f"{seconds:.1f}",
            f"{seconds / summary.num_steps:.2f}",
            f"{share:.0%}",
            Text(bar, style="blue"),
        )
    console.print(table)
    if math.fsum(summary.stage_s.values()) > 1.005 * summary.step_s:
        console.print("Stages overlap, so the shares add up to more than 100 %.", style="dim")
    console.print()


def _print_faults(console: Console, history: dict[int, StepMetrics]) -> None:
    counts: dict[str, int] = {}
    for metrics in history.values():
        for metric, value in metrics.items():
            if metric.startswith("faults/") and value:
                counts[metric] = counts.get(metric, 0) + 1
    for metric, count in sorted(counts.items()):
        console.print(f"{metric} was not 0 in {_steps('', count).strip()}", style="yellow", highlight=False)


def _print_places(console: Console, links: Links, export_dir: str | None, best_checkpoint: str | None) -> None:
    places = {"model": export_dir, "checkpoint": best_checkpoint, "reward curve": links.figure}
    if links.ui_command:
        places |= {"MLflow": links.ui_command, "": links.run_url}
    else:
        places["MLflow"] = links.run_url or links.tracking_uri
    for title, place in places.items():
        if place:  # one long line each, so that it can be copied
            console.print(Text.assemble((f"{title:<14}", "bold"), place), soft_wrap=True)
    if links.undelivered:
        text = f"{links.undelivered} steps and files are not in MLflow yet; deliver them with"
        console.print(
            f"{text}\n  python -m raygrpo.tracking {links.spool}", style="yellow", soft_wrap=True, highlight=False
        )


def _steps(which: str, count: int) -> str:
    return f"{which} step" if count == 1 and which else f"{which} {count} step{'s' if count > 1 else ''}"
