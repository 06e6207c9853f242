"""FlexAttention: one compiled kernel for the whole stream, with softcap, windows and trees of any depth. CUDA.

(torch refuses its backward on CPUs, where only the forward can be tried.) The block mask is built from segment
arithmetic: tracing a mask function over all pairs, as create_block_mask does, takes longer than the attention.

With tin and tout the pre-order interval of a segment's subtree, a key's segment is above (or is) a query's segment
iff tin[key] <= tin[query] < tout[key]; and rows of a stream come after the rows of the segments above them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from raygrpo.shared_prefix.layout import AttentionPlan

_BLOCK = 128


class Flex:
    """Compiled once per kind of layer, for any layout and length."""

    def __init__(self):
        self._compiled = torch.compile(flex_attention, dynamic=True)

    def refusal(self, q: Tensor, v: Tensor, *, window: int | None, softcap: float | None) -> str | None:
        if q.device.type != "cuda":
            return f"tensors are on {q.device}"
        if q.shape[-1] < 16:
            return f"head size {q.shape[-1]} is below 16"
        return None

    def attend(self, q, k, v, *, plan: AttentionPlan, scale, window, softcap, external) -> Tensor:
        return flex_attend(
            self._compiled, q, k, v, plan, scale=scale, window=window, softcap=softcap, external=external
        )


def flex_attend(flex, q, k, v, plan: AttentionPlan, *, scale, window, softcap, external) -> Tensor:
    """flex: flex_attention, compiled or not; the rest as Backend.attend."""
    if external is not None:
        k, v = (torch.cat(pair) for pair in zip(external, (k, v), strict=True))
    out = flex(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None],
        score_mod=None if softcap is None else _softcap(softcap),
        block_mask=block_mask(plan, window, q.device),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out[0].transpose(0, 1)


def block_mask(plan: AttentionPlan, window: int | None, device: torch.device) -> BlockMask:
    """Which blocks of 128 queries see which blocks of 128 keys: not at all, in part, or wholly."""
    key = ("flex", window, device)
    if key not in plan.cache:
        plan.cache[key] = _block_mask(plan, window, device)
    return plan.cache[key]


def _block_mask(plan: AttentionPlan, window: int | None, device: torch.device) -> BlockMask:
    lens = torch.tensor(plan.own.k_lens)
    tin, tout = _preorder(plan)
    external, rows = plan.num_external, plan.query_rows
    num_queries, num_keys = len(rows), external + plan.num_rows
    segment = torch.repeat_interleave(torch.arange(len(lens)), lens)
    stream_position = torch.arange(len(segment)) + (torch.tensor(plan.offsets) - torch.tensor(plan.starts))[segment]
    position, q_tin = stream_position[rows], tin[segment[rows]]
    # Keys: the external ones first, which are above everything.
    k_tin = torch.cat([torch.full((external,), -1), tin[segment]])
    k_tout = torch.cat([torch.full((external,), len(lens)), tout[segment]])
    k_position = torch.cat([torch.arange(external), stream_position])

    sees, whole = _segment_blocks(segment, rows, tin, tout, external)
    low, high = _extent(position)
    k_low, k_high = _extent(k_position)
    if window is not None:
        sees &= low[:, None] - k_high < window
        whole &= high[:, None] - k_low < window
    partial = sees & ~whole
    q_tin, position, k_tin, k_tout, k_position = (x.to(device) for x in (q_tin, position, k_tin, k_tout, k_position))

    def visible(batch, head, query, key):
        above = (k_tin[key] <= q_tin[query]) & (q_tin[query] < k_tout[key])
        seen = above & (k_position[key] <= position[query])
        return seen if window is None else seen & (position[query] - k_position[key] < window)

    return BlockMask.from_kv_blocks(
        *_ordered(partial, device), *_ordered(whole, device),
        BLOCK_SIZE=_BLOCK, mask_mod=visible, seq_lengths=(num_queries, num_keys),
    )  # fmt: skip


def _segment_blocks(segment: Tensor, rows: Tensor, tin: Tensor, tout: Tensor, external: int) -> tuple[Tensor, Tensor]:
    """[query blocks, key blocks]: whether any query sees any key as far as segments go, and whether all see all.

    segment [T]: of each row of the stream. rows: those that are queries.
    """
    num_segments = len(tin)
    above = (tin[None] <= tin[:, None]) & (tin[:, None] < tout[None])  # [segment of query, segment of key]
    above = torch.cat([torch.ones(num_segments, 1, dtype=torch.bool), above], 1)  # the external keys are segment 0
    k_segment = torch.cat([torch.zeros(external, dtype=torch.long), segment + 1])
    q_holds, k_holds = _holds(segment[rows], num_segments), _holds(k_segment, num_segments + 1)
    sees = (q_holds @ above.float() @ k_holds.T) > 0
    # Rows of a segment come after the rows it sees, so a key block that starts after the queries end is not seen,
    first_query, last_query = (row + external for row in _extent(rows))
    first_key = torch.arange(len(k_holds)) * _BLOCK
    sees &= first_key <= last_query[:, None]
    # and is seen wholly if all its segments are above all of the block's and it ends before the queries start.
    hidden = (q_holds @ (~above).float() @ k_holds.T) > 0
    whole = sees & ~hidden & (first_key + _BLOCK - 1 <= first_query[:, None])
    return sees, whole & (first_key + _BLOCK <= len(k_segment))


def _holds(segment: Tensor, num_segments: int) -> Tensor:
    """[blocks, segments] float: 1 where a block has rows of a segment."""
    blocks = torch.arange(len(segment)) // _BLOCK
    holds = torch.zeros(int(blocks[-1]) + 1, num_segments)
    holds[blocks, segment] = 1.0
    return holds


def _extent(position: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest of each block."""
    short = -len(position) % _BLOCK
    table = torch.cat([position, position[-1:].expand(short)]).view(-1, _BLOCK)
    return table.amin(1), table.amax(1)


def _ordered(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Number and indices of the key blocks of each query block: [1, 1, nq] and [1, 1, nq, nk], int32."""
    indices = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1)[None, None].int().to(device), indices[None, None].int().to(device)


def _preorder(plan: AttentionPlan) -> tuple[Tensor, Tensor]:
    """For each segment the interval [tin, tout) of pre-order numbers of its subtree."""
    size = [1] * len(plan.parents)
    for segment in reversed(range(len(size))):
        above = plan.parents[segment]
        if above is not None:
            size[above] += size[segment]
    free = 0
    next_free: list[int] = []  # where the next child of a segment starts
    tin = []
    for segment, parent in enumerate(plan.parents):
        if parent is None:
            tin.append(free)
            free += size[segment]
        else:
            tin.append(next_free[parent])
            next_free[parent] += size[segment]
        next_free.append(tin[-1] + 1)
    starts = torch.tensor(tin)
    return starts, starts + torch.tensor(size)


def _softcap(softcap: float):
    def score_mod(score, batch, head, query, key):
        return softcap * torch.tanh(score / softcap)

    return score_mod
