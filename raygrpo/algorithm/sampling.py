"""Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2): does a group teach anything?

Without torch: the streaming stage that decides whether a ticket claims a fresh prompt does not load it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def zero_spread(rewards: Sequence[float]) -> bool:
    """Whether all finite rewards of a group are the same, so that every advantage relative to the group is 0.

    rewards: [G], total reward of each completion, before penalties for length or KL; NaN or infinite: the rollout
    failed and does not count. A group of which fewer than two rollouts count has no spread.
    """
    finite = [reward for reward in rewards if math.isfinite(reward)]
    return not finite or max(finite) == min(finite)
