"""Unions of intervals, against counting on a grid."""

from hypothesis import given
from hypothesis import strategies as st

from raygrpo.timeline import covered_seconds, stage_seconds

moment = st.integers(-20, 20)
interval = st.tuples(moment, moment)  # some end before they start: they cover nothing
stages = st.dictionaries(st.sampled_from(["generate", "reward", "learn", "publish"]), st.lists(interval, max_size=6))


def seconds_by_counting(intervals, start, end):
    """Unit cells [t, t + 1] of the step that some interval covers."""
    return sum(any(low <= t and t + 1 <= high for low, high in intervals) for t in range(start, end))


@given(st.lists(interval, max_size=8), moment, st.integers(0, 30))
def test_covered_seconds_is_the_length_of_the_union_within_the_step(intervals, start, length):
    assert covered_seconds(intervals, start, start + length) == seconds_by_counting(intervals, start, start + length)


@given(stages, moment, st.integers(0, 30))
def test_stages_and_other_account_for_the_whole_step(stages, start, length):
    end = start + length
    seconds = stage_seconds(stages, start, end)
    everything = [i for intervals in stages.values() for i in intervals]
    assert seconds["step"] == length
    assert seconds["other"] == length - seconds_by_counting(everything, start, end)
    for name, intervals in stages.items():
        assert seconds[name] == seconds_by_counting(intervals, start, end)
    # No second is lost: what is not `other` is covered by at least one stage, and by one alone where none overlap.
    assert seconds["step"] <= sum(seconds.get(name, 0) for name in stages) + seconds["other"]


def test_overlapping_stages_each_count_for_themselves():
    seconds = stage_seconds({"generate": [(0.0, 6.0)], "learn": [(4.0, 9.0)], "publish": [(11.0, 15.0)]}, 1.0, 12.0)
    assert seconds == {"generate": 5.0, "learn": 5.0, "publish": 1.0, "step": 11.0, "other": 2.0}
