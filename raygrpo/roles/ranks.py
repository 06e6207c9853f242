"""What the learners tell one another, beside gradients."""

from __future__ import annotations

from typing import Any


def gather(value: Any) -> list[Any]:
    """The values of all ranks, in their order; every rank must call it."""
    import torch.distributed as dist

    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
