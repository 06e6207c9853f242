"""Ways to get completions' log-probabilities from the same model, for shared_prefix.py to compare.

All differ only in how tokens are laid out and attended to; the LM head and its chunks are the same for all, and run on
the rows that predict a completion token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from raygrpo.shared_prefix import SharedPrefixBatch, completion_logprobs
from raygrpo.shared_prefix.head import HeadRequest, token_logprobs
from raygrpo.shared_prefix.layout import Group

Forward = Callable[[], Tensor]  # logprobs [S]


@dataclass(frozen=True)
class Method:
    """prepare(model, groups) builds a step's inputs and returns its forward pass; what is timed comes after it."""

    name: str
    prepare: Callable[[PreTrainedModel, Sequence[Group]], Forward]


def shared(model: PreTrainedModel, groups: Sequence[Group]) -> Forward:
    """This package: every prompt once."""
    return partial(completion_logprobs, model, SharedPrefixBatch.from_groups(groups).to(model.device))


def packed(model: PreTrainedModel, groups: Sequence[Group]) -> Forward:
    """Prompt and completion as one sequence, all sequences in one stream without padding: the honest baseline."""
    return partial(completion_logprobs, model, SharedPrefixBatch.from_groups(groups, share=False).to(model.device))


def padded(model: PreTrainedModel, groups: Sequence[Group]) -> Forward:
    """Prompt and completion as one sequence, one row each, padded on the right: what most trainers do."""
    sequences = [(len(prompt), [*prompt, *member]) for prompt, members in groups for member in members]
    width = max(len(ids) for _, ids in sequences)
    input_ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    rows = []  # of the flattened table, that predict a completion token
    for row, (context, ids) in enumerate(sequences):
        input_ids[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), 1
        rows.append(torch.arange(context - 1, len(ids) - 1) + row * width)
    input_ids, mask = input_ids.to(model.device), mask.to(model.device)

    def forward() -> Tensor:
        hidden = model.get_decoder()(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        return _head(model, hidden.flatten(0, 1), torch.cat(rows), groups)

    return forward


def prefix_grouper(model: PreTrainedModel, groups: Sequence[Group]) -> Forward:
    """The `prefix-grouper` package (arXiv:2506.05433); a row per group, its own way to lay out several.

    Runs as its own transformers integration does, on transformers' sdpa. On a CPU that one is handed a 2-D mask, which
    it takes for something else; the adapter here replaces it: causal without a mask for prompts (which are equally long
    here, so that none is padded), the right 4-D mask, made once per step, for completions.
    """
    from prefix_grouper import PrefixGrouper
    from prefix_grouper.forward import AttentionForward

    context = len(groups[0][0])
    assert all(len(prompt) == context for prompt, _ in groups)
    lengths = [[len(member) for member in members] for _, members in groups]
    grouper = PrefixGrouper(group_info=[[context, *row] for row in lengths])
    widest = max(max(row) for row in lengths)
    causal = torch.ones(widest, context + widest, dtype=torch.bool, device=model.device).tril_(context)[None, None]

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, *args, **kwargs) -> Tensor:
        mask = None if q.shape[2] == k.shape[2] else causal.expand(q.shape[0], -1, -1, -1)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](*args, q, k, v, mask, **kwargs)[0]

    def attention(module, q, k, v, attention_mask, **options):
        return AttentionForward(attend)(grouper, q, k, v, module, **options), None

    AttentionInterface.register("bench_prefix_grouper", attention)
    present = grouper.padding_mask.bool()
    input_ids, position_ids = torch.zeros(present.shape, dtype=torch.long), torch.zeros(present.shape, dtype=torch.long)
    input_ids[present] = torch.tensor([t for prompt, members in groups for ids in (prompt, *members) for t in ids])
    offsets = [(start, n) for row in lengths for start, n in ((0, context), *((context, n) for n in row))]
    position_ids[present] = torch.cat([torch.arange(start, start + n) for start, n in offsets])
    rows = []
    for row, members in enumerate(lengths):
        start = row * present.shape[1] + context
        for n in members:
            rows += [row * present.shape[1] + context - 1, *range(start, start + n - 1)]
            start += n
    input_ids, position_ids = input_ids.to(model.device), position_ids.to(model.device)

    def forward() -> Tensor:
        before = model.config._attn_implementation_internal
        model.config._attn_implementation_internal = "bench_prefix_grouper"
        try:
            out = model.get_decoder()(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        finally:
            model.config._attn_implementation_internal = before
        return _head(model, out.last_hidden_state.flatten(0, 1), torch.tensor(rows), groups)

    return forward


METHODS = {
    method.name: method
    for method in (
        Method("shared", shared),
        Method("packed", packed),
        Method("padded", padded),
        Method("prefix-grouper", prefix_grouper),
    )
}


def _head(model: PreTrainedModel, hidden: Tensor, rows: Tensor, groups: Sequence[Group]) -> Tensor:
    targets = torch.tensor([token for _, members in groups for member in members for token in member])
    rows, token_rows = rows.to(hidden.device).unique(return_inverse=True)
    request = HeadRequest(token_rows, targets.to(hidden.device))
    head = model.get_output_embeddings()
    assert head is not None
    return token_logprobs(hidden[rows], head.weight, None, request)[0]
