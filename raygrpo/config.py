"""Every setting, its default and its one-line meaning. config_file.py reads a run's YAML into them.

A run's YAML names only what it changes. Each fact is set once: what follows from it is a property, never a second key.
Engine options pass through untouched under their upstream names (`generator.vllm`, `learner.deepspeed`). A bad
combination raises ValueError with both values in the message; nothing here repairs a setting behind its author's back.
A role receives its own section, not the tree.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from raygrpo.algorithm_config import AlgorithmConfig
from raygrpo.eval_config import EvalConfig, EvalSetConfig
from raygrpo.section import LabelSelector, NonNegativeFloat, NonNegativeInt, Probability, Section, merge
from raygrpo.task_config import DataConfig, RewardConfig, SamplingConfig
from raygrpo.types import LogLevel


class LoraConfig(Section):
    rank: PositiveInt = 16
    """Of the adapters' matrices."""
    alpha: PositiveFloat = 32.0
    """The adapters' output is scaled by alpha / rank."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Linear layers that get an adapter: all but the head, or names as peft takes them, e.g. [q_proj, v_proj]."""

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


class ModelConfig(Section):
    path: str
    """A directory with a Hugging Face model and tokenizer (relative to the YAML's directory), or a name on the Hugging
    Face hub."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward pass in learner and generator. The optimizer always keeps float32 master weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    lora: LoraConfig | None = None
    """Train low-rank adapters and leave the model's own weights as they are; null: train all weights."""


VLLM_GPU_MEMORY_SHARE = 0.92  # default of vLLM 0.32


class GeneratorConfig(Section):
    engine: Literal["vllm", "transformers"] = "vllm"
    """What samples: vLLM, or transformers' own generation for machines without vLLM (slow)."""
    num_actors: PositiveInt = 1
    """Generator processes, each with one engine; with max_actors the least."""
    max_actors: PositiveInt | None = None
    """The pool grows up to this many while more groups wait than target_groups for each, and shrinks again; null: it
    stays at num_actors."""
    target_groups: PositiveInt | None = None
    """Groups in flight that one generator of a growing pool should have; null: max_groups."""
    scale_down_after_s: PositiveFloat = 120.0
    """A growing pool loses a generator that was not needed for this long."""
    group_timeout_s: PositiveFloat = 1800.0
    """A generator whose engine has a group for longer has hung: it is restarted, and its groups go to others."""
    sampling: SamplingConfig = SamplingConfig()
    max_groups: PositiveInt = 32
    """Groups that one generator samples at a time; further ones wait."""
    load_timeout_s: PositiveFloat = 1800.0
    """A generator that has not started and loaded new weights by then has hung: it is restarted, and the gate opens
    without it."""
    weight_transfer: Literal["object_store", "direct"] = "object_store"
    """How published weights reach the generators: through Ray's object store in the hosts' memory, once to each node;
    or each generator pulls them from the memory of the first learner's device (gloo; NCCL from GPU to GPU, which has
    not been run yet)."""
    num_cpus: NonNegativeFloat = 0.5
    """CPUs that Ray reserves for each generator."""
    num_gpus: NonNegativeFloat = 0.0
    """GPUs for each generator: 0 (CPU, even where there are GPUs); a share of one, e.g. 0.5, of whose memory vLLM then
    gets that share; or tensor_parallel_size."""
    label_selector: LabelSelector = {}
    """Labels of the nodes for generators, as Ray's label selectors take them: label -> `a`, `!a`, `in(a, b)` or
    `!in(a, b)`, e.g. {raygrpo-role: generator}; null: any node."""
    num_threads: PositiveInt | None = None
    """Threads of the engine's CPU kernels; null: the machine's cores, shared evenly among num_actors generators."""
    vllm: dict[str, Any] = {}
    """Passed to vllm.LLM as they are, e.g. max_model_len, gpu_memory_utilization, kv_cache_memory_bytes,
    tensor_parallel_size."""

    @model_validator(mode="after")
    def _pool(self) -> GeneratorConfig:
        if self.max_actors is not None and self.max_actors < self.num_actors:
            raise ValueError(
                f"generator.max_actors ({self.max_actors}) is less than generator.num_actors ({self.num_actors})"
            )
        if self.target_groups is not None and self.max_actors is None:
            raise ValueError(
                f"generator.target_groups ({self.target_groups}) sizes a pool that grows: set generator.max_actors too"
            )
        return self

    @property
    def tensor_parallel_size(self) -> int:
        """GPUs among which an engine divides its model."""
        return self.vllm.get("tensor_parallel_size", 1) if self.engine == "vllm" else 1

    @property
    def gpu_memory_share(self) -> float:
        """Of the memory of each of its GPUs: what an engine may fill. vLLM's default, of its share of a GPU."""
        return self.vllm.get("gpu_memory_utilization", VLLM_GPU_MEMORY_SHARE * min(1.0, self.num_gpus))

    @model_validator(mode="after")
    def _as_many_gpus_as_it_divides_its_model_among(self) -> GeneratorConfig:
        if self.num_gpus and max(1.0, self.num_gpus) != self.tensor_parallel_size:
            raise ValueError(
                f"generator.num_gpus is {self.num_gpus:g}, and an engine uses {self.tensor_parallel_size} "
                "(generator.vllm.tensor_parallel_size, 1 by default): set both to the same number"
            )
        return self


Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimizerConfig(Section):
    lr: PositiveFloat = 1e-6
    """Peak learning rate of AdamW."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
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


DEEPSPEED_KEYS_SET_ELSEWHERE = {
    "train_batch_size": "groups_per_step and group_size",
    "train_micro_batch_size_per_gpu": "learner.max_tokens",
    "gradient_accumulation_steps": "learner.max_tokens",
    "managed_gradient_accumulation": "learner.max_tokens",
    "optimizer": "learner.optimizer",
    "scheduler": "learner.optimizer.schedule",
    "gradient_clipping": "learner.optimizer.max_grad_norm",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    # Its asynchronous writers return before the files are there to be digested, and one that has died drops what it is
    # given without an error.
    "checkpoint": "checkpoint",
    "datastates_ckpt": "checkpoint",
}


class LearnerConfig(Section):
    num_workers: PositiveInt = 1
    """Learner processes (data parallel); divides groups_per_step."""
    max_tokens: PositiveInt = 16384
    """Token budget of one micro-batch, prefixes counted once. A group is never split across micro-batches' boundaries
    unless it alone exceeds the budget."""
    optimizer: OptimizerConfig = OptimizerConfig()
    max_logprob_diff: PositiveFloat = 0.2
    """The run stops when, in the first step, generator and learner differ by more in the mean log-probability of a
    token: they then do not compute the same model. Sampling with top_p may add -log(top_p) to it; with top_k or min_p
    nothing is checked, which is warned of."""
    skip_zero_advantages: bool = True
    """Encode no group whose advantages are all zero. Exact, and so done only while neither a KL penalty in the loss nor
    an entropy bonus gives such tokens a gradient; the loss's denominator still counts them."""
    min_shared_head: PositiveInt | None = None
    """Prompts of different groups that begin with at least so many equal tokens (a system prompt, few-shot examples, a
    document) share these too, where they meet in a micro-batch. Exact; null: each group encodes its whole prompt."""
    attention: str = "auto"
    """Backend of the shared-prefix attention; auto: the best that the device supports."""
    max_restarts: NonNegativeInt = 3
    """How often the learners, as a gang, start again from the last checkpoint after one of them died."""
    num_cpus: NonNegativeFloat = 0.5
    """CPUs that Ray reserves for each learner."""
    num_gpus: NonNegativeFloat = 0.0
    """GPUs for each learner: 0 (CPU), 1, or with a single learner a share of one, e.g. 0.5."""
    label_selector: LabelSelector = {}
    """Labels of the nodes for learners, e.g. {raygrpo-role: learner}."""
    num_threads: PositiveInt | None = None
    """Threads of a learner's CPU kernels; null: the machine's cores, shared evenly among learners."""
    deepspeed: dict[str, Any] = Field(default={"zero_optimization": {"stage": 1}})
    """DeepSpeed's configuration, e.g. {zero_optimization: {stage: 3}}. What follows from other settings is refused
    here."""

    @property
    def zero_stage(self) -> int:
        return self.deepspeed.get("zero_optimization", {}).get("stage", 1)

    @model_validator(mode="before")
    @classmethod
    def _zero_stage_by_default(cls, given: Any) -> Any:
        """Options given for DeepSpeed leave ZeRO stage 1 as it is unless they name another."""
        if not isinstance(given, dict) or not isinstance(given.get("deepspeed"), dict):
            return given
        return given | {"deepspeed": merge({"zero_optimization": {"stage": 1}}, given["deepspeed"])}

    @model_validator(mode="after")
    def _one_gpu_each(self) -> LearnerConfig:
        if self.num_gpus > 1:
            raise ValueError(
                f"learner.num_gpus is {self.num_gpus:g}, and a learner uses one GPU: set learner.num_gpus to 1 and "
                "learner.num_workers to the number of GPUs"
            )
        if self.num_gpus % 1 and self.num_workers > 1:
            raise ValueError(
                f"learner.num_gpus is {self.num_gpus:g} with learner.num_workers {self.num_workers}: two learners on "
                "one GPU cannot talk to each other (NCCL); set learner.num_gpus to 1, or learner.num_workers to 1"
            )
        return self

    @model_validator(mode="after")
    def _deepspeed_options(self) -> LearnerConfig:
        for key, setting in DEEPSPEED_KEYS_SET_ELSEWHERE.items():
            if key in self.deepspeed:
                raise ValueError(f"learner.deepspeed.{key} follows from {setting}: set that instead")
        zero = self.deepspeed.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError(f"learner.deepspeed.zero_optimization holds options, e.g. {{stage: 3}}; got {zero!r}")
        if self.zero_stage not in (1, 2, 3):
            raise ValueError(
                f"learner.deepspeed.zero_optimization.stage is {self.zero_stage}: 1, 2 and 3 train identically; "
                "stage 0 of DeepSpeed 0.19.8 reports no gradient norm in float32 and drifts in bfloat16"
            )
        return self


TRAINING_REWARD = "reward/mean"


class CheckpointConfig(Section):
    every: PositiveInt = 50
    """Steps between checkpoints: the most that a failure can lose. Also the length of a segment, one execution of the
    stream."""
    keep: PositiveInt = 2
    """Newest checkpoints that stay on disk."""
    keep_best: NonNegativeInt = 0
    """Besides them, the best of the others, by `best_by`."""
    best_by: str = TRAINING_REWARD
    """What makes a checkpoint better: reward/mean, the training reward over the steps before it, or a metric of the
    evaluation of its weights, e.g. eval/held_out/reward. More is better. `checkpoints/best` points to the best one."""


class WatchdogConfig(Section):
    timeout_s: PositiveFloat = 1800.0
    """The run is stuck when for this long no group finished, no weights were published and no step was trained."""
    action: Literal["restart", "fail"] = "restart"
    """What happens then, after a report: restart what is stuck (generators that hold groups, else the learners, from
    the last checkpoint), or end the run."""


class TrackingConfig(Section):
    uri: str | None = None
    """MLflow tracking URI; null: MLFLOW_TRACKING_URI, else a sqlite file in output_dir."""
    experiment: str = "raygrpo"
    """MLflow experiment."""
    samples_every: NonNegativeInt = 10
    """Steps between tables (and traces) of sampled rollouts; 0: none."""
    num_samples: PositiveInt = 8
    """Rollouts in such a table, drawn at random from the step."""
    num_traces: NonNegativeInt = 3
    """Groups shown as traces at such a step: the best, the worst, then others at random; 0: none."""
    figure_every: NonNegativeInt = 10
    """Steps between refreshes of the reward-curve figure; 0: only at the end."""
    system_metrics: bool = True
    """Log CPU, memory, disk and GPUs of each machine that the run is on."""
    parent_run: str | None = None
    """Id of the MLflow run under which this one is nested; `raygrpo sweep` sets it."""
    register_model: Annotated[str, Field(pattern="^[^/:]+$")] | None = None
    """At the end, copy the trained policy into MLflow's model registry, as a new version of this name."""
    finish_timeout_s: NonNegativeFloat = 60.0
    """Longest wait, at the end of a run, for an MLflow server that does not answer; the rest stays in the run's
    directory for later."""

    def shows_samples(self, step: int) -> bool:
        """Whether it is this step's turn (samples_every)."""
        return self.samples_every > 0 and step % self.samples_every == 0


class RunConfig(Section):
    name: str
    """Of the run, in directories and in MLflow; by default the YAML's file name."""
    seed: NonNegativeInt = 0
    """Of prompts' order, sampling and initialisation; the same seed draws the same prompts and sample seeds."""
    num_steps: PositiveInt
    """Steps to train; each ends with a published version of the policy."""
    groups_per_step: PositiveInt
    """Prompts in a step."""
    group_size: Annotated[int, Field(ge=1)] = 8
    """Completions for each prompt."""
    max_staleness: NonNegativeInt = 0
    """How many versions a group's policy may lag behind the learner's: 0 is on-policy; from 1 on, generating and
    learning overlap."""
    groups_per_block: PositiveInt = 1
    """Groups that travel through the stream together. More of them lower the stream's cost for each, which shows where
    a step takes a second or two; with 1 a group is scored as soon as its completions are there."""
    deterministic: bool = False
    """The same weights to the last bit in every run of this configuration, whatever dies meanwhile and however many
    generators there are: each engine samples one group at a time, and kernels run on one thread unless num_threads says
    otherwise. Slower; needs max_staleness 0."""
    output_dir: str = "runs"
    """Where runs are written, each in a directory of its own (relative to the current directory)."""
    log_level: LogLevel = "info"
    """Least serious lines in the run's logs/*.jsonl; info tells of every group, debug more of it."""
    model: ModelConfig
    data: DataConfig
    reward: RewardConfig
    generator: GeneratorConfig = GeneratorConfig()
    learner: LearnerConfig = LearnerConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    eval: EvalConfig | None = None
    """Evaluation on prompts that are not trained on; null: none."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def evaluates(self) -> bool:
        """Whether a run evaluates its policies."""
        return self.eval is not None and self.eval.every > 0

    @property
    def kept_versions(self) -> int:
        """How many versions the first learner keeps for generators to pull (generator.weight_transfer: direct). A
        publish waits for the evaluation of the version before, which a generator that restarts meanwhile needs."""
        return 2 if self.evaluates else 1

    @property
    def completions_per_step(self) -> int:
        return self.groups_per_step * self.group_size

    @model_validator(mode="after")
    def _sound_sampling(self) -> RunConfig:
        cuts = self.generator.sampling.cuts
        if cuts and self.algorithm.correction.level == "none":
            raise ValueError(
                f"generator.sampling has {cuts} but algorithm.correction.level is none: completions would come from a "
                "truncated distribution and be trained as if from the policy itself; set algorithm.correction.level to "
                "token, or sample without cuts"
            )
        return self

    @model_validator(mode="after")
    def _baseline_has_a_group(self) -> RunConfig:
        baseline = self.algorithm.advantage.baseline
        if self.group_size == 1 and baseline != "none":
            raise ValueError(
                f"group_size is 1 and algorithm.advantage.baseline {baseline}: a completion alone in its group has "
                "nothing to be compared with, and nothing would be trained; set group_size to 2 or more, or "
                "algorithm.advantage.baseline to none"
            )
        return self

    @model_validator(mode="after")
    def _steered_slowly(self) -> RunConfig:
        kl, completions = self.algorithm.kl, self.completions_per_step
        if kl.target is not None and 5 * kl.horizon <= completions:  # the error is at most 0.2: algorithm/kl.py
            raise ValueError(
                f"algorithm.kl.horizon ({kl.horizon}) is too short for steps of {completions} completions "
                "(groups_per_step x group_size): one step could turn kl.coef to 0 or below; set it above "
                f"{completions // 5}, and well above for a coefficient that moves slowly"
            )
        return self

    @model_validator(mode="after")
    def _resolved_algorithm(self) -> RunConfig:
        algorithm = self.algorithm
        if algorithm.aggregation == "sequence_sum" and algorithm.aggregation_length is None:
            # The default of a field of one section is a value of another: only the tree can fill it in.
            length = self.generator.sampling.max_tokens
            object.__setattr__(self, "algorithm", algorithm.model_copy(update={"aggregation_length": length}))
        return self

    @model_validator(mode="after")
    def _resolved_evaluation(self) -> RunConfig:
        if self.eval is None:
            return self
        sets = {name: self._with_max_tokens(settings) for name, settings in self.eval.sets.items()}
        object.__setattr__(self, "eval", self.eval.model_copy(update={"sets": sets}))
        return self

    def _with_max_tokens(self, settings: EvalSetConfig) -> EvalSetConfig:
        """An evaluation's completions are as long as training's unless it says otherwise."""
        if "max_tokens" in settings.sampling.model_fields_set:
            return settings
        sampling = settings.sampling.model_copy(update={"max_tokens": self.generator.sampling.max_tokens})
        return settings.model_copy(update={"sampling": sampling})

    @model_validator(mode="after")
    def _checkpoints_have_what_ranks_them(self) -> RunConfig:
        best_by = self.checkpoint.best_by
        known = [TRAINING_REWARD, *(self.eval.metrics if self.eval else [])]
        if best_by not in known:
            raise ValueError(
                f"checkpoint.best_by ({best_by}) is no metric that ranks checkpoints; known here: {', '.join(known)}"
            )
        if self.eval is None or best_by == TRAINING_REWARD:
            return self
        if not self.eval.every or self.checkpoint.every % self.eval.every:
            raise ValueError(
                f"checkpoint.best_by is {best_by}, but checkpoints of every {self.checkpoint.every} steps "
                f"(checkpoint.every) are not all evaluated by one evaluation in {self.eval.every} steps (eval.every): "
                "make checkpoint.every a multiple of eval.every"
            )
        return self

    @model_validator(mode="after")
    def _direct_transfer_between_gpus(self) -> RunConfig:
        learner, generator = self.learner.num_gpus, self.generator.num_gpus
        if self.generator.weight_transfer == "direct" and learner:
            if not generator:
                raise ValueError(
                    f"generator.weight_transfer is direct, and learner.num_gpus {learner:g}: NCCL sends from GPU to "
                    "GPU, but generator.num_gpus is 0"
                )
            if learner % 1 or generator % 1:
                raise ValueError(
                    f"generator.weight_transfer is direct, and learner.num_gpus {learner:g} with generator.num_gpus "
                    f"{generator:g} can put both on one GPU, which NCCL refuses: give each whole GPUs, or leave "
                    "generator.weight_transfer at object_store"
                )
        return self

    @model_validator(mode="after")
    def _deterministic_mode(self) -> RunConfig:
        if not self.deterministic:
            return self
        if self.max_staleness:
            raise ValueError(
                f"deterministic needs max_staleness 0, not {self.max_staleness}: which version samples a group would "
                "depend on how fast the machines are"
            )
        for name in ("generator", "learner"):  # as many threads on every machine: sums are then added in one order
            section = getattr(self, name)
            pinned = section.model_copy(update={"num_threads": section.num_threads or 1})
            object.__setattr__(self, name, pinned)
        return self

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.groups_per_step % self.learner.num_workers:
            raise ValueError(
                f"groups_per_step ({self.groups_per_step}) is not divisible by learner.num_workers "
                f"({self.learner.num_workers}): every learner must get the same number of groups"
            )
        if self.groups_per_step // self.learner.num_workers % self.groups_per_block:
            raise ValueError(
                f"a learner's groups ({self.groups_per_step // self.learner.num_workers} of groups_per_step "
                f"{self.groups_per_step}) do not divide into blocks of groups_per_block ({self.groups_per_block})"
            )
        if self.groups_per_step // self.learner.num_workers % self.algorithm.mini_batches:
            raise ValueError(
                f"a learner's groups ({self.groups_per_step // self.learner.num_workers} of groups_per_step "
                f"{self.groups_per_step}) do not divide into algorithm.mini_batches ({self.algorithm.mini_batches})"
            )
        return self
