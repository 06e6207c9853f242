"""PyTorch's flash attention for CPUs: dense calls, one for each run of equal blocks, through views of the stream."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from raygrpo.shared_prefix.layout import AttentionCall

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class CpuFlash:
    """float32, float64 and bfloat16; grouped-query heads without copies."""

    name = "cpu-flash"

    def forward(self, q, k, v, *, call: AttentionCall, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        precision = torch.float64 if q.dtype == torch.float64 else torch.float32
        out = torch.empty(*q.shape[:2], v.shape[-1], dtype=q.dtype)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=precision)
        for q_rows, k_rows, blocks in _runs(call):
            part, part_lse = _forward(
                _blocks(q, q_rows, blocks), _blocks(k, k_rows, blocks), _blocks(v, k_rows, blocks), 0.0, causal,
                scale=scale,
            )  # fmt: skip
            out[q_rows] = _rows(part)
            lse[q_rows] = _rows(part_lse)
        return out, lse

    def backward(
        self, d_out, q, k, v, out, lse, *, call: AttentionCall, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for q_rows, k_rows, blocks in _runs(call):
            parts = _backward(
                _blocks(d_out, q_rows, blocks), _blocks(q, q_rows, blocks), _blocks(k, k_rows, blocks),
                _blocks(v, k_rows, blocks), _blocks(out, q_rows, blocks), _blocks(lse, q_rows, blocks), 0.0, causal,
                scale=scale,
            )  # fmt: skip
            dq[q_rows], dk[k_rows], dv[k_rows] = (_rows(part) for part in parts)
        return dq, dk, dv


def _runs(call: AttentionCall) -> Iterator[tuple[slice, slice, int]]:
    """Query rows, key rows and number of blocks, for each run of neighbouring blocks of equal lengths."""
    q_row = k_row = 0
    for (q_len, k_len), run in groupby(zip(call.q_lens, call.k_lens, strict=True)):
        blocks = sum(1 for _ in run)
        q_rows, k_rows = slice(q_row, q_row + blocks * q_len), slice(k_row, k_row + blocks * k_len)
        q_row, k_row = q_rows.stop, k_rows.stop
        if q_len:
            yield q_rows, k_rows, blocks


def _blocks(x: Tensor, rows: slice, blocks: int) -> Tensor:
    """Rows of [T, H, ..] as [blocks, H, rows per block, ..], a view."""
    return x[rows].unflatten(0, (blocks, -1)).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    """[blocks, H, rows per block, ..] as [rows, H, ..]."""
    return x.transpose(1, 2).flatten(0, 1)
