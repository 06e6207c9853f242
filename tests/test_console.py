"""What is seen of a run while it goes."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from raygrpo.console import LINE_PERIOD_S, RECENT_STEPS, LineWatcher, Pace, format_time, show_progress
from tests.conftest import run_config


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def metrics(seconds: float, reward: float = 0.25) -> dict[str, float]:
    return {
        "reward/mean": reward,
        "staleness/max": 1.0,
        "perf/tokens_per_s": 1234.4,
        "timing_s/step": seconds,
    }


def test_time_left_is_that_of_the_steps_left_at_the_pace_of_the_recent_ones():
    clock = Clock()
    pace = Pace(100, clock)
    assert pace.left_s is None and pace.describe() == ""
    pace.on_step(0, metrics(60.0))  # started the stream
    assert pace.left_s == 99 * 60.0, "nothing better is known"
    pace.on_step(1, metrics(10.0))
    assert pace.left_s == 98 * 10.0, "the first step is no measure"
    for step in range(2, 2 + RECENT_STEPS):
        pace.on_step(step, metrics(4.0))
    assert pace.left_s == (98 - RECENT_STEPS) * 4.0, "the older steps are forgotten"


def test_time_left_runs_down_during_a_step_and_waits_for_one_that_is_late():
    clock = Clock()
    pace = Pace(3, clock)
    pace.on_step(0, metrics(10.0))
    pace.on_step(1, metrics(10.0))
    assert pace.left_s == 10.0
    clock.now_s += 4.0
    assert pace.left_s == 6.0
    clock.now_s += 400.0
    assert pace.left_s == 0.0
    pace.on_step(2, metrics(404.0))
    assert pace.left_s == 0.0


def test_steps_of_a_resumed_run_count_as_they_were_though_they_are_shown_at_once():
    pace = Pace(10, Clock())
    for step in range(5):
        pace.on_step(step, metrics(3.0))
    assert pace.left_s == 5 * 3.0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (7, "0:07"), (754.2, "12:34"), (3599.7, "1:00:00"), (90061, "25:01:01")]
)
def test_times_read_as_on_a_clock(seconds, text):
    assert format_time(seconds) == text


def test_plain_lines_are_few_and_tell_reward_staleness_speed_and_time_left():
    clock, stream = Clock(), io.StringIO()
    watcher = LineWatcher(run_config(num_steps=40), Console(file=stream, width=80), clock)
    watcher.on_phase("waiting for 2 of 2 generators to load the weights")
    for step in range(40):
        clock.now_s += 1.0
        watcher.on_step(step, metrics(1.0, reward=step / 100))
        if step == 2:
            watcher.on_warning("ticket 42 failed")
    first, *steps = stream.getvalue().splitlines()
    assert first == "    0.0 s  waiting for 2 of 2 generators to load the weights"
    assert steps[0] == "    1.0 s  step 1/40  reward 0.000  staleness 1  1234 tokens/s  0:39 left"
    assert steps[1] == "    3.0 s  warning: ticket 42 failed", "what is no step is said at once"
    assert steps[2] == "    6.0 s  step 6/40  reward 0.050  staleness 1  1234 tokens/s  0:34 left"
    assert steps[-1] == "   40.0 s  step 40/40  reward 0.390  staleness 1  1234 tokens/s  0:00 left", (
        "the last is shown"
    )
    assert len(steps) == 1 + 1 + 39 // LINE_PERIOD_S + 1


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_bar_is_one_line_of_any_terminal(width):
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=True, color_system=None)
    with show_progress(run_config(num_steps=4000), console) as watcher:
        watcher.on_phase("training")
        for step in range(2):
            watcher.on_step(step, metrics(20.0) | {"perf/tokens_per_s": 123456.0})
        watcher._progress.refresh()
        frame = console.render_lines(watcher._progress.get_renderable())
    assert len(frame) == 1
    text = "".join(segment.text for segment in frame[0])
    assert len(text) == width
    if width >= 80:
        for part in ("training", "2/4000", "reward 0.250", "staleness 1", "123456 tokens/s", "22:12:40 left"):
            assert part[:-1] in text, (part, text)
