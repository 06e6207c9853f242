"""The sections that say what a model is asked, how its answers are sampled and what they are worth.

Training and evaluation (eval_config.py) have one of each. config.py puts them into the tree.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, PositiveFloat, PositiveInt, model_validator

from raygrpo.imports import is_object_name
from raygrpo.section import LabelSelector, NonNegativeFloat, Probability, Section


class DataConfig(Section):
    source: str
    """A .jsonl or .parquet file or a glob of them (relative to the YAML's directory), a Hugging Face dataset name, or
    `module:function` that returns an iterable of dicts."""
    subset: str | None = None
    """Configuration of a Hugging Face dataset, e.g. main of openai/gsm8k; files and functions have none."""
    split: str = "train"
    """Split of a Hugging Face dataset, slices included, e.g. train[:1000]; files and functions have none."""
    args: dict[str, Any] = {}
    """Keyword arguments for `module:function`."""
    max_rows: PositiveInt | None = None
    """Read only the first rows of the source."""
    prompt: str = "prompt"
    """Column with the prompt: a text, or a list of chat messages ({role, content}) for the tokenizer's chat
    template."""
    answer: str | None = "answer"
    """Column with the reference answer (any JSON value), or null where rewards need none."""
    system_prompt: str | None = None
    """Put before every prompt as a system message; a text prompt then becomes the user message of a chat."""
    chat_template_kwargs: dict[str, Any] = {}
    """Passed to the chat template as they are, e.g. enable_thinking."""
    shuffle: bool = True
    """Draw a new order for each epoch from `seed`; otherwise the order of the source."""
    max_prompt_tokens: PositiveInt | None = None
    """Longest prompt accepted; null: what the model's context leaves beside the completion."""
    overlong_prompts: Literal["error", "drop"] = "error"
    """What happens to a longer prompt: stop before the run, or leave it out and count it."""
    invalid_rows: Literal["error", "drop"] = "error"
    """What happens to a row that is malformed or has an empty prompt: stop, naming file and line, or leave it out and
    count it."""

    @property
    def source_kind(self) -> Literal["files", "function", "hub"]:
        if self.source.endswith((".jsonl", ".parquet")):
            return "files"
        return "function" if is_object_name(self.source) else "hub"

    @model_validator(mode="after")
    def _settings_fit_source(self) -> DataConfig:
        if self.source_kind != "hub" and (self.subset is not None or self.split != "train"):
            chosen = f"data.subset ({self.subset}) and data.split ({self.split})"
            raise ValueError(f"{chosen} choose from a Hugging Face dataset; data.source is {self.source}")
        if self.source_kind != "function" and self.args:
            raise ValueError(f"data.args ({self.args}) are for a `module:function`; data.source is {self.source}")
        return self


class RewardFunctionConfig(Section):
    use: str
    """`exact_match`, `numeric_match`, `format`, or `module:name` of a function or class; rewards/functions.py says how
    each is called."""
    weight: FiniteFloat = 1.0
    """Factor of this function's value in the total reward."""
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None
    """Name in metrics (`reward/<name>`); null: the function's own name."""
    timeout_s: PositiveFloat = 30.0
    """A call that takes longer is a failure of that rollout."""
    args: dict[str, Any] = {}
    """Further keyword arguments: for a function at each call, for a class when it is made."""

    @property
    def metric_name(self) -> str:
        return self.name or self.use.rpartition(":")[2]


class RewardConfig(Section):
    functions: list[RewardFunctionConfig] = Field(min_length=1)
    max_error_share: Probability = 0.1
    """The run stops when a larger share of a step's rollouts failed to get a reward."""
    num_workers: PositiveInt = 1
    """Processes that score, each one group at a time."""
    num_cpus: NonNegativeFloat = 0.1
    """CPUs that Ray reserves for each scoring process."""
    label_selector: LabelSelector = {}
    """Labels of the nodes for the stream's stages, e.g. {raygrpo-role: reward}: the processes that score, and those
    that wait for generators."""

    @model_validator(mode="after")
    def _distinct_names(self) -> RewardConfig:
        names = [function.metric_name for function in self.functions]
        if taken := {"mean", "std", "frac_zero_std", "num_failed"}.intersection(names):
            raise ValueError(
                f"reward/{taken.pop()} is a metric of the total reward: give this reward function another `name`"
            )
        if len(set(names)) < len(names):
            raise ValueError(f"two reward functions share a name ({', '.join(names)}): give one of them a `name`")
        return self


class SamplingConfig(Section):
    max_tokens: PositiveInt = 256
    """Longest completion."""
    temperature: PositiveFloat = 1.0
    """Of the sampler; the learner divides its logits by the same number."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling."""
    top_k: Annotated[int, Field(ge=-1)] = -1
    """Sample among the k most likely tokens only; -1: all."""
    min_p: Probability = 0.0
    """Leave out tokens less likely than this share of the most likely one."""

    @property
    def cuts(self) -> str:
        """The settings that leave tokens out, for a person; "" where there is none."""
        on = {"top_p": self.top_p < 1, "top_k": self.top_k > 0, "min_p": self.min_p > 0}
        return ", ".join(f"{name}={getattr(self, name)}" for name, is_on in on.items() if is_on)

    @property
    def most_that_cuts_add(self) -> float:
        """Bound of what top_p, top_k and min_p together add to the log-probability of a sampled token, which the
        sampler gives as that of the distribution it drew from: minus the log of the probability that is left in. top_p
        leaves at least top_p; the others have no bound."""
        return math.inf if self.top_k > 0 or self.min_p > 0 else -math.log(self.top_p)
