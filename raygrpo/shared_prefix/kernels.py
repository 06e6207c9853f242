"""The interface of a flash kernel (attention.py says why its backward takes a foreign log-sum-exp)."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from raygrpo.shared_prefix.layout import AttentionCall


class Kernel(Protocol):
    """Variable-length attention that returns its log-sum-exp, and takes a foreign one in backward.

    q, out, d_out: [Tq, Hq, D]; k, v: [Tk, Hk, D]; lse: [Tq, Hq]. Block i of the queries sees block i of the keys, as
    `call` cuts them. causal: blocks of queries and keys have equal lengths, a query sees keys up to its own row.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, call: AttentionCall, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """out, lse."""
        ...

    def backward(
        self,
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        call: AttentionCall,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of attention to these keys, where out and lse are over all keys."""
        ...
