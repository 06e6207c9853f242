"""What flows between the roles.

One row of the stream is one group: a prompt with all its completions. Its type changes by stage (Prompt -> RolloutGroup
-> ScoredGroup), so that no field is ever "filled in later". Dataclasses live at the edges; between processes a group is
one Arrow row (`group_to_row` and friends; `GROUP_SCHEMA` and `SCORED_GROUP_SCHEMA` in stream.py); tensors exist only
inside the learner.

Shapes: G completions of one prompt, C tokens of one completion, K reward functions.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from raygrpo.task_config import SamplingConfig

LogLevel = Literal["debug", "info", "warning", "error"]
FENCED = -1  # in place of a ticket: a row that stands for nothing


class RunStopped(RuntimeError):
    """Going on would be wrong, and starting again from a checkpoint would not help. The message is for the user."""


class TransferError(RuntimeError):
    """Weights did not arrive, and nothing was changed: the same transfer may be tried again."""


class NeverBegunError(RuntimeError):
    """The engine failed before it was given this group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """Which run a role works for: what it says and measures (logs.py, gauges.py) bears its name."""

    name: str  # of the run's directory, unlike that of any other run
    directory: str
    groups_per_step: int
    log_level: LogLevel


FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One example of the dataset, rendered and tokenised."""

    prompt_id: int  # row of the dataset, stable across epochs and runs
    prompt_ids: list[int]
    text: str  # as the chat template rendered it
    answer: Any = None  # JSON value: the reference solution
    row: dict[str, Any] = field(default_factory=dict)  # the dataset's other columns (JSON values), for reward functions


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled completion and how it was sampled."""

    completion_ids: list[int]  # [C], the end-of-sequence token included when it was sampled
    behaviour_logprobs: list[float]  # [C], natural log, from the generator, at sampling time, after temperature
    finish_reason: FinishReason
    text: str  # decoded, special tokens left out: what rewards read
    end_s: float = field(compare=False)  # unix time at which it was complete; all of a group begin together


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRequest:
    """What a group is sampled from."""

    ticket: int  # of the group; in an evaluation its row
    prompt: Prompt
    seeds: list[int]  # [G], one for each completion
    sampling: SamplingConfig | None = None  # None: generator.sampling
    replacement: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """All completions of one prompt, sampled under one policy version. Without rollouts when generation failed: `error`
    says why."""

    ticket: int  # position in the run: step * groups_per_step + place within the step; in an evaluation its row
    prompt: Prompt
    policy_version: int
    rollouts: list[Rollout]  # [G], or [] after an error
    generator: str  # name of the actor that sampled
    generate_start_s: float  # unix time
    generate_end_s: float
    error: str = ""
    replacement: int = 0  # dynamic sampling: how many prompts of this ticket were given up before this one
    attempt: int = 0  # of the learners that asked for it

    def flaw(self, *, ticket: int, num_completions: int, min_version: int) -> str:
        """What is wrong with this as a generator's answer to a claim; "" where nothing is."""
        if self.ticket != ticket:
            return f"it is of ticket {self.ticket}"
        if len(self.rollouts) != num_completions:
            return f"it has {len(self.rollouts)} of {num_completions} completions"
        if self.policy_version < min_version:
            return f"it is of version {self.policy_version}, older than {min_version}"
        for index, rollout in enumerate(self.rollouts):
            ids, logprobs = rollout.completion_ids, rollout.behaviour_logprobs
            if not ids or len(logprobs) != len(ids):
                return f"completion {index} has {len(ids)} tokens and {len(logprobs)} log-probabilities"
            if not all(-math.inf < value < 0.01 for value in logprobs):  # rounding may lift certainty over 0
                return f"completion {index} has log-probabilities that are none"
            if min(ids) < 0:
                return f"completion {index} has the token {min(ids)}"
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """What the reward functions said of one completion."""

    total: float  # weighted sum; 0.0 where `error` is set
    components: list[float]  # [K], unweighted, in the order of the configuration; NaN from the function that failed on
    error: str = ""  # why a function failed; a failed rollout has advantage 0 and no loss
    rationales: list[str] = field(default_factory=list)  # [K], what each was given for ("": not said); [] where none is


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A rollout group with one reward for each completion."""

    group: RolloutGroup
    rewards: list[Reward]  # [G]
    score_start_s: float  # unix time
    score_end_s: float

    @property
    def totals(self) -> list[float]:
        """[G]: total rewards, NaN where a reward failed."""
        return [math.nan if reward.error else reward.total for reward in self.rewards]


StepMetrics = dict[str, float]  # metric name -> value, for one step


def group_to_row(group: RolloutGroup) -> dict[str, Any]:
    """The group as one row for Arrow: plain lists and strings. `row_to_group` is its inverse."""
    prompt = _plain(group.prompt) | {"answer": json.dumps(group.prompt.answer), "row": json.dumps(group.prompt.row)}
    rollouts = [_plain(rollout) for rollout in group.rollouts]
    return _plain(group) | {"prompt": prompt, "rollouts": rollouts, "error": _encodable(group.error)}


def row_to_group(row: dict[str, Any]) -> RolloutGroup:
    prompt = row["prompt"]
    prompt = Prompt(**prompt | {"answer": json.loads(prompt["answer"]), "row": json.loads(prompt["row"])})
    return RolloutGroup(**row | {"prompt": prompt, "rollouts": [Rollout(**rollout) for rollout in row["rollouts"]]})


def scored_group_to_row(scored: ScoredGroup) -> dict[str, Any]:
    """As `group_to_row`, one level up."""
    rewards = [
        _plain(reward) | {"error": _encodable(reward.error), "rationales": [*map(_encodable, reward.rationales)]}
        for reward in scored.rewards
    ]
    return _plain(scored) | {"group": group_to_row(scored.group), "rewards": rewards}


def row_to_scored_group(row: dict[str, Any]) -> ScoredGroup:
    return ScoredGroup(**row | {"group": row_to_group(row["group"]), "rewards": [Reward(**r) for r in row["rewards"]]})


def _plain(value: Any) -> dict[str, Any]:
    """One level of the dataclass as a dict; dataclasses.asdict would copy every token."""
    return {f.name: getattr(value, f.name) for f in fields(value)}


def _encodable(text: str) -> str:
    """Half surrogate pairs, which a user's exception may hold but UTF-8 may not, become question marks."""
    return text.encode(errors="replace").decode()
