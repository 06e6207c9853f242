"""Plain torch, one segment of queries at a time: every device, precision and feature; slow, and the one to trust."""

from __future__ import annotations

import torch
from torch import Tensor

from raygrpo.shared_prefix.layout import AttentionPlan


class Dense:
    """Scores of a segment against all that it sees, at full precision, through autograd."""

    def refusal(self, q: Tensor, v: Tensor, *, window: int | None, softcap: float | None) -> str | None:
        return None

    def attend(self, q, k, v, *, plan: AttentionPlan, scale, window, softcap, external) -> Tensor:
        if external is not None:
            k, v = (torch.cat(pair) for pair in zip(external, (k, v), strict=True))
        outs = []
        for segment, queries in enumerate(q.split(plan.own.q_lens)):
            rows = plan.key_rows(segment).to(q.device)
            # Key j is at position j; the queries are at the last positions.
            position = torch.arange(rows.numel(), device=q.device)
            distance = position[len(rows) - len(queries) :, None] - position
            visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            outs.append(attend_dense(queries, k[rows], v[rows], visible, scale, softcap))
        return torch.cat(outs)


def attend_dense(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Attention as it is defined: q [n, Hq, D], k and v [m, Hk, ..], visible [n, m] -> [n, Hq, Dv]."""
    repeats = q.shape[1] // k.shape[1]
    precision = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("nhd,mhd->hnm", q, k.repeat_interleave(repeats, 1)).to(precision) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", weights.to(v.dtype), v.repeat_interleave(repeats, 1))
