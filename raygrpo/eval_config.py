"""The `eval` section of a run's configuration: what is evaluated, how, and how often; docs/evaluation.md says more.

Part of config.py's tree, in a file of its own for its length.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, FiniteFloat, PositiveFloat, PositiveInt, model_validator

from raygrpo.section import NonNegativeFloat, NonNegativeInt, Section
from raygrpo.task_config import DataConfig, RewardConfig, RewardFunctionConfig, SamplingConfig

ONLY_SET = "held_out"  # name of the set whose settings stand in `eval` itself

SetName = Annotated[str, Field(pattern=r"^[\w-]+$")]  # no dot: in key=value settings it would end the name


class EvalSamplingConfig(SamplingConfig):
    """As `generator.sampling`, with a temperature of 0 by default; `max_tokens` is that of `generator.sampling` unless
    it is set."""

    temperature: NonNegativeFloat = 0.0
    """Of the sampler; 0: always the most likely token (greedy)."""

    @model_validator(mode="after")
    def _cuts_need_a_choice(self) -> EvalSamplingConfig:
        if self.cuts and self.temperature == 0:
            raise ValueError(
                f"an evaluation's sampling has {self.cuts} but temperature 0, which takes the most likely token "
                "whatever is cut off: set a temperature, or leave the cuts out"
            )
        return self


class EvalSetConfig(Section):
    data: DataConfig
    """Prompts and answers, as in training. Every prompt is used in every evaluation; max_rows takes fewer."""
    sampling: EvalSamplingConfig = EvalSamplingConfig()
    samples: PositiveInt = 1
    """Completions of each prompt."""
    pass_at: list[PositiveInt] = [1]
    """Report pass@k for each k given here: the chance that one of k completions passes, estimated without bias from
    all `samples`."""
    pass_reward: FiniteFloat = 1.0
    """A completion passes when its total reward is at least this."""
    functions: Annotated[list[RewardFunctionConfig], Field(min_length=1)] | None = None
    """Reward functions, as in reward.functions; null: those."""

    @model_validator(mode="after")
    def _sound_functions(self) -> EvalSetConfig:
        if self.functions is not None:
            RewardConfig(functions=self.functions)
        return self

    @model_validator(mode="after")
    def _enough_samples(self) -> EvalSetConfig:
        if self.samples > 1 and self.sampling.temperature == 0:
            raise ValueError(
                f"an evaluation of {self.samples} samples at temperature 0 gives the same completion {self.samples} "
                "times: set sampling.temperature, or samples=1"
            )
        if (most := max(self.pass_at, default=1)) > self.samples:
            raise ValueError(f"pass_at {most} needs as many samples of each prompt: samples is {self.samples}")
        return self

    def metrics_of(self, name: str) -> list[str]:
        """Names of its metrics of which more is better, under the set's name."""
        return [f"eval/{name}/{metric}" for metric in ("reward", *(f"pass_at_{k}" for k in self.pass_at))]


class EvalConfig(Section):
    """The settings of a single set may stand here directly: `eval: {every: 10, data: {...}}`. It is named held_out."""

    every: NonNegativeInt = 10
    """Steps between evaluations; the last policy is evaluated too. 0: none in a run, only by `raygrpo evaluate`."""
    at_start: bool = True
    """Evaluate the policy before the first step."""
    timeout_s: PositiveFloat = 1800.0
    """An evaluation that takes longer is given up; training, which waits for it before the next publish, goes on."""
    table_prompts: NonNegativeInt = 32
    """Prompts of each set, the first ones, whose completions stand in a table beside the metrics; 0: no table."""
    sets: Annotated[dict[SetName, EvalSetConfig], Field(min_length=1)]
    """What is evaluated, by name: metrics are eval/<name>/reward and so on."""

    @model_validator(mode="before")
    @classmethod
    def _single_set(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        own = {key: value for key, value in given.items() if key in EvalSetConfig.model_fields}
        if not own:
            return given
        if "sets" in given:
            raise ValueError(
                f"eval.{next(iter(own))} describes a single set, and eval.sets names several: put it into one of them"
            )
        return {key: value for key, value in given.items() if key not in own} | {"sets": {ONLY_SET: own}}

    def due(self, version: int, num_steps: int) -> bool:
        """Whether the policy after so many of num_steps steps is evaluated."""
        if not self.every:
            return False
        return version == num_steps or (version % self.every == 0 and (version > 0 or self.at_start))

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics of which more is better."""
        return [metric for name, settings in self.sets.items() for metric in settings.metrics_of(name)]
