"""From hidden states to log-probabilities and entropies of given tokens, without the logits of a whole stream.

Rows are taken in chunks; one chunk's logits exist at a time, forward and backward. The last chunk's are kept, so that
a stream that fits one chunk computes its logits once; the others are computed again in backward, for 2 d V FLOPs a row.

With z the logits after the model's own scaling, divided by the temperature, p = softmax(z), H the entropy:

    log p_t = z_t - lse            d log p_t / dz = onehot_t - p
    H = -sum_j p_j log p_j         dH / dz = -p * (log p + H)

Shapes: R rows, d hidden size, V vocabulary, S tokens; several tokens may share a row (completions of one prompt).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows whose logits exist at a time: enough to keep a device busy with one product of [rows, d] and [d, V].
CHUNK_ROWS = {"cpu": 512, "cuda": 1024}


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the logits of its LM head: softcap * tanh(scale * logits / softcap)."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class HeadRequest:
    """What the LM head is asked. token_rows [S]: the row of hidden states that predicts each of targets [S]."""

    token_rows: Tensor
    targets: Tensor
    temperature: float = 1.0
    entropy: bool = False
    transform: LogitTransform = LogitTransform()
    chunk_rows: int | None = None  # None: what suits the device


def token_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, request: HeadRequest
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target and, if asked for, the entropy of the distribution it comes from: [S] each.

    hidden [R, d], weight [V, d], bias [V]; the results are float32 (float64 for float64 hidden states) and
    differentiable in all three.
    """
    # Sorted by row, the tokens of a chunk of rows are contiguous.
    rows, order = request.token_rows.sort(stable=True)
    logprobs, entropy = _ChunkedHead.apply(hidden, weight, bias, rows, request.targets[order], request)
    back = order.argsort()
    return logprobs[back], entropy[back] if request.entropy else None


class _ChunkedHead(torch.autograd.Function):
    """rows [S] ascending, targets [S] in the same order."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, targets, request: HeadRequest):
        precision = torch.promote_types(hidden.dtype, torch.float32)
        chunk_rows = request.chunk_rows or CHUNK_ROWS.get(hidden.device.type, 1024)
        chunks = list(_chunks(rows, hidden.shape[0], chunk_rows))
        logprobs = torch.empty(rows.shape, dtype=precision, device=hidden.device)
        entropy = torch.empty_like(logprobs) if request.entropy else None
        log_p = tanh = None
        for span, tokens in chunks:
            log_p, tanh = _log_softmax(hidden[span], weight, bias, request)
            local = rows[tokens] - span.start
            logprobs[tokens] = log_p[local, targets[tokens]]
            if entropy is not None:
                entropy[tokens] = -torch.linalg.vecdot(log_p.exp(), log_p)[local]
        ctx.save_for_backward(hidden, weight, bias, rows, targets, entropy, log_p, tanh)
        ctx.chunks, ctx.request = chunks, request
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, d_logprobs, d_entropy):
        hidden, weight, bias, rows, targets, entropy, last_log_p, last_tanh = ctx.saved_tensors
        request, (need_hidden, need_weight, need_bias, *_) = ctx.request, ctx.needs_input_grad
        # Chunks are summed in float32 at least: bfloat16 would lose the small ones.
        precision = torch.promote_types(weight.dtype, torch.float32)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = None
        d_bias = torch.zeros_like(bias, dtype=precision) if need_bias else None
        for span, tokens in ctx.chunks:
            if span.stop == hidden.shape[0]:
                log_p, tanh = last_log_p, last_tanh
            else:
                log_p, tanh = _log_softmax(hidden[span], weight, bias, request)
            local = rows[tokens] - span.start
            d_logits = _d_logits(
                log_p, local, targets[tokens],
                None if d_logprobs is None else d_logprobs[tokens],
                None if d_entropy is None else (d_entropy[tokens], entropy[tokens]),
            )  # fmt: skip
            d_logits *= request.transform.scale / request.temperature
            if tanh is not None:
                d_logits *= 1 - tanh.square()
            d_logits = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[span])
            if need_weight:
                d_weight = _plus_product(d_weight, d_logits.T, hidden[span], precision)
            if need_bias:
                d_bias += d_logits.sum(0, dtype=precision)
        return (
            d_hidden,
            _like(weight, d_weight) if need_weight else None,
            _like(bias, d_bias) if need_bias else None,
            None, None, None,
        )  # fmt: skip


def _chunks(rows: Tensor, num_rows: int, chunk_rows: int) -> Iterator[tuple[slice, slice]]:
    """Spans of at most chunk_rows rows, and the tokens (whose ascending rows are given) that each predicts."""
    starts = range(0, num_rows, chunk_rows)
    bounds = torch.searchsorted(rows, torch.tensor([*starts, num_rows], device=rows.device)).tolist()
    for start, first, last in zip(starts, bounds[:-1], bounds[1:], strict=True):
        yield slice(start, min(start + chunk_rows, num_rows)), slice(first, last)


def _log_softmax(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, request: HeadRequest
) -> tuple[Tensor, Tensor | None]:
    """log p of every vocabulary entry [n, V] for rows hidden [n, d], and the softcap's tanh if there is one."""
    logits = torch.nn.functional.linear(hidden, weight, bias).to(torch.promote_types(hidden.dtype, torch.float32))
    scale, softcap, tanh = request.transform.scale, request.transform.softcap, None
    if softcap is not None:
        tanh = logits.mul_(scale / softcap).tanh_()
        logits, scale = tanh * softcap, 1.0
    if scale != request.temperature:
        logits.mul_(scale / request.temperature)
    return logits.log_softmax(-1), tanh


def _d_logits(
    log_p: Tensor, local: Tensor, targets: Tensor, d_logprobs: Tensor | None, entropy: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Gradient [n, V] with respect to z. local [s]: row of each token; entropy: its gradient and value, [s] each."""
    p = log_p.exp()
    if entropy is not None:
        d_entropy, value = entropy
        by_log_p, constant = _sum_by_row(d_entropy, local, p), _sum_by_row(d_entropy * value, local, p)
        d_logits = torch.addcmul(constant, by_log_p, log_p).mul_(p).neg_()
    if d_logprobs is not None:
        total = _sum_by_row(d_logprobs, local, p)
        d_logits = p.mul_(total.neg_()) if entropy is None else d_logits.addcmul_(p, total, value=-1)
        d_logits.index_put_((local, targets), d_logprobs, accumulate=True)
    return d_logits


def _sum_by_row(values: Tensor, local: Tensor, like: Tensor) -> Tensor:
    """[s] values summed over the tokens of each row: [n, 1]."""
    return like.new_zeros(like.shape[0]).index_add_(0, local, values).unsqueeze(-1)


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor, precision: torch.dtype) -> Tensor:
    """total + a @ b in the given precision, in place where it can."""
    if total is None:
        return (a @ b).to(precision)
    return total.addmm_(a, b) if total.dtype == a.dtype else total.add_(a @ b)


def _like(parameter: Tensor, gradient: Tensor | None) -> Tensor:
    """A gradient in its parameter's type; zero where no row was scored."""
    return torch.zeros_like(parameter) if gradient is None else gradient.to(parameter.dtype)
