"""Where the time of a step went, from the intervals in which its stages ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Interval = tuple[float, float]  # start and end, seconds


def covered_seconds(intervals: Sequence[Interval], start_s: float, end_s: float) -> float:
    """Length of the intervals' union within [start_s, end_s]."""
    covered, reached = 0.0, start_s
    for low, high in sorted(intervals):
        low, high = max(low, reached), min(high, end_s)
        if high > low:
            covered += high - low
            reached = high
    return covered


def stage_seconds(stages: Mapping[str, Sequence[Interval]], start_s: float, end_s: float) -> dict[str, float]:
    """Seconds of the step [start_s, end_s] in which each stage was at work, `step`, and `other`: those in which none
    was.

    Stages that overlap count each for itself, so the stages may add up to more than the step.
    """
    seconds = {name: covered_seconds(intervals, start_s, end_s) for name, intervals in stages.items()}
    everything = [interval for intervals in stages.values() for interval in intervals]
    return seconds | {"step": end_s - start_s, "other": end_s - start_s - covered_seconds(everything, start_s, end_s)}
