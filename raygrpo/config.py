"""Every setting, its default and its one-line meaning; reading a run's YAML with command-line overrides.

A run's YAML names only what it changes. Each fact is set once: what follows from it is a property, never a second key. Engine options
pass through untouched under their upstream names (`generator.vllm`, `learner.deepspeed`). A bad combination raises ValueError with both
values in the message; nothing here repairs a setting behind its author's back. A role receives its own section, not the tree.
"""

from __future__ import annotations

import difflib
import os
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
NonNegativeInt = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelConfig(Section):
    path: str
    """A directory with a Hugging Face model and tokenizer (relative to the YAML's directory), or a name on the Hugging Face hub."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward pass in learner and generator. The optimizer always keeps float32 master weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class DataConfig(Section):
    source: str
    """A .jsonl or .parquet file or a glob of them (relative to the YAML's directory), a Hugging Face dataset name, or `module:function`
    that returns an iterable of dicts."""
    split: str = "train"
    """Split of a Hugging Face dataset; files and functions have none."""
    prompt: str = "prompt"
    """Column with the prompt: a text, or a list of chat messages ({role, content}) for the tokenizer's chat template."""
    answer: str | None = "answer"
    """Column with the reference answer (any JSON value), or null where rewards need none."""
    system_prompt: str | None = None
    """Put before every prompt as a system message; a text prompt then becomes the user message of a chat."""
    shuffle: bool = True
    """Draw a new order for each epoch from `seed`; otherwise the order of the source."""
    max_prompt_tokens: PositiveInt | None = None
    """Longest prompt accepted; null: what the model's context leaves beside the completion."""
    overlong_prompts: Literal["error", "drop"] = "error"
    """What happens to a longer prompt: stop before the run, or leave it out and count it."""
    invalid_rows: Literal["error", "drop"] = "error"
    """What happens to a row that is malformed or has an empty prompt: stop, naming file and line, or leave it out and count it."""
    args: dict[str, Any] = {}
    """Keyword arguments for `module:function`."""


class RewardFunctionConfig(Section):
    use: str
    """`exact_match`, `numeric_match`, `format`, or `module:function`. The function is called once per completion with the arguments it
    names: completion, answer, prompt, row, finish_reason; it returns a number."""
    weight: float = 1.0
    """Factor of this function's value in the total reward."""
    name: str | None = None
    """Name in metrics (`reward/<name>`); null: the function's own name."""
    timeout_s: PositiveFloat = 30.0
    """A call that takes longer is a failure of that rollout."""
    args: dict[str, Any] = {}
    """Further keyword arguments for the function."""

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

    @model_validator(mode="after")
    def _distinct_names(self) -> RewardConfig:
        names = [function.metric_name for function in self.functions]
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


class GeneratorConfig(Section):
    engine: Literal["vllm", "transformers"] = "vllm"
    """What samples: vLLM, or transformers' own generation for machines without vLLM (slow)."""
    num_actors: PositiveInt = 1
    """Generator processes, each with one engine."""
    sampling: SamplingConfig = SamplingConfig()
    max_groups: PositiveInt = 32
    """Groups that one generator samples at a time; further ones wait."""
    num_cpus: NonNegativeFloat = 0.5
    """CPUs that Ray reserves for each generator."""
    num_gpus: NonNegativeFloat = 0.0
    """GPUs for each generator."""
    num_threads: PositiveInt | None = None
    """Threads of the engine's CPU kernels; null: the machine's cores, shared evenly among generators."""
    vllm: dict[str, Any] = {}
    """Passed to vllm.LLM as they are, e.g. max_model_len, gpu_memory_utilization, kv_cache_memory_bytes, tensor_parallel_size."""


class OptimizerConfig(Section):
    lr: PositiveFloat = 1e-6
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 0
    """Updates over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate from the warm-up to the last step."""
    final_lr_fraction: Probability = 0.0
    """Learning rate of the last step as a share of `lr`, for linear and cosine."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this global norm."""


class LearnerConfig(Section):
    num_workers: PositiveInt = 1
    """Learner processes (data parallel); divides groups_per_step."""
    max_tokens: PositiveInt = 16384
    """Token budget of one micro-batch, prefixes counted once. A group is never split across micro-batches' boundaries unless it alone exceeds
    the budget."""
    optimizer: OptimizerConfig = OptimizerConfig()
    attention: str = "auto"
    """Backend of the shared-prefix attention; auto: the best that the device supports."""
    num_cpus: NonNegativeFloat = 0.5
    """CPUs that Ray reserves for each learner."""
    num_gpus: NonNegativeFloat = 0.0
    """GPUs for each learner."""
    num_threads: PositiveInt | None = None
    """Threads of a learner's CPU kernels; null: the machine's cores, shared evenly among learners."""
    deepspeed: dict[str, Any] = {"zero_optimization": {"stage": 1}}
    """DeepSpeed configuration as it is. Keys that follow from other settings (batch sizes, optimizer, precision, clipping) are refused."""


class AlgorithmConfig(Section):
    advantage_scale: Literal["std", "none"] = "std"
    """Divide a group's advantages by the spread of its rewards (GRPO), or not (Dr. GRPO)."""
    clip_low: NonNegativeFloat = 0.2
    """The policy ratio counts down to 1 - clip_low."""
    clip_high: NonNegativeFloat = 0.2
    """The policy ratio counts up to 1 + clip_high."""


class TrackingConfig(Section):
    uri: str | None = None
    """MLflow tracking URI; null: MLFLOW_TRACKING_URI, else a sqlite file in output_dir."""
    experiment: str = "raygrpo"
    """MLflow experiment."""
    samples_every: NonNegativeInt = 10
    """Steps between tables of sampled rollouts; 0: none."""
    num_samples: PositiveInt = 8
    """Rollouts in such a table."""
    figure_every: NonNegativeInt = 10
    """Steps between refreshes of the reward-curve figure; 0: only at the end."""
