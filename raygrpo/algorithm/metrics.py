"""How the metrics of micro-batches and ranks become those of an update, exactly.

`policy_loss` divides what it sums by the step's totals, so its values are shares that add up; only names ending in
`_max` are maxima. The order of micro-batches and their number change nothing but the last digits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import Tensor

Value = TypeVar("Value", float, Tensor)

_SQUARE_MEAN = "sampling/is_ratio_square_mean"  # travels beside the mean until the effective sample size can be formed


def combine_metrics(parts: Iterable[Mapping[str, Value]]) -> dict[str, Value]:
    """Add shares, take the larger of maxima. Associative: combine micro-batches on a rank, then ranks."""
    combined: dict[str, Value] = {}
    for part in parts:
        for name, value in part.items():
            if name not in combined:
                combined[name] = value
            elif name.endswith("_max"):
                combined[name] = max(combined[name], value)  # type: ignore[type-var]
            else:
                combined[name] = combined[name] + value
    return combined


def finish_metrics(combined: Mapping[str, Value]) -> dict[str, float]:
    """The metrics of a whole update as numbers, with `sampling/effective_sample_size` (Kish: mean^2 / mean of
    squares, 1 when sampler and learner agree) formed from the sums. Call it once, after everything was combined."""
    metrics = {name: float(value) for name, value in combined.items() if name != _SQUARE_MEAN}
    if _SQUARE_MEAN in combined:
        square_mean = float(combined[_SQUARE_MEAN])
        mean = metrics["sampling/is_ratio_mean"]
        metrics["sampling/effective_sample_size"] = mean**2 / square_mean if square_mean > 0 else 0.0
    return metrics
