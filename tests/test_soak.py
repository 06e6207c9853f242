"""What `make soak` calls growth: more than a tolerance between the first and the last third after the warm-up."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tests.soak import Sample, growth, look, report


def samples(memory_mb, files=lambda i: 100, processes=lambda i: 20, num=40) -> list[Sample]:
    return [
        Sample(
            10.0 * i,
            i,
            memory_mb=Counter({"learner": memory_mb(i), "driver": 400}),
            files=Counter({"learner": files(i)}),
            processes=Counter({"learner": processes(i)}),
        )
        for i in range(num)
    ]


def test_a_warm_up_and_ups_and_downs_are_no_growth():
    steady = samples(lambda i: min(500, 100 * i) + 10 * (i % 3), files=lambda i: 100 + i % 5)
    assert growth(steady) == []
    assert "last third" in report(steady)


@pytest.mark.parametrize(
    ("leak", "said"),
    [
        ({"memory_mb": lambda i: 500 + 2 * i}, "memory of learner grew"),
        ({"memory_mb": lambda i: 500, "files": lambda i: 100 + i}, "files grew by"),
        ({"memory_mb": lambda i: 500, "processes": lambda i: 20 + i // 10}, "processes grew"),
    ],
)
def test_a_leak_is_found(leak, said):
    [problem] = growth(samples(**leak))
    assert said in problem


def test_too_short_a_run_says_nothing():
    with pytest.raises(ValueError, match="too few"):
        growth(samples(lambda i: 1, num=4))


def test_what_this_process_holds_is_seen():
    held = b"x" * 50_000_000
    before = look(os.getpid(), 0.0, 0)
    more = bytearray(b"x") * 100_000_000
    descriptors = [os.open(os.devnull, os.O_RDONLY) for _ in range(7)]
    after = look(os.getpid(), 1.0, 1)
    for descriptor in descriptors:
        os.close(descriptor)
    assert after.memory_mb["driver"] - before.memory_mb["driver"] == pytest.approx(100, abs=10)
    assert after.files["driver"] - before.files["driver"] == 7
    assert len(held) + len(more) == 150_000_000
