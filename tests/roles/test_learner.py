"""How a run is cut into segments, from wherever it begins, and where it is not begun."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raygrpo.roles.learner import SEGMENT, TAIL, LearnerSetup, learn, segments
from raygrpo.types import RunStopped
from tests.conftest import run_config


@given(num_steps=st.integers(1, 30), every=st.integers(1, 12), first_step=st.integers(0, 30))
def test_segments_cover_every_step_once_and_their_datasets_hold_them(num_steps, every, first_step):
    config = run_config(num_steps=num_steps, checkpoint={"every": every})
    datasets = {SEGMENT: every if num_steps >= every else 0, TAIL: num_steps % every}  # as train.py makes them
    covered = []
    for name, start, end in segments(config, first_step):
        assert 0 < end - start <= datasets[name]
        assert end % every == 0 or end == num_steps, "where a whole run has its checkpoints too"
        covered += range(start, end)
    assert covered == list(range(first_step, num_steps))


def test_a_learner_on_a_node_without_the_runs_directory_stops_the_run(tmp_path):
    nothing = cast(Any, None)
    setup = LearnerSetup(
        config=run_config(),
        link=nothing,
        prompts_digest="",
        checkpoint_dir=str(tmp_path / "run-1" / "checkpoints"),
        export_dir="",
    )
    with pytest.raises(RunStopped, match=r"run-1 is not there on .*: set output_dir to storage that all nodes share"):
        learn(setup, nothing)
