"""The `algorithm` section of a run's configuration: settings of advantages and loss; formulas in docs/algorithms.md.

Part of config.py's tree, in a file of its own for its length. Presets are applied when the section is read.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from raygrpo.presets import PRESETS
from raygrpo.section import NonNegativeFloat, NonNegativeInt, Probability, Section, merge


class AdvantageConfig(Section):
    baseline: Literal["group", "leave_one_out", "none"] = "group"
    """What a reward is compared with: the mean of its group, of the group's other completions (RLOO), or nothing."""
    scale: Literal["group", "batch", "none"] = "group"
    """Divide by the standard deviation of the group's rewards (GRPO), of the whole step's, or not at all (Dr. GRPO)."""
    per_reward: bool = False
    """Give each reward function advantages of its own, then weigh and add them (GDPO); else add rewards first."""
    whiten: Literal["none", "rollouts", "tokens"] = "none"
    """At last give the step's advantages mean 0 and deviation 1 (REINFORCE++), over rollouts or over tokens."""
    eps: NonNegativeFloat = 1e-6
    """Added to every standard deviation that divides."""

    @model_validator(mode="after")
    def _scalable(self) -> AdvantageConfig:
        if self.baseline == "none" and self.scale != "none":
            raise ValueError(
                f"advantage.scale {self.scale} needs a baseline, and advantage.baseline is none: set one, or scale "
                "none with whiten rollouts, which centres and scales over the step"
            )
        return self

    @property
    def needs_whole_step(self) -> bool:
        """Whether an advantage depends on the step's other groups: then a rank's own groups are not enough."""
        return self.scale == "batch" or self.whiten != "none"


class KLConfig(Section):
    coef: NonNegativeFloat = 0.0
    """Weight of the penalty for leaving the frozen reference policy; 0: no reference policy is loaded."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token estimate: log ratio, half its square, or the unbiased and never negative k3."""
    placement: Literal["loss", "reward"] = "loss"
    """Add the penalty to the loss of each token, or subtract its sum over a completion from the reward."""
    gradient: Literal["estimator", "k2", "ratio"] = "estimator"
    """Of the penalty in the loss: the estimator's own; that of k2, which is the KL's; or the estimator weighted by the
    policy ratio, which is the KL's also after several updates."""
    target: PositiveFloat | None = None
    """Steer `coef`, from its value here, so that the mean KL of a token stays near this; null: `coef` is fixed."""
    horizon: PositiveInt = 10_000
    """Completions over which the steered `coef` reacts: larger is slower."""

    @model_validator(mode="after")
    def _steerable(self) -> KLConfig:
        if self.target is not None and self.coef == 0:
            raise ValueError(f"kl.target ({self.target}) multiplies kl.coef, which is 0 and would stay 0: set kl.coef")
        if self.gradient != "estimator" and self.placement == "reward":
            raise ValueError(f"kl.gradient ({self.gradient}) is for kl.placement loss: a reward has no gradient")
        return self


class CorrectionConfig(Section):
    level: Literal["token", "sequence", "sequence_mean", "none"] = "token"
    """Weigh the loss by learner over sampler probability: of each token, of the whole completion, the geometric mean of
    its tokens, or not at all."""
    action: Literal["truncate", "mask"] = "truncate"
    """A weight outside [floor, cap] is moved to the bound (truncated importance sampling) or set to 0 (IcePop)."""
    floor: NonNegativeFloat = 0.0
    cap: PositiveFloat = 2.0

    @model_validator(mode="after")
    def _ordered(self) -> CorrectionConfig:
        if self.floor > self.cap:
            raise ValueError(f"correction.floor ({self.floor}) is above correction.cap ({self.cap})")
        return self


class OverlongConfig(Section):
    mask: bool = False
    """Completions cut off at max_tokens have no loss; their rewards still count in their group."""
    buffer: Probability = 0.0
    """Share of max_tokens at its end over which a length penalty rises from 0 to `penalty` (DAPO); 0: no penalty."""
    penalty: NonNegativeFloat = 1.0
    """Subtracted from the reward of a completion of max_tokens tokens, when `buffer` is above 0."""


class AlgorithmConfig(Section):
    preset: str | None = None
    """Named settings to start from (presets.py); any field set beside it wins. `algorithm: dapo` is short for
    `algorithm: {preset: dapo}`."""
    advantage: AdvantageConfig = AdvantageConfig()
    loss: Literal["ppo_clip", "cispo", "sapo"] = "ppo_clip"
    """Surrogate: clipped ratio (PPO; GSPO with sequence_mean), clipped detached weight (CISPO), soft gate (SAPO)."""
    ratio: Literal["token", "sequence", "sequence_mean"] = "token"
    """Policy ratio in the surrogate: of each token, of the whole completion, or its geometric mean per token (GSPO)."""
    clip_low: NonNegativeFloat = 0.2
    """The policy ratio counts down to 1 - clip_low. Not used by sapo."""
    clip_high: NonNegativeFloat = 0.2
    """The policy ratio counts up to 1 + clip_high. Not used by sapo."""
    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    """Bound of the ratio for negative advantages (ppo_clip only), e.g. 3; null: none."""
    sapo_temperature_positive: PositiveFloat = 1.0
    """Steepness of SAPO's gate for positive advantages."""
    sapo_temperature_negative: PositiveFloat = 1.05
    """Steepness of SAPO's gate for the other advantages."""
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum"] = "token_mean"
    """Mean over all tokens of the step; mean over completions of their token means; mean over completions of their
    token sums, divided by aggregation_length (Dr. GRPO)."""
    aggregation_length: PositiveInt | None = None
    """Constant that sequence_sum divides by; null: generator.sampling.max_tokens."""
    kl: KLConfig = KLConfig()
    correction: CorrectionConfig = CorrectionConfig()
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    overlong: OverlongConfig = OverlongConfig()
    dynamic_sampling: NonNegativeInt = 0
    """How many fresh prompts a ticket may claim, one after another, while its group has no spread; 0: none."""
    epochs: PositiveInt = 1
    """Passes over a step's rollouts."""
    mini_batches: PositiveInt = 1
    """Optimizer updates in a pass, each on its share of the step's groups."""

    @property
    def updates_per_step(self) -> int:
        return self.epochs * self.mini_batches

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, given: Any) -> Any:
        given = {"preset": given} if isinstance(given, str) else given
        if not isinstance(given, dict) or given.get("preset") is None:
            return given
        name = given["preset"]
        if name not in PRESETS:
            nearest = difflib.get_close_matches(str(name), PRESETS, n=1)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise ValueError(f"unknown algorithm.preset {name!r}: {hint}known are {', '.join(PRESETS)}")
        # A section given as an object says what was set in it, not what its defaults are.
        given = {
            key: value.model_dump(exclude_unset=True) if isinstance(value, Section) else value
            for key, value in given.items()
        }
        return merge(PRESETS[name], given)

    @model_validator(mode="after")
    def _applicable(self) -> AlgorithmConfig:
        if self.dual_clip is not None and self.loss != "ppo_clip":
            raise ValueError(f"algorithm.dual_clip ({self.dual_clip}) belongs to loss ppo_clip, not to {self.loss}")
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            raise ValueError(f"algorithm.dual_clip ({self.dual_clip}) must be above 1 + clip_high ({self.clip_high})")
        if self.loss == "ppo_clip" and self.clip_low > 1:
            raise ValueError(f"algorithm.clip_low ({self.clip_low}) is above 1: the ratio is never negative")
        return self
