"""Kernels that attention can run on, behind one small interface, and the choice between them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from raygrpo.shared_prefix.attention import segment_attention
from raygrpo.shared_prefix.backends.cpu import CpuFlash
from raygrpo.shared_prefix.layout import AttentionPlan


class Backend(Protocol):
    """Attention over a stream. q [T, Hq, D]; k, v [T, Hk, D]; external: keys and values [E, Hk, D] before the stream."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        plan: AttentionPlan,
        scale: float,
        window: int | None,
        softcap: float | None,
        external: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """[T, Hq, D], differentiable in q, k, v and external."""
        ...


class Flash:
    def __init__(self, kernel):
        self.kernel = kernel

    def attend(self, q, k, v, *, plan, scale, window, softcap, external):
        assert window is None or plan.max_position < window
        assert softcap is None
        return segment_attention(q, k, v, plan=plan, kernel=self.kernel, scale=scale, external=external)


def choose_backend(name: str) -> Backend:
    return Flash(CpuFlash())
