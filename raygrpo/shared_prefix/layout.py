"""Which tokens a stream holds, in which order, and who sees whom.

A stream is one row of T tokens made of segments. Every segment has at most one parent; a token sees its own segment
causally and every token of the segments above it. A prompt with G completions is a root with G children, encoded once.
Deeper trees (prompts under one system prompt, rollouts that branch) are the same thing with more levels.

Segments lie level by level, so that the rows of a level, and within it the descendants of any one segment, are
contiguous: attention reads them as views. With two levels this is the layout of Prefix Grouper (arXiv:2506.05433)
for many groups at once:

    [ P_1 | P_2 | .. | R_11 .. R_1G | R_21 .. R_2G | .. ]

What attention does with a plan is backends/; the tree is tree.py; which groups share a stream is packing.py.

Shapes: T tokens in the stream, C completions in the caller's order, S completion tokens in all, R rows that predict.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from raygrpo.shared_prefix.tree import Segment, compress, level_order, prompt_tree

_MIN_WINDOW_BLOCK = 128  # queries; a block's keys are gathered, up to window - 1 of them a second time

TokenIds = Sequence[int]
Group = tuple[TokenIds, Sequence[TokenIds]]


@dataclass(frozen=True)
class AttentionCall:
    """One variable-length attention call: block i of the queries sees block i of the keys.

    Blocks are contiguous: queries start at row q_start of the stream, keys at row k_start. A block may be empty.
    external: the keys are those of a prefix that was encoded before, not rows of this stream (accumulate.py).
    """

    q_start: int
    q_lens: tuple[int, ...]
    k_start: int
    k_lens: tuple[int, ...]
    external: bool = False
    _on_device: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def q_rows(self) -> slice:
        return slice(self.q_start, self.q_start + sum(self.q_lens))

    @property
    def k_rows(self) -> slice:
        return slice(self.k_start, self.k_start + sum(self.k_lens))

    def cumulative_lengths(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """cu_seqlens of queries and of keys, [blocks + 1] int32 each, as variable-length kernels take them."""
        if device not in self._on_device:
            q, k = (
                torch.tensor([0, *accumulate(lens)], dtype=torch.int32, device=device)
                for lens in (self.q_lens, self.k_lens)
            )
            self._on_device[device] = (q, k)
        return self._on_device[device]


@dataclass(frozen=True)
class AttentionPlan:
    """Who attends to whom in one stream, the same for every layer.

    own: each segment sees itself, causally; the queries are its last rows, all of them but in the last layer. above:
    one call per pair of levels, a level and one above it; every query sees its whole block of keys.
    parents: for each segment, in stream order, the segment above it.
    read_lens: how many of a segment's last rows are read behind the last layer: one of a prompt, all of a completion.
    num_external: keys that precede the stream.
    """

    own: AttentionCall
    above: tuple[AttentionCall, ...]
    parents: tuple[int | None, ...]
    read_lens: tuple[int, ...]
    num_external: int = 0
    cache: dict = field(default_factory=dict, repr=False, compare=False)  # what kernels derive from the plan

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First row of every segment."""
        return tuple(accumulate(self.own.k_lens, initial=0))[:-1]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Position of every segment's first token in its own sequence: the number of tokens above it."""
        offsets: list[int] = []
        for parent in self.parents:
            offsets.append(self.num_external if parent is None else offsets[parent] + self.own.k_lens[parent])
        return tuple(offsets)

    @cached_property
    def num_rows(self) -> int:
        """T."""
        return sum(self.own.k_lens)

    @cached_property
    def max_position(self) -> int:
        return max(offset + length for offset, length in zip(self.offsets, self.own.k_lens, strict=True)) - 1

    @cached_property
    def query_rows(self) -> Tensor:
        """The rows that are queries, ascending: the last q_len of every segment."""
        ends = zip(self.starts, self.own.k_lens, self.own.q_lens, strict=True)
        return torch.cat([torch.arange(start + k_len - q_len, start + k_len) for start, k_len, q_len in ends])

    @cached_property
    def other_rows(self) -> Tensor:
        """The rows that are keys only, ascending."""
        is_query = torch.zeros(self.num_rows, dtype=torch.bool).index_fill_(0, self.query_rows, True)
        return (~is_query).nonzero()[:, 0]

    @cached_property
    def last_layer(self) -> AttentionPlan:
        """The same stream with only those queries that are read behind the last layer."""
        ends = accumulate(self.own.q_lens, initial=0)
        place = dict(zip(ends, accumulate(self.read_lens, initial=0), strict=True))  # of a segment's end among queries

        def narrowed(call: AttentionCall) -> AttentionCall:
            bounds = [place[row] for row in accumulate(call.q_lens, initial=call.q_start)]
            return replace(call, q_start=bounds[0], q_lens=tuple(b - a for a, b in pairwise(bounds)), _on_device={})

        return replace(self, own=narrowed(self.own), above=tuple(map(narrowed, self.above)), cache={})

    def key_rows(self, segment: int) -> Tensor:
        """Rows of all keys that a segment's last token sees, by position; the external keys are the first rows."""
        pieces = []
        above: int | None = segment
        while above is not None:
            first = self.num_external + self.starts[above]
            pieces.append(torch.arange(first, first + self.own.k_lens[above]))
            above = self.parents[above]
        return torch.cat([torch.arange(self.num_external), *reversed(pieces)])

    def windowed(self, window: int) -> tuple[AttentionCall, Tensor]:
        """One causal call within a window: blocks of queries, each with the keys that any of them sees.

        A block's keys are its own rows and the window - 1 tokens before them; its last query is its last key. Also
        returns the row of every key, [sum k_lens]; rows of the stream are counted after the external ones.
        """
        if window not in self.cache:
            block = max(window, _MIN_WINDOW_BLOCK)
            q_lens, k_lens, key_rows = [], [], []
            for segment, queries in enumerate(self.own.q_lens):
                rows = self.key_rows(segment)  # one for each position
                for first in range(len(rows) - queries, len(rows), block):
                    seen = rows[max(0, first - window + 1) : first + block]
                    q_lens.append(min(block, len(rows) - first))
                    k_lens.append(len(seen))
                    key_rows.append(seen)
            self.cache[window] = AttentionCall(0, tuple(q_lens), 0, tuple(k_lens)), torch.cat(key_rows)
        return self.cache[window]


@dataclass(frozen=True)
class SharedPrefixBatch:
    """One micro-batch: a stream of tokens, its attention plan, and which rows predict which completion tokens.

    input_ids, position_ids: [T].
    targets: [S] ids of all completion tokens, completion after completion in the caller's order, without padding.
    token_rows: [S] the row that predicts each of them. The first token of a completion is predicted by the last row of
    its prompt, which all completions of the prompt share. When `external_ids` is set, row -1 is that prefix's last row.
    lengths: tokens of each of the C completions. group_sizes: completions of each group, sum C.
    segments: for each completion its segment in the plan and its first token there; None for an empty completion.
    """

    input_ids: Tensor
    position_ids: Tensor
    plan: AttentionPlan
    token_rows: Tensor
    targets: Tensor
    lengths: tuple[int, ...]
    group_sizes: tuple[int, ...]
    segments: tuple[tuple[int, int] | None, ...] = field(repr=False)
    external_ids: tuple[int, ...] = field(default=(), repr=False)

    # Making one

    @classmethod
    def from_groups(
        cls, groups: Sequence[Group], *, share: bool = True, min_shared_head: int | None = None
    ) -> SharedPrefixBatch:
        """Lay out [(prompt_ids, [completion_ids, ...]), ...]. Completions may be empty, prompts may not.

        share=False encodes every prompt again for each of its completions, packed: what sharing is compared to.
        min_shared_head: prompts of different groups that begin with at least this many equal tokens share them too.
        """
        for index, (prompt, _) in enumerate(groups):
            if not len(prompt):
                raise ValueError(f"the prompt of group {index} is empty: it needs one token, such as the BOS token")
        prompts = [list(prompt) for prompt, _ in groups]
        if share:
            segments, prompt_segments = prompt_tree(prompts, min_shared_head)
        else:
            segments, prompt_segments = [], [None] * len(groups)
        completions: list[tuple[int, int]] = []  # segment and first scored token
        for prompt, (_, members), above in zip(prompts, groups, prompt_segments, strict=True):
            for member in members:
                completions.append((len(segments), len(prompt) if above is None else 0))
                segments.append(Segment([*(prompt if above is None else ()), *member], above))
        return cls._lay_out(segments, completions, tuple(len(members) for _, members in groups))

    @classmethod
    def from_tree(cls, segments: Sequence[Segment]) -> SharedPrefixBatch:
        """Lay out a forest: every segment that has a parent is a completion, in the given order; roots are context.

        A segment that continues another may itself be continued (turns of a dialogue, branches of a search): each of
        its tokens is predicted from all the segments above it. A parent comes before its children.
        """
        for index, segment in enumerate(segments):
            if segment.parent is None and not len(segment.ids):
                raise ValueError(f"segment {index} is an empty root: a root needs at least one token")
            if segment.parent is not None and not 0 <= segment.parent < index:
                raise ValueError(f"segment {index} names parent {segment.parent}; a parent comes before its children")
        completions = [(index, 0) for index, segment in enumerate(segments) if segment.parent is not None]
        return cls._lay_out(segments, completions, (len(completions),))

    @classmethod
    def continuing(cls, prompt_ids: TokenIds, completions: Sequence[TokenIds]) -> SharedPrefixBatch:
        """Completions alone, of a prompt that was encoded before and whose keys and values are given to the model."""
        segments = [Segment(list(member)) for member in completions]
        spans = [(index, 0) for index in range(len(segments))]
        return cls._lay_out(segments, spans, (len(completions),), external_ids=tuple(prompt_ids))

    @classmethod
    def padding(cls) -> SharedPrefixBatch:
        """The smallest valid micro-batch, for a rank that runs out of work before the others.

        Its one log-probability is differentiable: multiply it by zero and backpropagate, so that every rank makes as
        many passes as the others (ZeRO-3 and FSDP gather parameters in each of them).
        """
        return cls.from_groups([([0], [[0]])])

    @classmethod
    def _lay_out(cls, segments, completions, group_sizes, external_ids: tuple[int, ...] = ()) -> SharedPrefixBatch:
        if not any(len(segment.ids) for segment in segments):
            raise ValueError("there are no tokens to encode")
        nodes, places = compress(segments)
        levels = level_order(nodes)
        order = [node for level in levels for node in level]
        scored = {places[segment][0] for segment, skipped in completions if len(segments[segment].ids) > skipped}
        plan = _attention_plan(nodes, levels, scored, len(external_ids))
        rank = {node: index for index, node in enumerate(order)}

        input_ids = [token for node in order for token in nodes[node].ids]
        position_ids = torch.cat([torch.arange(o, o + n) for o, n in zip(plan.offsets, plan.own.k_lens, strict=True)])
        token_rows, targets, lengths, spans = [], [], [], []
        for segment, skipped in completions:
            targeted = segments[segment].ids[skipped:]
            lengths.append(len(targeted))
            if not targeted:
                spans.append(None)
                continue
            node, offset = places[segment]
            first = plan.starts[rank[node]] + offset + skipped
            token_rows.append(_row_before(plan, rank[node], offset + skipped))
            token_rows.extend(range(first, first + len(targeted) - 1))
            targets.extend(targeted)
            spans.append((rank[node], offset + skipped))
        return cls(
            input_ids=torch.tensor(input_ids, dtype=torch.long),
            position_ids=position_ids,
            plan=plan,
            token_rows=torch.tensor(token_rows, dtype=torch.long),
            targets=torch.tensor(targets, dtype=torch.long),
            lengths=tuple(lengths),
            group_sizes=group_sizes,
            segments=tuple(spans),
            external_ids=external_ids,
        )

    # Reading one

    @property
    def num_tokens(self) -> int:
        """T: tokens that the model encodes."""
        return self.input_ids.numel()

    @property
    def num_completion_tokens(self) -> int:
        """S: tokens that get a log-probability."""
        return self.targets.numel()

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """Views of per-token values [S], one [length] for each completion."""
        return values.split(self.lengths)

    def expand(self, values: Tensor) -> Tensor:
        """One value per completion, [C] (an advantage, say), repeated for each of its tokens: [S]."""
        return values.repeat_interleave(torch.tensor(self.lengths, device=values.device), output_size=sum(self.lengths))

    def sum_by_completion(self, values: Tensor) -> Tensor:
        """Per-token values [S] summed over each completion: [C]. Differentiable; 0 for an empty completion."""
        owner = torch.arange(len(self.lengths), device=values.device)
        return values.new_zeros(len(self.lengths)).index_add(0, self.expand(owner), values)

    def pad(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Per-token values [S] as a right-padded table [C, longest completion]."""
        table = values.new_full((len(self.lengths), max(self.lengths, default=0)), fill)
        columns = torch.arange(table.shape[1], device=values.device)
        return table.masked_scatter(columns < torch.tensor(self.lengths, device=values.device)[:, None], values)

    def sequence(self, completion: int) -> tuple[list[int], int]:
        """The whole token sequence that a (non-empty) completion ends, and how many of its tokens come before it."""
        span = self.segments[completion]
        assert span is not None
        segment, first = span
        context = self.plan.offsets[segment] + first
        rows = self.plan.key_rows(segment)[: context + self.lengths[completion]]
        ids = torch.cat([torch.tensor(self.external_ids, dtype=torch.long), self.input_ids.cpu()])
        return ids[rows].tolist(), context

    def to(self, device: torch.device | str) -> SharedPrefixBatch:
        names = ("input_ids", "position_ids", "token_rows", "targets")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def _row_before(plan: AttentionPlan, segment: int, offset: int) -> int:
    """The row that predicts token `offset` of a segment: the one before it, which may be the last of its parent."""
    if offset:
        return plan.starts[segment] + offset - 1
    parent = plan.parents[segment]
    return -1 if parent is None else plan.starts[parent] + plan.own.k_lens[parent] - 1


def _attention_plan(
    nodes: list[Segment], levels: list[list[int]], scored: Collection[int], num_external: int
) -> AttentionPlan:
    """scored: the nodes that hold tokens of completions."""
    order = [node for level in levels for node in level]
    lens = {node: len(nodes[node].ids) for node in order}
    rank = {node: index for index, node in enumerate(order)}
    starts = dict(zip(order, accumulate((lens[node] for node in order), initial=0), strict=False))
    total = sum(lens.values())
    own_lens = tuple(lens[node] for node in order)
    parent_of = {index: node.parent for index, node in enumerate(nodes) if node.parent is not None}

    above: list[AttentionCall] = []
    if num_external:
        above.append(AttentionCall(0, (total,), 0, (num_external,), external=True))
    for depth, level in enumerate(levels[1:], start=1):
        ancestors = level
        for higher in reversed(levels[:depth]):
            ancestors = [parent_of[node] for node in ancestors]
            queries = dict.fromkeys(higher, 0)
            for node, ancestor in zip(level, ancestors, strict=True):
                queries[ancestor] += lens[node]
            # Only from the first segment with descendants here to the last: those between may have none.
            seen = [index for index, node in enumerate(higher) if queries[node]]
            keys = higher[seen[0] : seen[-1] + 1]
            above.append(
                AttentionCall(
                    starts[level[0]], tuple(queries[k] for k in keys), starts[keys[0]], tuple(lens[k] for k in keys)
                )
            )
    parents = tuple(rank[parent_of[node]] if node in parent_of else None for node in order)
    read_lens = tuple(lens[node] if node in scored else 1 for node in order)
    return AttentionPlan(AttentionCall(0, own_lens, 0, own_lens), tuple(above), parents, read_lens, num_external)
