"""Attention over a stream of segments: stock flash kernels, called once per pair of levels, and merged.

A query's keys lie in several places: its own segment and the segments above it. For each place s a flash kernel
returns a partial softmax, out_s and lse_s (the log-sum-exp of its scores). They merge exactly:

    lse = log sum_s exp(lse_s),        out = sum_s exp(lse_s - lse) * out_s

Backward needs no derivative of lse. With P = exp(S - lse) and delta = sum_d dO * out,

    dS = P * (dO V^T - delta),    dQ = dS K,    dK = dS^T Q,    dV = P^T dO

hold for every key by itself, and every sum over keys splits over the places. So each place's stock flash *backward* is
called with the merged out and lse, and what they return is added (as ring attention does, arXiv:2310.01889). q, k, v,
out and lse are saved once; no key or value is copied per completion.

A window cannot be given to a call over whole segments above: its offset differs from completion to completion. Layers
with a window take another road: gather the few keys that each block of queries sees, then one call.

Shapes: q [T, Hq, D]; k, v [T, Hk, D], Hq a multiple of Hk; lse [T, Hq] in the kernel's precision (float32 or float64).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from raygrpo.shared_prefix.layout import AttentionCall, AttentionPlan


class FlashKernel(Protocol):
    """Variable-length attention that returns its log-sum-exp, and takes a foreign one in backward.

    q, out, d_out: [Tq, Hq, D]; k, v: [Tk, Hk, D]; lse: [Tq, Hq]. Block i of the queries sees block i of the keys, as
    `call` cuts them. causal: the last query of a block is the last key's row, each query sees keys up to its own row,
    and with a window no more than that many.
    """

    def refusal(self, q: Tensor, v: Tensor, *, softcap: float | None) -> str | None:
        """Why it cannot run these shapes, types and devices; None if it can."""
        ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, call: AttentionCall, causal: bool, scale: float,
        window: int | None, softcap: float | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """out, lse."""
        ...

    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, call: AttentionCall,
        causal: bool, scale: float, window: int | None, softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """dq, dk, dv of attention to these keys, where out and lse are over all keys."""
        ...


class MergedFlash:
    """A Backend made of one flash kernel."""

    def __init__(self, kernel: FlashKernel):
        self.kernel = kernel

    def refusal(self, q: Tensor, v: Tensor, *, window: int | None, softcap: float | None) -> str | None:
        return self.kernel.refusal(q, v, softcap=softcap)

    def attend(self, q, k, v, *, plan: AttentionPlan, scale, window, softcap, external) -> Tensor:
        k_external, v_external = external or (None, None)
        if window is None or plan.max_position < window:
            return _Segments.apply(q, k, v, k_external, v_external, plan, self.kernel, scale, softcap)
        if external is not None:
            k, v = (torch.cat(pair) for pair in zip(external, (k, v), strict=True))
        call, key_rows = plan.windowed(window)
        return _Windows.apply(q, k, v, key_rows.to(k.device), call, self.kernel, scale, window, softcap)


class _Segments(torch.autograd.Function):
    """Merged attention to a token's own segment and to all segments above it."""

    @staticmethod
    def forward(ctx, q, k, v, k_external, v_external, plan: AttentionPlan, kernel: FlashKernel, scale, softcap):
        options = {"scale": scale, "window": None, "softcap": softcap}
        out, lse = kernel.forward(q, k, v, call=plan.own, causal=True, **options)
        for call in plan.above:
            rows, (keys, values) = call.q_rows, _keys(call, k, v, k_external, v_external)
            part, part_lse = kernel.forward(q[rows], keys, values, call=call, causal=False, **options)
            _merge_into(out[rows], lse[rows], part, part_lse)
        ctx.save_for_backward(q, k, v, k_external, v_external, out, lse)
        ctx.plan, ctx.kernel, ctx.options = plan, kernel, options
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, k_external, v_external, out, lse = ctx.saved_tensors
        plan, kernel, options = ctx.plan, ctx.kernel, ctx.options
        dq, dk, dv = kernel.backward(d_out, q, k, v, out, lse, call=plan.own, causal=True, **options)
        dk_external = dv_external = None
        for call in plan.above:
            rows, (keys, values) = call.q_rows, _keys(call, k, v, k_external, v_external)
            dq_part, dk_part, dv_part = kernel.backward(
                d_out[rows], q[rows], keys, values, out[rows], lse[rows], call=call, causal=False, **options
            )
            dq[rows] += dq_part
            if call.external:  # there is one such call
                dk_external, dv_external = dk_part, dv_part
            else:
                dk[call.k_rows] += dk_part
                dv[call.k_rows] += dv_part
        return dq, dk, dv, dk_external, dv_external, None, None, None, None


class _Windows(torch.autograd.Function):
    """Attention within a window: blocks of queries, each with a gathered copy of the keys that it sees.

    key_rows: row of k and v of every gathered key. The copies live only while a kernel runs.
    """

    @staticmethod
    def forward(ctx, q, k, v, key_rows, call: AttentionCall, kernel: FlashKernel, scale, window, softcap):
        options = {"call": call, "causal": True, "scale": scale, "window": window, "softcap": softcap}
        out, lse = kernel.forward(q, k[key_rows], v[key_rows], **options)
        ctx.save_for_backward(q, k, v, key_rows, out, lse)
        ctx.kernel, ctx.options = kernel, options
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, key_rows, out, lse = ctx.saved_tensors
        dq, *d_gathered = ctx.kernel.backward(d_out, q, k[key_rows], v[key_rows], out, lse, **ctx.options)
        dk, dv = (torch.zeros_like(x).index_add_(0, key_rows, d) for x, d in zip((k, v), d_gathered, strict=True))
        return dq, dk, dv, None, None, None, None, None, None


def _keys(call: AttentionCall, k, v, k_external, v_external) -> tuple[Tensor, Tensor]:
    if call.external:
        return k_external, v_external
    return k[call.k_rows], v[call.k_rows]


def _merge_into(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add one more partial softmax to (out, lse) in place. out, part: [n, Hq, D]; lse, part_lse: [n, Hq].

    With w = exp(part_lse - merged) the two weights are 1 - w and w.
    """
    merged = torch.logaddexp(lse, part_lse)
    weight = (part_lse - merged).exp_().unsqueeze(-1)
    if out.dtype == weight.dtype:
        out.lerp_(part, weight)
    else:  # half precision: a rounded weight would cost as much accuracy as the kernel itself
        out.copy_(out.to(weight.dtype).lerp_(part.to(weight.dtype), weight))
    lse.copy_(merged)
