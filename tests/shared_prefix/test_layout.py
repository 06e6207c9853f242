"""Streams and plans: every token once, at its position, seeing exactly its own sequence's past."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raygrpo.shared_prefix import Segment, SharedPrefixBatch
from raygrpo.shared_prefix.tree import prompt_tree

tokens = st.integers(0, 3)
groups_of_ids = st.lists(
    st.tuples(st.lists(tokens, min_size=1, max_size=6), st.lists(st.lists(tokens, max_size=5), max_size=4)),
    min_size=1,
    max_size=5,
)


@st.composite
def forests(draw):
    """Segments with parents before children; roots are not empty."""
    segments = []
    for index in range(draw(st.integers(1, 10))):
        parent = draw(st.none() | st.integers(0, index - 1)) if index else None
        ids = draw(st.lists(tokens, min_size=parent is None, max_size=4))
        segments.append(Segment(ids, parent))
    return segments


def path(segments, index):
    """All tokens from the root to the end of a segment."""
    segment = segments[index]
    above = [] if segment.parent is None else path(segments, segment.parent)
    return [*above, *segment.ids]


def seen_by_calls(batch):
    """[T, T] how often each row sees each key, from the attention calls alone."""
    counts = torch.zeros(batch.num_tokens, batch.num_tokens, dtype=torch.long)
    row = 0
    for length in batch.plan.own.q_lens:
        counts[row : row + length, row : row + length] += torch.ones(length, length, dtype=torch.long).tril()
        row += length
    for call in batch.plan.above:
        q, k = call.q_start, call.k_start
        for q_len, k_len in zip(call.q_lens, call.k_lens, strict=True):
            counts[q : q + q_len, k : k + k_len] += 1
            q, k = q + q_len, k + k_len
    return counts


def check_stream(batch, sequences):
    """sequences: (all ids, how many of them are context) of each completion."""
    seen = seen_by_calls(batch)
    assert seen.max() <= 1  # no key twice
    assert seen.sum(1).tolist() == (batch.position_ids + 1).tolist()  # all of a token's past
    splits = zip(batch.split(batch.token_rows), batch.split(batch.targets), sequences, strict=True)
    for index, (rows, targets, (ids, context)) in enumerate(splits):
        assert targets.tolist() == ids[context:]
        for offset, row in enumerate(rows.tolist()):
            visible = seen[row].nonzero()[:, 0]
            visible = visible[batch.position_ids[visible].argsort()]
            assert batch.input_ids[visible].tolist() == ids[: context + offset]
            assert batch.position_ids[visible].tolist() == list(range(context + offset))
        if len(ids) > context:
            assert batch.sequence(index) == (ids, context)


@settings(max_examples=150, deadline=None)
@given(groups_of_ids, st.none() | st.integers(1, 3), st.booleans())
def test_each_completion_token_is_predicted_from_exactly_its_past(groups, min_shared_head, share):
    share = share or not any(members for _, members in groups)  # without sharing, nothing but completions is encoded
    batch = SharedPrefixBatch.from_groups(groups, share=share, min_shared_head=min_shared_head)
    sequences = [([*prompt, *member], len(prompt)) for prompt, members in groups for member in members]
    check_stream(batch, sequences)
    assert batch.group_sizes == tuple(len(members) for _, members in groups)


@settings(max_examples=150, deadline=None)
@given(forests())
def test_each_tree_token_is_predicted_from_exactly_its_past(segments):
    batch = SharedPrefixBatch.from_tree(segments)
    scored = [index for index, segment in enumerate(segments) if segment.parent is not None]
    check_stream(batch, [(path(segments, i), len(path(segments, i)) - len(segments[i].ids)) for i in scored])
    assert batch.num_tokens == sum(len(segment.ids) for segment in segments)


@settings(max_examples=150, deadline=None)
@given(forests(), st.integers(1, 6))
def test_a_window_shows_each_token_its_last_keys(segments, window):
    plan = SharedPrefixBatch.from_tree(segments).plan
    call, key_rows = plan.windowed(window)
    assert sum(call.q_lens) == sum(plan.own.q_lens) and sum(call.k_lens) == len(key_rows)
    row = key = 0
    for q_len, k_len in zip(call.q_lens, call.k_lens, strict=True):
        keys = key_rows[key : key + k_len]
        for offset in range(q_len):
            stop = k_len - q_len + offset + 1
            segment = sum(start <= row + offset for start in plan.starts) - 1
            position = row + offset - plan.starts[segment]
            expected = plan.key_rows(segment)[: plan.offsets[segment] + position + 1][-window:]
            assert torch.equal(keys[max(0, stop - window) : stop], expected)
        row, key = row + q_len, key + k_len


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(tokens, min_size=1, max_size=8), min_size=1, max_size=8), st.integers(1, 4))
def test_prompt_tree_spells_every_prompt_and_shares_all_long_heads(prompts, min_shared):
    segments, ends = prompt_tree(prompts, min_shared)
    for prompt, end in zip(prompts, ends, strict=True):
        assert path(segments, end) == prompt
    assert all(len(segment.ids) for segment in segments)
    # With min_shared 1 the tree is a radix tree: as many tokens as there are distinct prompt beginnings.
    if min_shared == 1:
        beginnings = {tuple(prompt[: n + 1]) for prompt in prompts for n in range(len(prompt))}
        assert sum(len(segment.ids) for segment in segments) == len(beginnings)


@settings(max_examples=150, deadline=None)
@given(groups_of_ids, st.none() | st.integers(1, 3))
def test_the_last_layer_queries_the_rows_that_predict_and_few_others(groups, min_shared_head):
    batch = SharedPrefixBatch.from_groups(groups, min_shared_head=min_shared_head)
    plan = batch.plan.last_layer
    read = plan.query_rows.tolist()
    assert set(batch.token_rows.tolist()) <= set(read)
    assert sorted([*read, *plan.other_rows.tolist()]) == list(range(batch.num_tokens))
    prompts, completions = len(batch.plan.parents), batch.num_completion_tokens
    lone = sum(len(prompt) for prompt, members in groups if sum(map(bool, members)) == 1)  # is one with its completion
    assert len(read) <= prompts + completions + lone
    # Each query sees what it saw before.
    seen = seen_by_calls(batch)
    counts = torch.zeros(len(read), batch.num_tokens, dtype=torch.long)
    q = 0
    for start, k_len, q_len in zip(plan.starts, plan.own.k_lens, plan.own.q_lens, strict=True):
        for offset in range(k_len - q_len, k_len):
            counts[q, start : start + offset + 1] += 1
            q += 1
    for call in plan.above:
        q, k = call.q_start, call.k_start
        for q_len, k_len in zip(call.q_lens, call.k_lens, strict=True):
            counts[q : q + q_len, k : k + k_len] += 1
            q, k = q + q_len, k + k_len
    assert torch.equal(counts, seen[read])


def test_two_levels_are_contiguous_views_and_one_call():
    batch = SharedPrefixBatch.from_groups([([1] * 3, [[2] * 2, [3] * 4]), ([4] * 5, [[5], [6] * 2, [7] * 3])])
    (call,) = batch.plan.above
    assert (call.q_start, call.q_lens, call.k_start, call.k_lens) == (8, (6, 6), 0, (3, 5))
    assert batch.input_ids.tolist() == [1] * 3 + [4] * 5 + [2] * 2 + [3] * 4 + [5] + [6] * 2 + [7] * 3


def test_a_lone_completion_needs_no_second_call():
    batch = SharedPrefixBatch.from_groups([([1, 2], [[3, 4]]), ([5], [[], [6]])])
    assert batch.plan.above == ()
    assert batch.plan.own.q_lens == (4, 2)


def test_per_token_values_go_back_and_forth():
    batch = SharedPrefixBatch.from_groups([([1], [[2, 3], []]), ([4], [[5, 6, 7]])])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert [x.tolist() for x in batch.split(values)] == [[1.0, 2.0], [], [3.0, 4.0, 5.0]]
    assert batch.expand(torch.tensor([10.0, 20.0, 30.0])).tolist() == [10.0, 10.0, 30.0, 30.0, 30.0]
    assert batch.sum_by_completion(values).tolist() == [3.0, 0.0, 12.0]
    assert batch.pad(values, fill=-1.0).tolist() == [[1.0, 2.0, -1.0], [-1.0] * 3, [3.0, 4.0, 5.0]]


def test_bad_input_says_which():
    with pytest.raises(ValueError, match="prompt of group 1 is empty"):
        SharedPrefixBatch.from_groups([([1], [[2]]), ([], [[3]])])
    with pytest.raises(ValueError, match="segment 1 names parent 1"):
        SharedPrefixBatch.from_tree([Segment([1]), Segment([2], 1)])
    with pytest.raises(ValueError, match="segment 0 is an empty root"):
        SharedPrefixBatch.from_tree([Segment([])])
    with pytest.raises(ValueError, match="no tokens to encode"):
        SharedPrefixBatch.continuing([1], [[]])
    with pytest.raises(ValueError, match="no tokens to encode"):
        SharedPrefixBatch.from_groups([])
    with pytest.raises(ValueError, match="min_shared_head is 0"):
        SharedPrefixBatch.from_groups([([1], [[2]])], min_shared_head=0)
