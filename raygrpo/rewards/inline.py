"""Reward functions in the process that asks for rewards: breakpoints in them work, and nothing bounds what they do."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raygrpo.rewards.child import as_reward, describe_failure
from raygrpo.rewards.functions import load_function
from raygrpo.rewards.process import Outcome

if TYPE_CHECKING:
    from raygrpo.task_config import RewardFunctionConfig


class InlineRewards:
    """Stands in for RewardProcess where all of a run is one process. `timeout_s` has no effect."""

    def __init__(self, functions: Sequence[RewardFunctionConfig]):
        """Raises ValueError when a function cannot be loaded."""
        self._names = [function.metric_name for function in functions]
        self._functions = [load_function(function.use, function.args) for function in functions]
        self._runner = asyncio.Runner()

    def call(self, function: int, calls: Sequence[dict[str, Any]]) -> list[Outcome]:
        return [self._call(function, arguments) for arguments in calls]

    def _call(self, index: int, arguments: dict[str, Any]) -> Outcome:
        function = self._functions[index]
        given = {name: arguments[name] for name in function.arguments}
        try:
            value = function.call(**given)
            outcome = as_reward(self._runner.run(value) if function.is_async else value)
        except Exception as error:
            outcome = describe_failure(error)
        error = f"reward function {self._names[index]!r} {outcome['error']}" if "error" in outcome else ""
        return Outcome(outcome.get("value", math.nan), error, outcome.get("rationale", ""))

    def close(self) -> None:
        self._runner.close()
