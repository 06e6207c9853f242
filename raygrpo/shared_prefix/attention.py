"""Attention over a stream of segments: stock flash kernels, called once per pair of levels, and merged.

A query's keys lie in several places: its own segment and the segments above it. For each place s a flash kernel
returns a partial softmax, out_s and lse_s (the log-sum-exp of its scores). They merge exactly:

    lse = log sum_s exp(lse_s),        out = sum_s exp(lse_s - lse) * out_s

Backward needs no derivative of lse. With P = exp(S - lse) and delta = sum_d dO * out,

    dS = P * (dO V^T - delta),    dQ = dS K,    dK = dS^T Q,    dV = P^T dO

hold for every key by itself, and every sum over keys splits over the places. So each place's stock flash *backward* is
called with the merged out and lse, and what they return is added (as ring attention does, arXiv:2310.01889). q, k, v,
out and lse are saved once; no key or value is copied per completion.

Which kernels run is the backends' matter (backends/). Windows, which a call over whole segments cannot express, take
the other road here: gather each segment's visible keys, then one call (`windowed_attention`).

Shapes: q [T, Hq, D]; k, v [T, Hk, D], Hq a multiple of Hk; lse [T, Hq] in the kernel's precision (float32 or float64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from raygrpo.shared_prefix.kernels import Kernel
from raygrpo.shared_prefix.layout import AttentionCall, AttentionPlan


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    plan: AttentionPlan,
    kernel: Kernel,
    scale: float,
    external: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Each token attends to its own segment causally and to all segments above it. Returns [T, Hq, D].

    external: keys and values [E, Hk, D] of a prefix that was encoded before; every token sees all of them.
    """
    k_external, v_external = external or (None, None)
    return _SegmentAttention.apply(q, k, v, k_external, v_external, plan, kernel, scale)


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, k_external, v_external, plan: AttentionPlan, kernel: Kernel, scale: float):
        out, lse = kernel.forward(q, k, v, call=plan.own, causal=True, scale=scale)
        for call in plan.above:
            rows, (keys, values) = call.q_rows, _keys(call, k, v, k_external, v_external)
            part, part_lse = kernel.forward(q[rows], keys, values, call=call, causal=False, scale=scale)
            _merge_into(out[rows], lse[rows], part, part_lse)
        ctx.save_for_backward(q, k, v, k_external, v_external, out, lse)
        ctx.plan, ctx.kernel, ctx.scale = plan, kernel, scale
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, k_external, v_external, out, lse = ctx.saved_tensors
        plan, kernel, scale = ctx.plan, ctx.kernel, ctx.scale
        dq, dk, dv = kernel.backward(d_out, q, k, v, out, lse, call=plan.own, causal=True, scale=scale)
        dk_external = dv_external = None
        for call in plan.above:
            rows, (keys, values) = call.q_rows, _keys(call, k, v, k_external, v_external)
            dq_part, dk_part, dv_part = kernel.backward(
                d_out[rows], q[rows], keys, values, out[rows], lse[rows], call=call, causal=False, scale=scale
            )
            dq[rows] += dq_part
            if call.external:  # the only such call
                dk_external, dv_external = dk_part, dv_part
            else:
                dk[call.k_rows] += dk_part
                dv[call.k_rows] += dv_part
        return dq, dk, dv, dk_external, dv_external, None, None, None


def _keys(call: AttentionCall, k, v, k_external, v_external) -> tuple[Tensor, Tensor]:
    if call.external:
        return k_external, v_external
    return k[call.k_rows], v[call.k_rows]


def _merge_into(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add one more partial softmax to (out, lse) in place. out, part: [n, Hq, D]; lse, part_lse: [n, Hq].

    With w = exp(part_lse - merged) the weights are w and 1 - w: out + w * (part - out) is one fused pass.
    """
    merged = torch.logaddexp(lse, part_lse)
    weight = (part_lse - merged).exp_().unsqueeze(-1)
    if out.dtype == weight.dtype:
        out.lerp_(part, weight)
    else:  # half precision: a rounded weight would cost as much accuracy as the kernel itself
        out.copy_(out.to(weight.dtype).lerp_(part.to(weight.dtype), weight))
    lse.copy_(merged)
