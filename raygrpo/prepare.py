"""What can be known of a run before anything is started: model, tokenizer, prompts, lengths, resources.

`raygrpo check` prints it; `raygrpo train` starts from it, so that whatever is wrong with a run is said in its first
seconds.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raygrpo.config import DataConfig, RunConfig
from raygrpo.data import PromptSet, load_prompts
from raygrpo.eval_config import EvalConfig
from raygrpo.evaluation import Evaluation, EvaluationSet
from raygrpo.placement import proxies
from raygrpo.rewards import Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRun:
    """A run whose model and data were found and checked."""

    config: RunConfig
    import_paths: list[str]  # where `module:function` is looked for
    model: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSet
    max_model_len: int  # tokens of the longest prompt and completion together: what a generator must hold
    evaluation: Evaluation | None  # what `eval` describes


def prepare(config: RunConfig, config_dir: str | Path) -> PreparedRun:
    """Find and check model and data. config_dir: of the YAML; functions are looked for there, then in the current
    directory.

    Raises ValueError with what to do.
    """
    import_paths = [str(Path(config_dir).resolve()), str(Path.cwd())]
    sys.path[:0] = [path for path in import_paths if path not in sys.path]
    model, tokenizer = _load_model_config(config)
    context = getattr(model.get_text_config(), "max_position_embeddings", None)
    completion = config.generator.sampling.max_tokens
    longest = _longest_prompt(config.data, completion, context, "generator.sampling", "data")
    prompts = load_prompts(config.data, tokenizer, max_prompt_tokens=longest, import_paths=import_paths)
    Scorer(config.reward, import_paths).close()  # the functions can be loaded
    max_model_len = int(prompts.num_prompt_tokens.max()) + completion
    if max_model_len > config.learner.max_tokens:
        raise ValueError(
            f"learner.max_tokens ({config.learner.max_tokens}) does not hold the longest prompt with its completion "
            f"({max_model_len - completion} + {completion} tokens), and a sequence is not cut: set {max_model_len}"
        )
    evaluation = None
    if config.eval is not None:
        evaluation = _prepare_evaluation(config, config.eval, tokenizer, context, import_paths)
        lengths = [int(s.prompts.num_prompt_tokens.max()) + s.settings.sampling.max_tokens for s in evaluation.sets]
        max_model_len = max(max_model_len, *lengths)
    return PreparedRun(
        config=config,
        import_paths=import_paths,
        model=model,
        tokenizer=tokenizer,
        prompts=prompts,
        max_model_len=max_model_len,
        evaluation=evaluation,
    )


def _longest_prompt(data: DataConfig, completion: int, context: int | None, sampling_key: str, data_key: str) -> int:
    """Tokens that a prompt may have beside a completion of so many; the keys are for messages."""
    if context is None:
        return data.max_prompt_tokens or sys.maxsize
    if completion >= context:
        raise ValueError(
            f"{sampling_key}.max_tokens ({completion}) leaves no room for a prompt in the model's context "
            f"({context} tokens)"
        )
    if data.max_prompt_tokens is None:
        return context - completion
    if data.max_prompt_tokens > context - completion:
        raise ValueError(
            f"{data_key}.max_prompt_tokens ({data.max_prompt_tokens}) and {sampling_key}.max_tokens ({completion}) "
            f"exceed the model's context ({context} tokens)"
        )
    return data.max_prompt_tokens


def _prepare_evaluation(
    config: RunConfig, settings: EvalConfig, tokenizer: Any, context: int | None, import_paths: list[str]
) -> Evaluation:
    """The sets that `eval` names, with their prompts."""
    sets = []
    for name, part in settings.sets.items():
        key = f"eval.sets.{name}"
        longest = _longest_prompt(part.data, part.sampling.max_tokens, context, f"{key}.sampling", f"{key}.data")
        try:
            prompts = load_prompts(part.data, tokenizer, max_prompt_tokens=longest, import_paths=import_paths)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        sets.append(EvaluationSet(name=name, settings=part, prompts=prompts))
        if part.functions is not None:
            Scorer(config.reward.model_copy(update={"functions": part.functions}), import_paths).close()
    return Evaluation(sets=sets, seed=config.seed)


def _load_model_config(config: RunConfig) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    path, trust = config.model.path, config.model.trust_remote_code
    if Path(path).is_absolute() and not Path(path, "config.json").exists():
        raise ValueError(f"model.path: there is no model at {path} (no config.json)")
    try:
        model = AutoConfig.from_pretrained(path, trust_remote_code=trust)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model.path: {path!r} is neither a local model nor one that the Hugging Face hub gives: {reason}"
        ) from None
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # transformers makes an empty one without its files
        raise ValueError(f"model.path: the tokenizer at {path!r} knows no text: are its files (tokenizer.json) there?")
    return model, tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a run reserves in Ray."""

    num_cpus: float
    num_gpus: float


def required_resources(config: RunConfig) -> Resources:
    """Logical CPUs and GPUs of all actors together: generators, learners, scorers, and the stages and actors around
    them."""
    generator, learner, reward = config.generator, config.learner, config.reward
    groups_in_flight = (config.max_staleness + 1) * config.groups_per_step
    is_dynamic = config.algorithm.dynamic_sampling > 0
    num_proxies, proxy_cpus = proxies(math.ceil(groups_in_flight / config.groups_per_block), reward, score=is_dynamic)
    scorers = 0.0 if is_dynamic else reward.num_workers * reward.num_cpus
    return Resources(
        num_cpus=generator.num_actors * generator.num_cpus
        + learner.num_workers * learner.num_cpus
        + num_proxies * proxy_cpus
        + scorers
        + (reward.num_cpus if config.evaluates else 0.0),
        num_gpus=generator.num_actors * generator.num_gpus + learner.num_workers * learner.num_gpus,
    )
