"""Where the time of a step went, also where its stages work for several steps at once."""

from __future__ import annotations

import pytest

from raygrpo.roles.step_report import StepTimes, merge_times


def test_sampling_for_later_steps_counts_in_the_step_that_it_overlaps():
    """A step of 10 s whose own groups were sampled before it began, while generators sample for the next."""
    times = StepTimes(wait=(100.0, 101.0), learn=(101.0, 109.0), generate=[(90.0, 98.0)], score=[(98.0, 98.5)])
    alone = times.metrics([(109.0, 110.0)], None, [], 100.0, 110.0)
    assert (alone["timing_s/generate"], alone["timing_s/other"]) == (0.0, 1.0)
    beside = times.metrics([(109.0, 110.0)], None, [(95.0, 100.5), (102.0, 104.0), (103.0, 108.0)], 100.0, 110.0)
    assert (beside["timing_s/generate"], beside["timing_s/other"]) == (6.5, 0.5)
    assert beside["timing_s/learn"] == 8.0 and beside["perf/learner_idle_fraction"] == pytest.approx(0.1)


def test_ranks_wait_until_the_last_has_its_groups_and_learn_until_the_last_is_done():
    ranks = [
        StepTimes(wait=(0.0, 2.0), learn=(2.0, 7.0), generate=[(0.0, 1.0)], score=[(1.0, 1.5)]),
        StepTimes(wait=(0.5, 3.0), learn=(3.0, 6.0), generate=[(0.0, 2.0)], score=[(2.0, 2.5)]),
    ]
    merged = merge_times(ranks)
    assert (merged.wait, merged.learn) == ((0.0, 3.0), (2.0, 7.0))
    assert merged.generate == [(0.0, 1.0), (0.0, 2.0)] and merged.score == [(1.0, 1.5), (2.0, 2.5)]
