"""What a step was made of and how long its stages took: counts and times of each rank, put together into metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raygrpo.timeline import Interval, covered_seconds, stage_seconds
from raygrpo.types import ScoredGroup, StepMetrics

if TYPE_CHECKING:
    from raygrpo.shared_prefix.cost import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """When the stages of one step ran (unix time): of one rank, or of all."""

    wait: Interval
    learn: Interval
    generate: list[Interval]
    score: list[Interval]

    def metrics(
        self,
        publish: list[Interval],
        evaluate: list[Interval] | None,
        sampled: Sequence[Interval],
        start_s: float,
        end_s: float,
    ) -> StepMetrics:
        """evaluate: None where the run has no evaluations. sampled: when generators were at work, also for later
        steps."""
        stages = {
            "generate": [*self.generate, *sampled],
            "reward": self.score,
            "learn": [self.learn],
            "publish": publish,
        }
        if evaluate is not None:
            stages["evaluate"] = evaluate
        timing = stage_seconds(stages, start_s, end_s)
        timing["dispatch"] = max(0.0, min(start for start, _ in self.generate) - start_s)
        timing["deliver"] = max(0.0, self.wait[1] - max(end for _, end in self.score))
        idle = covered_seconds([self.wait], start_s, end_s) / timing["step"]
        return {f"timing_s/{name}": value for name, value in timing.items()} | {"perf/learner_idle_fraction": idle}


def merge_times(times: list[StepTimes]) -> StepTimes:
    """Of all ranks: lists joined; the step's wait ends when the last rank has its groups, learning when the last is
    done."""
    return StepTimes(
        wait=(times[0].wait[0], max(t.wait[1] for t in times)),
        learn=(min(t.learn[0] for t in times), max(t.learn[1] for t in times)),
        generate=[interval for t in times for interval in t.generate],
        score=[interval for t in times for interval in t.score],
    )


@dataclass(frozen=True, slots=True)
class Facts:
    """Counts over one rank's groups of a step."""

    tickets: list[int]
    staleness: list[int]
    num_completion_tokens: int
    tokens_shared: int  # that the shared-prefix forward encodes
    tokens_repeated: int  # that encoding every prompt + completion would
    flops_shared: float
    flops_repeated: float
    groups_failed: int
    replacements: int  # prompts given up by dynamic sampling


def facts_of(groups: list[ScoredGroup], step: int, shape: ModelShape) -> Facts:
    from raygrpo.shared_prefix.cost import num_tokens, training_flops

    lengths = [(len(g.group.prompt.prompt_ids), [len(r.completion_ids) for r in g.group.rollouts]) for g in groups]
    sampled = [length for length in lengths if length[1]]
    return Facts(
        tickets=[g.group.ticket for g in groups],
        staleness=[step - g.group.policy_version for g in groups],
        num_completion_tokens=sum(sum(completions) for _, completions in sampled),
        tokens_shared=sum(num_tokens(length, shared=True) for length in sampled),
        tokens_repeated=sum(num_tokens(length, shared=False) for length in sampled),
        flops_shared=training_flops(shape, sampled, shared=True),
        flops_repeated=training_flops(shape, sampled, shared=False),
        groups_failed=sum(bool(g.group.error) for g in groups),
        replacements=sum(g.group.replacement for g in groups),
    )


def combine_facts(facts: list[Facts]) -> StepMetrics:
    staleness = [value for f in facts for value in f.staleness]
    shared, repeated = sum(f.tokens_shared for f in facts), sum(f.tokens_repeated for f in facts)
    return {
        "staleness/mean": sum(staleness) / len(staleness),
        "staleness/max": float(max(staleness)),
        "completions/num_tokens": float(sum(f.num_completion_tokens for f in facts)),
        "prefix/tokens_encoded": float(shared),
        "prefix/tokens_repeated": float(repeated),
        "prefix/token_ratio": repeated / max(shared, 1),
        "prefix/speedup_limit": sum(f.flops_repeated for f in facts) / max(sum(f.flops_shared for f in facts), 1.0),
        "faults/groups_failed": float(sum(f.groups_failed for f in facts)),
        "prompts/replaced": float(sum(f.replacements for f in facts)),
    }
