"""PyTorch's flash attention for CPUs: dense calls, one for each run of equal blocks, through views of the stream."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from raygrpo.shared_prefix.layout import AttentionCall

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class CpuFlash:
    """A FlashKernel for float32, float64, bfloat16 and float16; grouped-query heads without copies."""

    def refusal(self, q: Tensor, v: Tensor, *, softcap: float | None) -> str | None:
        if q.device.type != "cpu":
            return f"tensors are on {q.device}"
        if softcap is not None:
            return "no softcap"
        if q.shape[-1] != v.shape[-1]:
            return f"queries and values have different sizes ({q.shape[-1]} and {v.shape[-1]})"
        return None

    def forward(self, q, k, v, *, call: AttentionCall, causal, scale, window, softcap) -> tuple[Tensor, Tensor]:
        runs = _runs(call)
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        for q_rows, k_rows, blocks in runs:
            inputs = [_blocks(x, rows, blocks) for x, rows in ((q, q_rows), (k, k_rows), (v, k_rows))]
            is_causal, mask = _causality(inputs[0], inputs[1], causal, window)
            part, part_lse = _forward(*inputs, 0.0, is_causal, attn_mask=mask, scale=scale)
            if len(runs) == 1:
                return _rows(part), _rows(part_lse)
            out[q_rows], lse[q_rows] = _rows(part), _rows(part_lse)
        return out, lse

    def backward(
        self, d_out, q, k, v, out, lse, *, call: AttentionCall, causal, scale, window, softcap
    ) -> tuple[Tensor, Tensor, Tensor]:
        runs = _runs(call)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for q_rows, k_rows, blocks in runs:
            pairs = ((d_out, q_rows), (q, q_rows), (k, k_rows), (v, k_rows), (out, q_rows), (lse, q_rows))
            inputs = [_blocks(x, rows, blocks) for x, rows in pairs]
            is_causal, mask = _causality(inputs[1], inputs[2], causal, window)
            dq_part, dk_part, dv_part = map(_rows, _backward(*inputs, 0.0, is_causal, attn_mask=mask, scale=scale))
            if len(runs) == 1 and k_rows.stop - k_rows.start == len(k):
                return dq_part, dk_part, dv_part
            dq[q_rows], dk[k_rows], dv[k_rows] = dq_part, dk_part, dv_part
        return dq, dk, dv


def _runs(call: AttentionCall) -> list[tuple[slice, slice, int]]:
    """Query rows, key rows and number of blocks, for each run of neighbouring blocks of equal lengths."""
    runs = []
    q_row = k_row = 0
    for (q_len, k_len), run in groupby(zip(call.q_lens, call.k_lens, strict=True)):
        blocks = sum(1 for _ in run)
        q_rows, k_rows = slice(q_row, q_row + blocks * q_len), slice(k_row, k_row + blocks * k_len)
        q_row, k_row = q_rows.stop, k_rows.stop
        if q_len:
            runs.append((q_rows, k_rows, blocks))
    return runs


def _causality(q: Tensor, k: Tensor, causal: bool, window: int | None) -> tuple[bool, Tensor | None]:
    """is_causal and attn_mask for blocks of queries and keys that end at the same row. The op's own flag aligns their
    beginnings, so it serves blocks of equal length only."""
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    fits = window is None or num_keys <= window
    if not causal or (fits and num_queries == 1):  # one query is the last row and sees all
        return False, None
    if fits and num_queries == num_keys:
        return True, None
    distance = torch.arange(num_keys - num_queries, num_keys)[:, None] - torch.arange(num_keys)
    hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    return False, torch.zeros(num_queries, num_keys, dtype=q.dtype).masked_fill_(hidden, -torch.inf)


def _blocks(x: Tensor, rows: slice, blocks: int) -> Tensor:
    """Rows of [T, H, ..] as [blocks, H, rows per block, ..], a view."""
    return x[rows].unflatten(0, (blocks, -1)).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    """[blocks, H, rows per block, ..] as [rows, H, ..]."""
    return x.transpose(1, 2).flatten(0, 1)
