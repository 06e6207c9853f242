"""Rewards: what a completion is worth.

scorer.py turns a rollout group into a scored group; process.py runs the functions in a child process that can be
killed; child.py is that process; functions.py says what a reward function may look like; the other files hold one
built-in reward each.
"""

from raygrpo.rewards.score import Score
from raygrpo.rewards.scorer import RewardCheck, Scorer, check_rewards

__all__ = ["RewardCheck", "Score", "Scorer", "check_rewards"]
