"""Segments of tokens with a parent each: building such trees from prompts, and simplifying and ordering them.

Nothing here knows of tensors or attention; layout.py turns the result into a stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class Segment:
    """Tokens that are encoded once. parent: index of the segment that these tokens continue, None for a root."""

    ids: Sequence[int]
    parent: int | None = None


def prompt_tree(prompts: Sequence[list[int]], min_shared_head: int | None) -> tuple[list[Segment], list[int]]:
    """Segments that spell all prompts, and for each prompt the segment it ends with.

    min_shared_head: a common beginning of at least so many tokens becomes a segment of its own, shared by all prompts
    that have it; and again within those. None: every prompt is one segment.
    """
    if min_shared_head is None:
        return [Segment(prompt) for prompt in prompts], list(range(len(prompts)))
    if min_shared_head < 1:
        raise ValueError(f"min_shared_head is {min_shared_head}; sharing starts at 1 token")
    segments: list[Segment] = []
    ends = [-1] * len(prompts)

    def add(ids: list[int], parent: int | None) -> int | None:
        if not ids:
            return parent
        segments.append(Segment(ids, parent))
        return len(segments) - 1

    # Sorted prompts with a common head are neighbours, and the head of a run is that of its first and last prompt.
    pending: list[tuple[list[int], int, int | None]] = [
        (sorted(range(len(prompts)), key=lambda index: prompts[index]), 0, None)
    ]
    while pending:
        run, start, parent = pending.pop()
        if not run:
            continue
        head = num_common(prompts[run[0]], prompts[run[-1]])
        if len(run) == 1 or head - start >= min_shared_head:
            parent, start = add(prompts[run[0]][start:head], parent), head
        ended = [index for index in run if len(prompts[index]) == head]
        if ended:
            node = add(prompts[ended[0]][start:], parent)
            assert node is not None  # no prompt is empty
            for index in ended:
                ends[index] = node
        rest = run[len(ended) :]
        for _, branch in groupby(rest, key=lambda index: prompts[index][head]):
            pending.append((list(branch), start, parent))
    return segments, ends


def compress(segments: Sequence[Segment]) -> tuple[list[Segment], list[tuple[int, int]]]:
    """The same tree with fewer segments: empty ones dropped, an only child joined to its parent.

    A lone completion thus becomes one segment with its prompt, and costs no more than without sharing.
    Also returns where each given segment went: (index of its segment, offset of its first token there).
    """
    above: list[int | None] = []  # nearest non-empty segment above
    for segment in segments:
        parent = segment.parent
        above.append(parent if parent is None or len(segments[parent].ids) else above[parent])
    children = [0] * len(segments)
    for segment, parent in zip(segments, above, strict=True):
        if parent is not None and len(segment.ids):
            children[parent] += 1

    nodes: list[Segment] = []
    places: list[tuple[int, int]] = []
    for index, segment in enumerate(segments):
        parent = above[index]
        if not len(segment.ids):
            places.append((-1, 0))
        elif parent is not None and children[parent] == 1:
            node, offset = places[parent]
            places.append((node, offset + len(segments[parent].ids)))
            nodes[node] = Segment([*nodes[node].ids, *segment.ids], nodes[node].parent)
        else:
            places.append((len(nodes), 0))
            nodes.append(Segment(list(segment.ids), None if parent is None else places[parent][0]))
    return nodes, places


def level_order(nodes: Sequence[Segment]) -> list[list[int]]:
    """Indices of all segments by depth; within a level the descendants of one segment are neighbours.

    Segments with more levels below them come later, so that those with descendants tend to be contiguous as well.
    """
    children: list[list[int]] = [[] for _ in nodes]
    height = [0] * len(nodes)
    for index, node in enumerate(nodes):
        if node.parent is not None:
            children[node.parent].append(index)
    for index in reversed(range(len(nodes))):
        height[index] = max((height[child] + 1 for child in children[index]), default=0)
    level = sorted((index for index, node in enumerate(nodes) if node.parent is None), key=height.__getitem__)
    levels = []
    while level:
        levels.append(level)
        level = [child for node in level for child in sorted(children[node], key=height.__getitem__)]
    return levels


def num_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
