"""Sums and means over the tokens of each rollout, or the rollouts of each group, in a flat layout without padding."""

from __future__ import annotations

from torch import Tensor


def segment_sum(values: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """values [N] or [N, K], index [N] in 0 .. num_segments-1 -> [num_segments] or [num_segments, K]; an empty
    segment gives 0."""
    return values.new_zeros(num_segments, *values.shape[1:]).index_add(0, index, values)


def segment_counts(index: Tensor, num_segments: int) -> Tensor:
    """How many elements each segment has, [num_segments], integers."""
    return index.bincount(minlength=num_segments)


def log_ratio_at_level(log_ratio: Tensor, index: Tensor, num_segments: int, level: str) -> Tensor:
    """Per-token log ratios [N] -> the log ratio each token is weighed with, [N]: its own ("token"), the sum over its
    segment ("sequence": the probability ratio of the whole completion), or the mean over it ("sequence_mean": the
    geometric mean).
    """
    if level == "token":
        return log_ratio
    total = segment_sum(log_ratio, index, num_segments)
    if level == "sequence_mean":
        total = total / segment_counts(index, num_segments).clamp(min=1)
    return total[index]
