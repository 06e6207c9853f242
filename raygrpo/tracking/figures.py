"""The picture of a run: does it learn, does it still have something to learn from, and how long are its answers."""

from __future__ import annotations

import math
import os
import threading
from array import array
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raygrpo.tracking.journal import Record
from raygrpo.types import StepMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, BLUE, ORANGE, GREEN, GRID = "#333333", "#2563eb", "#d97706", "#059669", "#e5e7eb"
EVAL_COLORS = ("#db2777", "#7c3aed", "#0d9488")
DRAWN = (
    "reward/mean",
    "reward/std",
    "reward/frac_zero_std",
    "completions/mean_length",
    "completions/clipped_ratio",
)


def smooth(values: np.ndarray, span: int) -> np.ndarray:
    """Exponential moving average of values [N], weight 2 / (span + 1), unbiased at its start; NaN is no observation."""
    decay = 1.0 - 2.0 / (span + 1.0)
    smoothed, total, weight = np.empty(len(values)), 0.0, 0.0
    for i, value in enumerate(values):
        total, weight = total * decay, weight * decay
        if np.isfinite(value):
            total, weight = total + (1.0 - decay) * value, weight + (1.0 - decay)
        smoothed[i] = total / weight if weight > 0 else np.nan
    return smoothed


class RewardCurve:
    """Reward, dead groups and lengths by step; a step that is added again replaces what it said before.

    Thread-safe. Holds some 300 bytes a step, and what was measured in between (`eval/`).
    """

    def __init__(self, name: str):
        """name: of the run, for the title."""
        self._name = name
        self._steps: dict[int, array[float]] = {}  # step -> the values of DRAWN
        self._evals: dict[str, dict[int, float]] = {}  # metric -> step -> value
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Steps that were added, with a reward or without."""
        return len(self._steps)

    def add(self, record: Record) -> None:
        with self._lock:
            values = self._steps.setdefault(record.step, array("d", [math.nan] * len(DRAWN)))
            for place, metric in enumerate(DRAWN):
                values[place] = record.metrics.get(metric, values[place])
            for metric, value in record.metrics.items():
                if is_eval_reward(metric):
                    self._evals.setdefault(metric, {})[record.step] = value

    def draw(self, path: Path) -> bool:
        """Write the figure to `path` (PNG); False, and no file, where no step has a reward yet."""
        with self._lock:
            kept = sorted(step for step, values in self._steps.items() if not math.isnan(values[0]))
            columns = np.array([self._steps[step] for step in kept]).reshape(len(kept), len(DRAWN))
            evals = {metric: sorted(points.items()) for metric, points in self._evals.items()}
        if not kept:
            return False
        figure = _figure(self._name, np.array(kept), dict(zip(DRAWN, columns.T, strict=True)), evals)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.png")
        figure.savefig(partial)
        os.replace(partial, path)  # a reader never sees half a picture
        return True


def is_eval_reward(metric: str) -> bool:
    """Whether it is the mean reward of an evaluation, which belongs into the picture of the reward."""
    return metric.startswith("eval/") and metric.endswith("/reward")


def _figure(
    name: str, steps: np.ndarray, series: dict[str, np.ndarray], evals: dict[str, list[tuple[int, float]]]
) -> Figure:
    """steps and each of `series`: [N]; evals: metric -> (step, value)."""
    from matplotlib.backends.backend_agg import (
        FigureCanvasAgg,
    )  # a canvas of our own: pyplot's state is not for threads
    from matplotlib.figure import Figure

    span = max(5, len(steps) // 12)
    figure = Figure(figsize=(9, 6.4), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    reward, dead, length = figure.subplots(3, 1, sharex=True, height_ratios=[3.2, 1, 1.2])
    mean = series["reward/mean"]
    trend = smooth(mean, span)
    spread = smooth(series["reward/std"], span)
    figure.suptitle(
        f"{name}: reward {trend[0]:.2f} → {trend[-1]:.2f} in {len(steps)} steps", color=INK, fontsize=13, weight="bold"
    )

    reward.fill_between(
        steps, trend - spread, trend + spread, color=BLUE, alpha=0.12, lw=0, label="± std between completions"
    )
    reward.plot(steps, mean, color=BLUE, alpha=0.35, lw=1, marker="o", ms=2.5, label="each step")
    reward.plot(steps, trend, color=BLUE, lw=2.4, label=f"smoothed over {span} steps")
    for color, (metric, points) in zip(cycle(EVAL_COLORS), evals.items()):
        reward.plot(*zip(*points, strict=True), color=color, lw=1.6, marker="D", ms=4, label=metric)
    reward.set_ylabel("reward")
    reward.legend(loc="best", frameon=False, fontsize=8)

    dead.plot(steps, 100 * series["reward/frac_zero_std"], color=ORANGE, lw=1.4)
    dead.set_ylim(-4, 104)
    dead.set_ylabel("groups with\nequal rewards, %")

    length.plot(steps, series["completions/mean_length"], color=GREEN, lw=1.4, label="mean length")
    length.set_ylabel("completion\ntokens")
    clipped = length.twinx()
    clipped.plot(steps, 100 * series["completions/clipped_ratio"], color=INK, lw=1, ls=":", label="cut off")
    clipped.set_ylim(-4, 104)
    clipped.set_ylabel("cut off, %")
    length.set_xlabel("step")
    for axes in (reward, dead, length, clipped):
        _tidy(axes, grid=axes is not clipped)
    length.xaxis.get_major_locator().set_params(integer=True)
    return figure


def draw_comparison(runs: dict[str, dict[int, StepMetrics]], metric: str, path: Path) -> None:
    """One metric of several runs (name -> metrics by step), smoothed, to `path` (PNG)."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colors = colormaps["turbo"](np.linspace(0.08, 0.92, len(runs)))
    for color, (name, history) in zip(colors, runs.items(), strict=True):
        steps = np.array([step for step, metrics in history.items() if metric in metrics])
        values = np.array([history[step][metric] for step in steps])
        axes.plot(steps, values, color=color, alpha=0.2, lw=1)
        axes.plot(steps, smooth(values, max(5, len(steps) // 12)), color=color, lw=2, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel(metric)
    axes.legend(loc="best", frameon=False, fontsize=8)
    _tidy(axes, grid=True)
    figure.savefig(path)


def _tidy(axes: Axes, *, grid: bool) -> None:
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(side == "bottom" and grid)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=INK, labelsize=8, length=0)
    axes.yaxis.label.set(color=INK, fontsize=9)
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.margins(x=0.01)
    if grid:
        axes.grid(axis="y", color=GRID, lw=0.8)
        axes.set_axisbelow(True)
