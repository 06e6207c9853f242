"""Comparing the first micro-batch with what it must equal, in the training dtype.

Two comparisons, because in half precision one is not enough: rounding moves log-probabilities by as much as a token
too many in a mask does. So every attention layer is compared by itself, on the queries, keys and values it really got,
with a plain reference, where a wrong mask stands out of rounding by an order of magnitude; and log-probabilities are
compared with the model's ordinary forward, where what attention cannot show does: other ways of mixing tokens,
positions that are ignored, what happens behind the LM head.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from raygrpo.shared_prefix.backends.dense import attend_dense
from raygrpo.shared_prefix.layout import AttentionPlan, SharedPrefixBatch

# Of an attention output's norm; of a log-probability at temperature 1, averaged over a completion.
ATTENTION_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
LOGPROB_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_NUM_ROWS = 8
_NUM_COMPLETIONS = 4
_NUM_TOKENS = 256  # of a completion


class SelfCheckError(RuntimeError):
    """A shared-prefix pass differs from what it must equal."""


@torch.no_grad()
def check_attention(out: Tensor, q, k, v, *, plan: AttentionPlan, scale, window, softcap, external, layer) -> None:
    """Raise SelfCheckError unless a layer's output [T, Hq, Dv] equals plain attention, at the ends of some segments."""
    if external is not None:
        k, v = (torch.cat(pair) for pair in zip(external, (k, v), strict=True))
    tolerance = ATTENTION_TOLERANCE[out.dtype]
    last = len(plan.starts) - 1
    ends = list(accumulate(plan.own.q_lens))
    for segment in sorted({last * i // (_NUM_ROWS - 1) for i in range(_NUM_ROWS)}):
        row = ends[segment] - 1
        keys = plan.key_rows(segment).to(k.device)
        distance = torch.arange(len(keys) - 1, -1, -1, device=k.device)[None]
        visible = torch.ones_like(distance, dtype=torch.bool) if window is None else distance < window
        alone = attend_dense(q[row : row + 1], k[keys], v[keys], visible, scale, softcap)[0]
        error = ((out[row] - alone).norm() / alone.norm().clamp(min=torch.finfo(out.dtype).tiny)).item()
        if not error <= tolerance:
            raise SelfCheckError(
                f"attention layer {layer}: the output at row {row} differs from plain attention by {error:.1e} of its "
                f"norm (tolerance {tolerance:.0e} in {out.dtype}). Please report this with the model and the device"
            )


@torch.no_grad()
def check_logprobs(forward: Callable, batch: SharedPrefixBatch, logprobs: Tensor, temperature: float) -> None:
    """Raise SelfCheckError unless the last few completions have the log-probabilities that they have alone.

    forward: the model's ordinary one. logprobs: [S]. As many calls whatever the batch holds, so that every rank of a
    sharded model makes the same ones; of a long completion some tokens are compared, evenly spread, so that no more
    logits exist than _NUM_TOKENS rows.
    """
    chosen = [index for index, length in enumerate(batch.lengths) if length][-_NUM_COMPLETIONS:]
    by_completion = batch.split(logprobs)
    for index in [*chosen, *[None] * (_NUM_COMPLETIONS - len(chosen))]:
        ids, context = ([0, 0], 1) if index is None else batch.sequence(index)
        length = len(ids) - context
        tokens = torch.linspace(0, length - 1, min(length, _NUM_TOKENS)).round().long()
        input_ids = torch.tensor([ids], device=logprobs.device)
        rows = (tokens + context - 1).to(logprobs.device)
        logits = forward(input_ids=input_ids, use_cache=False, logits_to_keep=rows).logits[0]
        if index is None:
            continue
        if len(logits) != len(rows):  # a model of its own code that takes no notice of logits_to_keep
            logits = logits[rows]
        log_p = (logits.to(logprobs.dtype) / temperature).log_softmax(-1)
        alone = log_p.gather(-1, input_ids[0, rows + 1, None])[:, 0]
        error = (by_completion[index][tokens.to(logprobs.device)] - alone).abs().mean().item()
        # Rounding of the logits is divided by the temperature too.
        tolerance = LOGPROB_TOLERANCE[logits.dtype] / min(temperature, 1.0)
        if not error <= tolerance:
            raise SelfCheckError(
                f"log-probabilities of completion {index} differ from those of its sequence encoded alone by "
                f"{error:.1e} on average (tolerance {tolerance:.0e} in {logits.dtype}). The model does something that "
                "a shared prefix gets wrong; please report it"
            )
