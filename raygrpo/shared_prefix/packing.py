"""Which groups share a stream, which rank takes which groups, and which groups are too large for one stream.

Counts tokens and FLOPs only; layout.py builds the streams and accumulate.py runs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from raygrpo.shared_prefix.layout import Group
from raygrpo.shared_prefix.tree import num_common


@dataclass(frozen=True)
class Passes:
    """How a set of groups runs. streams: indices of the groups in each stream. splits: each group that is too large
    for one, with the indices of its completions in each part; most parts first."""

    streams: tuple[tuple[int, ...], ...]
    splits: tuple[tuple[int, tuple[tuple[int, ...], ...]], ...]

    @property
    def counts(self) -> PassCounts:
        return PassCounts(len(self.streams), tuple(len(parts) for _, parts in self.splits))


@dataclass(frozen=True)
class PassCounts:
    """How many streams, and for each split group how many parts (descending): what ranks have to agree on."""

    streams: int
    split_parts: tuple[int, ...] = ()

    @classmethod
    def maximum(cls, counts: Sequence[PassCounts]) -> PassCounts:
        """The fewest passes in which every rank can do its work; ranks with less of it run padding."""
        parts = zip_longest(*(count.split_parts for count in counts), fillvalue=0)
        return cls(max(count.streams for count in counts), tuple(max(part) for part in parts))


def num_stream_tokens(group: Group) -> int:
    """Tokens that a group takes in a stream: its prompt once, and all completions."""
    prompt, completions = group
    return len(prompt) + sum(len(completion) for completion in completions)


def pack(groups: Sequence[Group], max_tokens: int, *, min_shared_head: int | None = None) -> list[list[int]]:
    """Place whole groups in as few streams of at most max_tokens as best-fit decreasing finds; indices of groups.

    Best-fit decreasing needs at most 11/9 of the fewest possible streams, plus one (Johnson, 1974).
    min_shared_head: keep prompts that begin with so many equal tokens together, and count what they share once.
    """
    sizes = [num_stream_tokens(group) for group in groups]
    for index, size in enumerate(sizes):
        if size > max_tokens:
            raise ValueError(
                f"group {index} takes {size} tokens, more than max_tokens = {max_tokens}; "
                "accumulate_gradients runs such groups in parts"
            )
    bundles = [([index], size) for index, size in enumerate(sizes)]
    if min_shared_head is not None:
        bundles = _bundles(groups, sizes, max_tokens, min_shared_head)
    streams: list[list[int]] = []
    space: list[int] = []
    for members, size in sorted(bundles, key=lambda bundle: (-bundle[1], bundle[0])):
        fitting = [stream for stream in range(len(streams)) if space[stream] >= size]
        if fitting:
            stream = min(fitting, key=space.__getitem__)
        else:
            stream = len(streams)
            streams.append([])
            space.append(max_tokens)
        streams[stream].extend(members)
        space[stream] -= size
    return [sorted(stream) for stream in streams]


def _bundles(
    groups: Sequence[Group], sizes: Sequence[int], max_tokens: int, min_shared_head: int
) -> list[tuple[list[int], int]]:
    """Neighbours in sorted order that all have a long enough head in common, and how many tokens they take at most."""
    bundles: list[tuple[list[int], int]] = []
    members: list[int] = []
    total = head = 0
    for index in sorted(range(len(groups)), key=lambda i: list(groups[i][0])):
        prompt = groups[index][0]
        common = min(head, num_common(groups[members[0]][0], prompt)) if members else 0
        if members and common >= min_shared_head and total + sizes[index] - len(members) * common <= max_tokens:
            members.append(index)
            total, head = total + sizes[index], common
        else:
            if members:
                bundles.append((members, total - (len(members) - 1) * head))
            members, total, head = [index], sizes[index], len(prompt)
    return [*bundles, (members, total - (len(members) - 1) * head)] if members else bundles


def plan_passes(groups: Sequence[Group], max_tokens: int, *, min_shared_head: int | None = None) -> Passes:
    """Streams for the groups that fit (as `pack` fills them), and parts for those that do not.

    Groups without a completion token are left out: there is nothing to score.
    A part holds completions only, but its prompt's keys and activations are in memory meanwhile, so prompt and part
    together stay within max_tokens.
    """
    scored = [index for index, (_, members) in enumerate(groups) if any(len(member) for member in members)]
    fit = [index for index in scored if num_stream_tokens(groups[index]) <= max_tokens]
    streams = pack([groups[index] for index in fit], max_tokens, min_shared_head=min_shared_head)
    splits = []
    for index in sorted(set(scored) - set(fit)):
        prompt, completions = groups[index]
        longest = max(len(completion) for completion in completions)
        if len(prompt) + longest > max_tokens:
            raise ValueError(
                f"group {index} has a prompt of {len(prompt)} tokens and a completion of {longest}: together more "
                f"than max_tokens = {max_tokens}, and a sequence is not cut"
            )
        # The prompt is no part of what is packed here; an empty completion has nothing to run.
        filled = [member for member, completion in enumerate(completions) if len(completion)]
        parts = pack([((), [completions[member]]) for member in filled], max_tokens - len(prompt))
        splits.append((index, tuple(tuple(filled[i] for i in part) for part in parts)))
    splits.sort(key=lambda split: -len(split[1]))
    return Passes(tuple(tuple(fit[i] for i in stream) for stream in streams), tuple(splits))


def assign_to_ranks(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Spread items over ranks so that the largest total cost is small: longest first, each to the least loaded rank.

    At most 4/3 of the optimum (Graham, 1969). costs: FLOPs of each group, cost.training_flops.
    """
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [0.0] * num_ranks
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(num_ranks), key=lambda r: (load[r], len(ranks[r]), r))
        ranks[rank].append(index)
        load[rank] += costs[index]
    return [sorted(rank) for rank in ranks]
