"""FlashAttention on CUDA, for merged_flash.py: the kernels inside torch, and those of the flash-attn package.

Both take variable lengths directly: one launch per call, no padding, float16 and bfloat16. A log-sum-exp is [Hq, Tq]
float32 there. They write +inf for a query that sees no key; no call here has such a query, since only a segment
with tokens can be above another.
"""

from __future__ import annotations

import importlib
import importlib.metadata

import torch
from torch import Tensor

from raygrpo.shared_prefix.layout import AttentionCall


class AtenFlash:
    """FlashAttention-2 as torch ships it; with torch.nn.attention.activate_flash_attention_impl, newer ones."""

    def refusal(self, q: Tensor, v: Tensor, *, softcap: float | None) -> str | None:
        return _refusal(q, v) or (None if softcap is None else "no softcap")

    def forward(self, q, k, v, *, call: AttentionCall, causal, scale, window, softcap) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *_lengths(call, q.device), 0.0, causal, False, scale=scale, **_window(window)
        )
        return out, lse.t()

    def backward(
        self, d_out, q, k, v, out, lse, *, call: AttentionCall, causal, scale, window, softcap
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Without dropout the random state is not read, but it has to be there.
        state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        return torch.ops.aten._flash_attention_backward(
            d_out.contiguous(), q, k, v, out, lse.t().contiguous(), *_lengths(call, q.device), 0.0, causal,
            state, unused, scale=scale, **_window(window),
        )  # fmt: skip


class FlashAttnPackage:
    """The flash-attn package: softcap too. Raises ImportError before version 2.7, whose kernels are called otherwise
    and return more."""

    def __init__(self):
        version = importlib.metadata.version("flash-attn")
        if tuple(int(number) for number in version.split(".")[:2]) < (2, 7):
            raise ImportError(f"flash-attn {version} is there, and 2.7 or newer is needed")
        self._kernels = importlib.import_module("flash_attn.flash_attn_interface")

    def refusal(self, q: Tensor, v: Tensor, *, softcap: float | None) -> str | None:
        return _refusal(q, v)

    def forward(self, q, k, v, *, call: AttentionCall, causal, scale, window, softcap) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self._kernels._flash_attn_varlen_forward(
            q, k, v, *_lengths(call, q.device), dropout_p=0.0, softmax_scale=scale, causal=causal,
            softcap=softcap or 0.0, **_package_window(window),
        )  # fmt: skip
        return out, lse.t()

    def backward(
        self, d_out, q, k, v, out, lse, *, call: AttentionCall, causal, scale, window, softcap
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        self._kernels._flash_attn_varlen_backward(
            d_out.contiguous(), q, k, v, out, lse.t().contiguous(), dq, dk, dv, *_lengths(call, q.device),
            dropout_p=0.0, softmax_scale=scale, causal=causal, softcap=softcap or 0.0, alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(), **_package_window(window),
        )  # fmt: skip
        return dq, dk, dv


def _refusal(q: Tensor, v: Tensor) -> str | None:
    if q.device.type != "cuda":
        return f"tensors are on {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"{q.dtype} is not float16 or bfloat16"
    if q.shape[-1] != v.shape[-1]:
        return f"queries and values have different sizes ({q.shape[-1]} and {v.shape[-1]})"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"head size {q.shape[-1]} is not a multiple of 8 up to 256"
    return None


def _lengths(call: AttentionCall, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """cu_seqlens of queries and keys, and the longest block of each."""
    return *call.cumulative_lengths(device), max(call.q_lens), max(call.k_lens)


def _window(window: int | None) -> dict[str, int]:
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _package_window(window: int | None) -> dict[str, int]:
    return _window(window) or {"window_size_left": -1, "window_size_right": -1}
