"""Any cut of any groups into streams and parts gives the same losses and gradients; packing loses nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raygrpo.shared_prefix import (
    PassCounts,
    Segment,
    SharedPrefixBatch,
    accumulate_gradients,
    assign_to_ranks,
    enable_shared_prefix,
    pack,
    plan_passes,
    score_completions,
)
from raygrpo.shared_prefix.packing import num_stream_tokens
from tests.shared_prefix.tiny import (
    float64_norms,
    gradients,
    largest_difference,
    ragged_groups,
    random_ids,
    reference,
    tiny_model,
    weighted,
)

g0 = torch.Generator().manual_seed(0)
GROUPS = [*ragged_groups(), (random_ids(10, g0), [random_ids(n, g0) for n in (9, 0, 4, 9, 7, 1, 9, 2, 9)])]
NUM_TOKENS = sum(len(member) for _, members in GROUPS for member in members)
WEIGHTS = torch.randn(2, NUM_TOKENS, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def loss_fn(logprobs, part):
    """Not linear, so that a wrong token or a wrong log-probability shows; and it looks at whole completions."""
    tokens = (logprobs * WEIGHTS[0, part.tokens]).sum() + (part.entropy * WEIGHTS[1, part.tokens]).sum()
    return tokens + sum(x.sum().exp() for x in logprobs.split(part.lengths) if len(x))


def accumulated(model, max_tokens, **options):
    model.zero_grad(set_to_none=True)
    result = accumulate_gradients(model, GROUPS, loss_fn, max_tokens, entropy=True, temperature=0.8, **options)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return result, found


@pytest.fixture(scope="module")
def expected():
    """Loss, log-probabilities, entropies and gradients by one forward per completion, in float64 throughout."""
    model = tiny_model()
    with float64_norms(model):
        logprobs, entropy = reference(model, GROUPS, 0.8)
        lengths = [len(member) for _, members in GROUPS for member in members if member]
        loss = (logprobs * WEIGHTS[0]).sum() + (entropy * WEIGHTS[1]).sum()
        loss = loss + sum(x.sum().exp() for x in logprobs.split(lengths))
        return loss.item(), logprobs, entropy, gradients(model, loss)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("max_tokens", [1000, 60, 40, 25, 23, 22])
def test_every_budget_gives_the_gradients_of_one_forward_per_completion(expected, max_tokens, checkpointing):
    model = tiny_model()
    if checkpointing:
        model.gradient_checkpointing_enable()
    enable_shared_prefix(model)
    with float64_norms(model):
        result, found = accumulated(model, max_tokens)
    loss, logprobs, entropy, wanted = expected
    assert result.loss == pytest.approx(loss, abs=1e-10)
    assert (result.logprobs - logprobs).abs().max() < 1e-10
    assert (result.entropy - entropy).abs().max() < 1e-10
    assert largest_difference(found, wanted) < 1e-10


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "cohere2", "qwen3_moe"])
def test_phase_split_with_windows_softcap_and_experts(architecture):
    model = tiny_model(architecture)
    enable_shared_prefix(model)
    with float64_norms(model):
        whole, split = accumulated(model, 1000), accumulated(model, 22)
    assert split[0].loss == pytest.approx(whole[0].loss, abs=1e-9)
    assert largest_difference(split[1], whole[1]) < 1e-10


def test_padding_passes_change_nothing(expected):
    model = tiny_model()
    enable_shared_prefix(model)
    own = plan_passes(GROUPS, 40).counts
    more = PassCounts.maximum([own, PassCounts(own.streams + 2, (own.split_parts[0] + 3, 2, 2))])
    calls = []
    model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    with float64_norms(model):
        accumulated(model, 40)
        own_calls, _ = len(calls), calls.clear()
        result, found = accumulated(model, 40, counts=more)
    assert own_calls == own.streams + sum(own.split_parts) + len(own.split_parts) + 4  # and the self-check
    assert len(calls) == more.streams + sum(more.split_parts) + len(more.split_parts)
    assert result.loss == pytest.approx(expected[0], abs=1e-10)
    assert largest_difference(found, expected[3]) < 1e-10
    with pytest.raises(ValueError, match="this rank needs"):
        accumulated(model, 40, counts=PassCounts(1))


def test_a_rank_without_work_runs_padding_only():
    model = tiny_model()
    enable_shared_prefix(model)
    result = accumulate_gradients(model, [], loss_fn, 100, counts=PassCounts(2, (3,)))
    assert result.loss == 0.0 and result.logprobs.shape == (0,)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_a_factor_that_the_trainer_applies_to_losses_is_applied_once():
    """fp16 loss scaling, for one: the pass through a split group's prompt must not scale again."""
    model = tiny_model()
    enable_shared_prefix(model)
    _, plain = accumulated(model, 40)
    _, scaled = accumulated(model, 40, backward=lambda loss: (1024.0 * loss).backward())
    assert largest_difference({name: x / 1024.0 for name, x in scaled.items()}, plain) < 1e-12


def test_skipped_groups_have_no_gradient_and_nan_logprobs():
    model = tiny_model()
    enable_shared_prefix(model)
    skip = {0, len(GROUPS) - 1}
    result, found = accumulated(model, 40, skip=skip)
    kept = torch.cat(
        [torch.full((sum(map(len, members)),), index not in skip) for index, (_, members) in enumerate(GROUPS)]
    )
    assert torch.equal(result.logprobs.isnan(), ~kept)
    # The same as a loss that gives those groups no weight.
    model.zero_grad(set_to_none=True)

    def masked(logprobs, part):
        use = torch.stack([kept[t[0]] if len(t) else torch.tensor(False) for t in part.tokens.split(part.lengths)])
        per_token = use.repeat_interleave(torch.tensor(part.lengths))
        tokens = (logprobs * WEIGHTS[0, part.tokens] + part.entropy * WEIGHTS[1, part.tokens])[per_token].sum()
        wholes = zip(logprobs.split(part.lengths), use, strict=True)
        return tokens + sum(x.sum().exp() for x, used in wholes if used and len(x))

    accumulate_gradients(model, GROUPS, masked, 1000, entropy=True, temperature=0.8)
    assert largest_difference(found, {name: p.grad for name, p in model.named_parameters()}) < 1e-10


def test_shared_heads_save_tokens_and_change_nothing():
    g = torch.Generator().manual_seed(5)
    system, example = random_ids(12, g), random_ids(8, g)
    prompts = [
        system + random_ids(3, g),
        system + example + random_ids(2, g),
        system + example,
        system,
        random_ids(4, g),
    ]
    groups = [(prompt, [random_ids(n, g) for n in (3, 5)]) for prompt in prompts]
    model = tiny_model()
    enable_shared_prefix(model)
    apart, together = SharedPrefixBatch.from_groups(groups), SharedPrefixBatch.from_groups(groups, min_shared_head=6)
    assert apart.num_tokens - together.num_tokens == 3 * 12 + 8
    with float64_norms(model):
        ours = score_completions(model, together, entropy=True)
        ours_gradients = gradients(model, weighted(ours))
        wanted = reference(model, groups)
        assert max((a - b).abs().max().item() for a, b in zip(ours, wanted, strict=True)) < 1e-10
        assert largest_difference(ours_gradients, gradients(model, weighted(wanted))) < 1e-10
    max_tokens = together.num_tokens + 8  # the nested head is not counted beforehand
    assert len(pack(groups, max_tokens)) == 2
    assert len(pack(groups, max_tokens, min_shared_head=6)) == 1
    streams = []
    model.get_decoder().register_forward_hook(
        lambda _, args, kwargs, out: streams.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    accumulate_gradients(model, groups, lambda logprobs, part: logprobs.sum(), max_tokens, min_shared_head=6)
    assert streams == [together.num_tokens]


def test_branching_rollouts_equal_their_paths():
    g = torch.Generator().manual_seed(6)
    parents = [None, 0, 0, 1, 1, 3, None, 6]
    segments = [Segment(random_ids(n, g), parent) for n, parent in zip((6, 4, 3, 5, 1, 2, 3, 4), parents, strict=True)]

    def path(index):
        parent = segments[index].parent
        return ([] if parent is None else path(parent)) + list(segments[index].ids)

    groups = [(path(i)[: -len(s.ids)], [list(s.ids)]) for i, s in enumerate(segments) if s.parent is not None]
    model = tiny_model("cohere2")
    enable_shared_prefix(model)
    with float64_norms(model):
        ours = score_completions(model, SharedPrefixBatch.from_tree(segments), entropy=True)
        ours_gradients = gradients(model, weighted(ours))
        wanted = reference(model, groups)
        assert max((a - b).abs().max().item() for a, b in zip(ours, wanted, strict=True)) < 1e-10
        assert largest_difference(ours_gradients, gradients(model, weighted(wanted))) < 1e-10


sizes = st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(0, 9), max_size=5)), max_size=8)


@settings(max_examples=200, deadline=None)
@given(sizes, st.integers(18, 60), st.none() | st.integers(1, 4))
def test_passes_hold_every_completion_once_and_keep_to_the_budget(lengths, max_tokens, min_shared_head):
    groups = [([i % 2] * p, [[i] * n for n in members]) for i, (p, members) in enumerate(lengths)]
    passes = plan_passes(groups, max_tokens, min_shared_head=min_shared_head)
    seen = sorted(index for stream in passes.streams for index in stream) + [index for index, _ in passes.splits]
    assert sorted(seen) == [index for index, (_, members) in enumerate(groups) if any(members)]
    for stream in passes.streams:
        batch = SharedPrefixBatch.from_groups([groups[index] for index in stream], min_shared_head=min_shared_head)
        assert batch.num_tokens <= max_tokens
    for index, parts in passes.splits:
        prompt, members = groups[index]
        assert num_stream_tokens(groups[index]) > max_tokens
        assert sorted(i for part in parts for i in part) == [i for i, member in enumerate(members) if member]
        for part in parts:
            assert len(prompt) + sum(len(members[i]) for i in part) <= max_tokens
    assert list(passes.counts.split_parts) == sorted(passes.counts.split_parts, reverse=True)


def test_a_sequence_longer_than_the_budget_is_an_error():
    with pytest.raises(ValueError, match=r"prompt of 5 tokens and a completion of 6.*max_tokens = 10"):
        plan_passes([([0] * 5, [[0] * 6, [0]])], 10)
    with pytest.raises(ValueError, match="group 1 takes 12 tokens, more than max_tokens = 10"):
        pack([([0], [[0]]), ([0] * 5, [[0] * 6, [0]])], 10)


def test_ranks_get_nearly_equal_costs():
    costs = [float(c) for c in torch.randint(1, 1000, (64,), generator=torch.Generator().manual_seed(0))]
    ranks = assign_to_ranks(costs, 4)
    assert sorted(i for rank in ranks for i in rank) == list(range(64))
    loads = [sum(costs[i] for i in rank) for rank in ranks]
    assert max(loads) < 1.02 * sum(costs) / 4
