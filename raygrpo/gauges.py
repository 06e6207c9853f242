"""Figures of a run for Prometheus, by way of Ray: every node's agent serves what the processes on it set here.

Owns which figures there are, their names, units and tags; roles set them as they know them, at most once a second or
once a step. Prometheus sees `ray_` before a name and, after that of a counter, `_total`; `run` tells runs apart.
cluster/grafana/raygrpo.json shows them. Without Ray (`--local`) there are none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from raygrpo.types import StepMetrics

if TYPE_CHECKING:
    from ray.util.metrics import Counter, Gauge

PERIOD_S = 1.0  # between looks of a role at itself; Ray passes on what it finds every few seconds


@dataclass(frozen=True, slots=True)
class Figure:
    name: str
    description: str
    unit: str
    tags: tuple[str, ...] = ()  # besides run
    kind: Literal["gauge", "counter"] = "gauge"

    @property
    def exported_name(self) -> str:
        return f"ray_{self.name}_total" if self.kind == "counter" else f"ray_{self.name}"


# Set by the learner of rank 0, once a step: name in docs/metrics.md -> figure.
OF_A_STEP = {
    "reward/mean": Figure("raygrpo_reward_mean", "Mean total reward of the step's completions", "reward"),
    "reward/std": Figure("raygrpo_reward_std", "Standard deviation of the completions' rewards", "reward"),
    "reward/frac_zero_std": Figure("raygrpo_reward_flat_groups", "Groups whose rewards are all the same", "share"),
    "completions/mean_length": Figure("raygrpo_completion_length", "Mean length of a completion", "tokens"),
    "completions/clipped_ratio": Figure("raygrpo_completion_clipped", "Completions cut off at max_tokens", "share"),
    "policy/loss": Figure("raygrpo_loss", "Loss", "loss"),
    "policy/grad_norm": Figure("raygrpo_grad_norm", "Norm of the gradient before clipping", "norm"),
    "policy/lr": Figure("raygrpo_learning_rate", "Learning rate", "rate"),
    "policy/entropy": Figure("raygrpo_entropy", "Mean entropy of the next-token distribution", "nats"),
    "policy/approx_kl": Figure("raygrpo_approx_kl", "KL between policy and old policy", "nats"),
    "policy/kl": Figure("raygrpo_kl", "KL between policy and reference policy", "nats"),
    "policy/clip_fraction": Figure("raygrpo_clip_fraction", "Tokens whose ratio lies beyond a bound", "share"),
    "sampling/logprob_diff": Figure(
        "raygrpo_logprob_diff", "Difference between the generator's and the learner's log-probabilities", "nats"
    ),
    "sampling/effective_sample_size": Figure("raygrpo_effective_sample_size", "Of the importance weights", "share"),
    "staleness/mean": Figure("raygrpo_staleness_mean", "Mean lag of the groups' policy", "versions"),
    "staleness/max": Figure("raygrpo_staleness_max", "Largest lag of the groups' policy", "versions"),
    "timing_s/step": Figure("raygrpo_step_seconds", "Wall time of the step", "s"),
    "perf/tokens_per_s": Figure("raygrpo_tokens_per_second", "Completion tokens per second of the step", "tokens/s"),
    "perf/learner_idle_fraction": Figure(
        "raygrpo_learner_idle", "Part of the step in which the learners waited for groups", "share"
    ),
    "prefix/token_ratio": Figure(
        "raygrpo_prefix_token_ratio", "Tokens without prefix sharing over tokens encoded", "ratio"
    ),
    "weights/mb_per_s": Figure("raygrpo_weights_rate", "Rate at which weights reached the generators", "MB/s"),
    "run/attempt": Figure("raygrpo_attempt", "How often the learners have started", "starts"),
}
STEP = Figure("raygrpo_step", "Newest step that was trained", "steps")
STAGE_SECONDS = Figure("raygrpo_stage_seconds", "Part of the step in which a stage was at work", "s", ("stage",))
STAGES = ("generate", "reward", "learn", "publish", "other")
FAULTS = Figure("raygrpo_faults", "What went wrong since the learners started", "faults", ("kind",))
FAULT_KINDS = ("reward_failed", "groups_failed", "checkpoints_failed", "non_finite_metrics")

# Set by the controller.
VERSION = Figure("raygrpo_version", "Version of the policy that the generators have been given", "versions")
GATE = Figure("raygrpo_gate", "The gate admits tickets below this number", "tickets")
CLAIMS = Figure("raygrpo_claims", "Claims that have not come back, by what they wait for", "groups", ("state",))
GENERATORS = Figure("raygrpo_generators", "Generators, by state", "processes", ("state",))
GENERATOR_FAILURES = Figure(
    "raygrpo_generator_failures", "Failures of generators since the controller started", "failures"
)

# Set by each generator.
GENERATOR_GROUPS = Figure("raygrpo_generator_groups", "Groups at a generator", "groups", ("generator", "state"))
GENERATOR_VERSION = Figure("raygrpo_generator_version", "Version that a generator serves", "versions", ("generator",))
GENERATOR_TOKENS = Figure("raygrpo_generator_tokens", "Tokens sampled", "tokens", ("generator",), "counter")
GENERATOR_BUSY = Figure("raygrpo_generator_busy_seconds", "Time in the engine", "s", ("generator",), "counter")

# Set by the evaluator.
EVAL_REWARD = Figure("raygrpo_eval_reward", "Mean held-out reward of the last evaluation", "reward", ("set",))

FIGURES = [
    *OF_A_STEP.values(),
    *(STEP, STAGE_SECONDS, FAULTS, VERSION, GATE, CLAIMS, GENERATORS, GENERATOR_FAILURES),
    *(GENERATOR_GROUPS, GENERATOR_VERSION, GENERATOR_TOKENS, GENERATOR_BUSY, EVAL_REWARD),
]


class Gauges:
    """The figures that one process of a run sets."""

    def __init__(self, run: str, **tags: str):
        """tags: values for all figures that have this tag."""
        self._tags = {"run": run} | tags
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._totals: dict[tuple[str, ...], float] = {}  # that counters have reached
        self._faults = dict.fromkeys(FAULT_KINDS, 0.0)

    def set(self, figure: Figure, value: float, **tags: str) -> None:
        """The figure's value now. One that is not finite is left out, and the value before stays: Ray 2.60 would drop
        all figures of the process with it."""
        from ray.util.metrics import Gauge

        if figure.name not in self._gauges:
            self._gauges[figure.name] = Gauge(figure.name, _describe(figure), ("run", *figure.tags))
        if math.isfinite(value):
            self._gauges[figure.name].set(value, self._of(figure, tags))

    def reach(self, figure: Figure, total: float, **tags: str) -> None:
        """Count up to a total that this process keeps."""
        from ray.util.metrics import Counter

        if figure.name not in self._counters:
            self._counters[figure.name] = Counter(figure.name, _describe(figure), ("run", *figure.tags))
        key = (figure.name, *tags.values())
        if (amount := total - self._totals.get(key, 0.0)) > 0:  # Ray takes no 0
            self._counters[figure.name].inc(amount, self._of(figure, tags))
            self._totals[key] = total

    def set_step(self, step: int, metrics: StepMetrics) -> None:
        """What docs/metrics.md describes, of the step that was trained last."""
        self.set(STEP, step)
        for name, figure in OF_A_STEP.items():
            if name in metrics:
                self.set(figure, metrics[name])
        for stage in STAGES:
            self.set(STAGE_SECONDS, metrics[f"timing_s/{stage}"], stage=stage)
        non_finite = sum(not math.isfinite(value) for value in metrics.values())  # the tracker counts them only later
        faults = metrics | {"faults/non_finite_metrics": non_finite}
        for kind in FAULT_KINDS:
            self._faults[kind] += faults[f"faults/{kind}"]
            self.set(FAULTS, self._faults[kind], kind=kind)  # from the first step on: what appears late has no increase

    def _of(self, figure: Figure, tags: dict[str, str]) -> dict[str, str]:
        return {name: tags.get(name) or self._tags[name] for name in ("run", *figure.tags)}


def _describe(figure: Figure) -> str:
    return f"{figure.description} [{figure.unit}]."
