"""Comparing the first micro-batch with the model's ordinary forward, one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from raygrpo.shared_prefix.layout import SharedPrefixBatch

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_NUM_CHECKED = 4


class SelfCheckError(RuntimeError):
    """Shared-prefix log-probabilities differ from those of sequences encoded alone."""


@torch.no_grad()
def check_against_ordinary_forward(
    forward: Callable, batch: SharedPrefixBatch, logprobs: Tensor, temperature: float
) -> None:
    """Raise SelfCheckError unless the last few completions get the log-probabilities that they have alone.

    forward: the model's ordinary one. logprobs: [S]. One padded call of a fixed number of sequences, so that every
    rank makes the same number of passes.
    """
    filled = [index for index, length in enumerate(batch.lengths) if length]
    chosen = filled[-_NUM_CHECKED:] or []
    sequences = [batch.sequence(index) for index in chosen] or [([0], 1)]
    width = max(len(ids) for ids, _ in sequences)
    device = batch.input_ids.device
    input_ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, (ids, _) in enumerate(sequences):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
    input_ids = input_ids.to(device)
    logits = forward(input_ids=input_ids, attention_mask=mask.to(device), use_cache=False).logits
    tolerance = _TOLERANCE[logits.dtype]
    split = batch.split(logprobs)
    for row, (index, (ids, context)) in enumerate(zip(chosen, sequences, strict=False)):
        rows = logits[row, context - 1 : len(ids) - 1].to(logprobs.dtype) / temperature
        alone = rows.log_softmax(-1).gather(-1, input_ids[row, context : len(ids), None])[:, 0]
        error = (split[index] - alone).abs().mean().item()
        if not error <= tolerance:
            raise SelfCheckError(
                f"log-probabilities of completion {index} differ from those of the sequence encoded alone by "
                f"{error:.2e} on average (tolerance {tolerance:.0e} in {logits.dtype}): the shared prefix is wrong for this "
                "model, please report it; self_check=False skips this check"
            )
