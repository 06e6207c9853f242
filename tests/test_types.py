"""Groups become Arrow rows and come back as they were."""

import dataclasses
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygrpo.group_table import groups_to_table, scored_groups_to_table, table_to_groups, table_to_scored_groups
from raygrpo.types import Prompt, Reward, Rollout, RolloutGroup, ScoredGroup

ODD_TEXTS = ["", "\x00", "\ufffd\u2028\u0085", "e\u0301 \u00e9", "\U0001f469\u200d\U0001f680", "\u202eabc", '"\\n\\"']
texts = st.sampled_from(ODD_TEXTS) | st.text()
token_ids = st.lists(st.integers(0, 2**31 - 1), max_size=5)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
seconds = st.floats(0, 2e9)
prompts = st.builds(
    Prompt,
    prompt_id=st.integers(0, 2**62),
    prompt_ids=token_ids,
    text=texts,
    answer=json_values,
    row=st.dictionaries(texts, json_values, max_size=3),
)


@st.composite
def rollouts(draw):
    completion_ids = draw(token_ids)
    logprob = st.floats(max_value=0.0, min_value=-1e6, width=32)  # as engines give them
    return Rollout(
        completion_ids=completion_ids,
        behaviour_logprobs=draw(st.lists(logprob, min_size=len(completion_ids), max_size=len(completion_ids))),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        text=draw(texts),
        end_s=draw(seconds),
    )


groups = st.builds(
    RolloutGroup,
    ticket=st.integers(0, 2**62),
    prompt=prompts,
    policy_version=st.integers(0, 10**6),
    rollouts=st.lists(rollouts(), max_size=3),
    generator=texts,
    generate_start_s=seconds,
    generate_end_s=seconds,
    error=texts,
    replacement=st.integers(0, 20),
)
rewards = st.builds(
    Reward,
    total=st.floats(allow_nan=False, allow_infinity=False),
    components=st.lists(st.floats(allow_nan=False), max_size=3),
    error=texts,
)


@st.composite
def scored_groups(draw):
    group = draw(groups)
    size = len(group.rollouts)
    scored = draw(st.lists(rewards, min_size=size, max_size=size))
    return ScoredGroup(group=group, rewards=scored, score_start_s=draw(seconds), score_end_s=draw(seconds))


@settings(deadline=None)
@given(st.lists(groups, max_size=3))
def test_rollout_groups_round_trip(groups):
    back = table_to_groups(groups_to_table(groups))
    assert back == groups
    times = [[[rollout.end_s for rollout in group.rollouts] for group in some] for some in (back, groups)]
    assert times[0] == times[1]  # no part of what a rollout is: == does not compare them


@settings(deadline=None)
@given(st.lists(scored_groups(), max_size=3))
def test_scored_groups_round_trip(groups):
    """Also through Arrow's own serialisation, which is what goes from process to process."""
    table = scored_groups_to_table(groups)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert table_to_scored_groups(pa.ipc.open_stream(sink.getvalue()).read_all()) == groups


def make_group(**changes):
    prompt = Prompt(prompt_id=3, prompt_ids=[1, 2], text="p", answer=None, row={})
    rollout = Rollout(completion_ids=[5], behaviour_logprobs=[-0.5], finish_reason="stop", text="t", end_s=2.0)
    group = RolloutGroup(
        ticket=1,
        prompt=prompt,
        policy_version=0,
        rollouts=[rollout],
        generator="generator-0",
        generate_start_s=1.0,
        generate_end_s=2.0,
    )
    return dataclasses.replace(group, **changes)


def test_a_failed_reward_keeps_nan_in_the_component_that_failed():
    reward = Reward(total=0.0, components=[1.5, math.nan], error="ValueError: no")
    scored = ScoredGroup(group=make_group(), rewards=[reward], score_start_s=0.0, score_end_s=0.0)
    (back,) = table_to_scored_groups(scored_groups_to_table([scored]))
    assert back.rewards[0].components[0] == 1.5
    assert math.isnan(back.rewards[0].components[1])
    assert back.rewards[0].error == "ValueError: no"


def test_a_group_without_rollouts_keeps_its_error():
    group = make_group(rollouts=[], error="no room\nin the engine")
    assert table_to_groups(groups_to_table([group])) == [group]


def test_half_a_surrogate_pair_in_a_message_does_not_stop_the_stream():
    """Python strings can hold what UTF-8 cannot; a user's exception may carry one, e.g. from a file name."""
    group = make_group(rollouts=[], error="no file \ud800.txt")
    reward = Reward(total=0.0, components=[], error="ValueError: \udcff", rationales=["no \udcff"])
    scored = ScoredGroup(group=group, rewards=[reward], score_start_s=0.0, score_end_s=0.0)
    (back,) = table_to_scored_groups(scored_groups_to_table([scored]))
    assert back.group.error == "no file ?.txt"
    assert back.rewards[0].error == "ValueError: ?"
    assert back.rewards[0].rationales == ["no ?"]


def test_log_probabilities_lose_nothing_that_float32_holds():
    values = [float(np.float32(x)) for x in (-1e-7, -0.1, -17.25, -0.0)]
    rollout = Rollout(
        completion_ids=[1, 2, 3, 4], behaviour_logprobs=values, finish_reason="length", text="", end_s=2.0
    )
    (back,) = table_to_groups(groups_to_table([make_group(rollouts=[rollout])]))
    assert back.rollouts[0].behaviour_logprobs == values


def test_groups_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_group().ticket = 2  # type: ignore[misc]
