"""Random ragged batches in float64, flat as the package wants them and padded as other libraries do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Batch:
    lengths: Tensor  # [R]
    rollout_index: Tensor  # [S]
    group_index: Tensor  # [R]
    loss_mask: Tensor  # [S] bool
    logprobs: Tensor  # [S], a leaf that requires a gradient
    old_logprobs: Tensor  # [S]
    behaviour_logprobs: Tensor  # [S]
    ref_logprobs: Tensor  # [S]
    entropy: Tensor  # [S], a leaf that requires a gradient
    advantages: Tensor  # [R]

    @property
    def num_rollouts(self) -> int:
        return len(self.lengths)

    def padded(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """[S] -> [R, T], right-padded; differentiable."""
        rows = torch.full((self.num_rollouts, int(self.lengths.max())), fill, dtype=values.dtype)
        starts = self.lengths.cumsum(0) - self.lengths
        column = torch.arange(len(values)) - starts[self.rollout_index]
        return rows.index_put((self.rollout_index, column), values)


def random_batch(
    seed: int,
    lengths: list[int] | None = None,
    *,
    group_size: int = 4,
    spread: float = 0.4,
    holes: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Batch:
    """Ragged lengths (1 to 12), advantages of both signs and some 0, policies `spread` apart, and holes in the loss
    mask like those of tool output. Every rollout keeps at least one token in the loss unless its length is 0."""
    generator = torch.Generator().manual_seed(seed)
    if lengths is None:
        lengths = torch.randint(1, 13, (3 * group_size,), generator=generator).tolist()
    num_tokens, num_rollouts = sum(lengths), len(lengths)

    def normal(size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    logprobs = -normal(num_tokens).abs() - 0.01
    near = lambda: (logprobs + spread * normal(num_tokens)).to(dtype)  # noqa: E731
    index = torch.repeat_interleave(torch.arange(num_rollouts), torch.tensor(lengths))
    mask = torch.rand(num_tokens, generator=generator) < (0.8 if holes else 2.0)
    mask[(torch.tensor(lengths).cumsum(0) - 1)[torch.tensor(lengths) > 0]] = True
    advantages = normal(num_rollouts)
    advantages[::5] = 0.0
    return Batch(
        lengths=torch.tensor(lengths),
        rollout_index=index,
        group_index=torch.arange(num_rollouts) // group_size,
        loss_mask=mask,
        logprobs=logprobs.to(dtype).clone().requires_grad_(),
        old_logprobs=near(),
        behaviour_logprobs=near(),
        ref_logprobs=near(),
        entropy=normal(num_tokens).abs().to(dtype).requires_grad_(),
        advantages=advantages.to(dtype),
    )
