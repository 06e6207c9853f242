"""Rollout group -> scored group: each completion gets the weighted sum of what the reward functions say of it."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from raygrpo.rewards.process import Outcome, RewardProcess
from raygrpo.types import Prompt, Reward, RolloutGroup, ScoredGroup

if TYPE_CHECKING:
    from raygrpo.config import RewardConfig

logger = logging.getLogger(__name__)


class RewardCaller(Protocol):
    """What RewardProcess is."""

    def call(self, function: int, calls: Sequence[dict[str, Any]]) -> list[Outcome]: ...

    def close(self) -> None: ...


class Scorer:
    """Scores one group at a time, in a child process of its own (see process.py). Not for several threads at once."""

    def __init__(self, config: RewardConfig, import_paths: Sequence[str] = (), *, process: RewardCaller | None = None):
        """import_paths: directories where `module:name` is looked for first. process: what calls the functions, instead
        of a child process.

        Raises ValueError when a function cannot be loaded or asks for what there is not.
        """
        self._config = config
        self._process = process or RewardProcess(config.functions, import_paths)

    def score(self, group: RolloutGroup) -> ScoredGroup:
        """One reward for each rollout; none for a group that failed.

        When a function raises, hangs, crashes or returns no finite number, that rollout's reward has an error; the
        functions after it are not called for that rollout. The group's other rollouts are not affected.
        """
        start = time.time()
        rewards = self._rewards(group) if group.rollouts else []
        scored = ScoredGroup(group=group, rewards=rewards, score_start_s=start, score_end_s=time.time())
        _log(scored)
        return scored

    def _rewards(self, group: RolloutGroup) -> list[Reward]:
        calls = [
            call_arguments(group.prompt, rollout.text, finish_reason=rollout.finish_reason)
            for rollout in group.rollouts
        ]
        num_functions = len(self._config.functions)
        components = [[math.nan] * num_functions for _ in calls]
        rationales = [[""] * num_functions for _ in calls]
        errors = [""] * len(calls)
        for k in range(num_functions):
            unfailed = [i for i, error in enumerate(errors) if not error]
            outcomes = self._process.call(k, [calls[i] for i in unfailed])
            for i, outcome in zip(unfailed, outcomes, strict=True):
                components[i][k], errors[i], rationales[i][k] = outcome.value, outcome.error, outcome.rationale
        return [self._reward(*parts) for parts in zip(components, rationales, errors, strict=True)]

    def _reward(self, components: list[float], rationales: list[str], error: str) -> Reward:
        if error:
            return Reward(total=0.0, components=components, rationales=rationales, error=error)
        total = sum(f.weight * value for f, value in zip(self._config.functions, components, strict=True))
        if not math.isfinite(total):
            error = f"the weighted sum of rewards {components} is {total}"
            return Reward(total=0.0, components=components, rationales=rationales, error=error)
        return Reward(total=total, components=components, rationales=rationales)

    def close(self) -> None:
        """End the child process."""
        self._process.close()


def _log(scored: ScoredGroup) -> None:
    errors = [reward.error for reward in scored.rewards if reward.error]
    for error in dict.fromkeys(errors):
        logger.info("%d of %d completions got no reward: %s", errors.count(error), len(scored.rewards), error)
    if len(errors) < len(scored.rewards):
        mean = sum(reward.total for reward in scored.rewards if not reward.error) / (len(scored.rewards) - len(errors))
        logger.info("scored in %.3f s: mean reward %.4g", scored.score_end_s - scored.score_start_s, mean)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardCheck:
    """What one reward function says of completions that should be right and wrong, over a sample of prompts."""

    function: str
    reference: float | None  # mean reward of the reference answer given as the completion; None: no call succeeded
    empty: float | None  # the same of an empty completion
    ms: float  # mean time of a call
    error: str  # of the first call that failed, or ""


def check_rewards(
    config: RewardConfig, prompts: Sequence[Prompt], import_paths: Sequence[str] = ()
) -> list[RewardCheck]:
    """Call each reward function on the reference answers of `prompts` and on empty completions.

    Raises ValueError when a function cannot be loaded.
    """
    process = RewardProcess(config.functions, import_paths)
    try:
        return [_check(process, k, config.functions[k].metric_name, prompts) for k in range(len(config.functions))]
    finally:
        process.close()


def _check(process: RewardProcess, k: int, name: str, prompts: Sequence[Prompt]) -> RewardCheck:
    with_answer = [prompt for prompt in prompts if prompt.answer is not None]
    start = time.perf_counter()
    references = process.call(k, [call_arguments(prompt, answer_text(prompt.answer)) for prompt in with_answer])
    empties = process.call(k, [call_arguments(prompt, "") for prompt in prompts])
    seconds = time.perf_counter() - start
    means = []
    for outcomes in (references, empties):
        values = [outcome.value for outcome in outcomes if not outcome.error]
        means.append(sum(values) / len(values) if values else None)
    errors = [outcome.error for outcome in [*references, *empties] if outcome.error]
    return RewardCheck(
        function=name,
        reference=means[0],
        empty=means[1],
        ms=1000 * seconds / max(1, len(references) + len(empties)),
        error=errors[0] if errors else "",
    )


def call_arguments(prompt: Prompt, completion: str, *, finish_reason: str = "stop") -> dict[str, Any]:
    """All that a reward function may ask for (functions.ARGUMENTS)."""
    return {
        "completion": completion,
        "answer": prompt.answer,
        "prompt": prompt.text,
        "row": prompt.row,
        "finish_reason": finish_reason,
    }


def answer_text(answer: Any) -> str:
    """A reference answer as a policy would write it."""
    return answer if isinstance(answer, str) else json.dumps(answer)
