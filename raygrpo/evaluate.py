"""Evaluation of a model in this process: without Ray, without learning. `raygrpo evaluate` and local runs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from raygrpo.config import RunConfig
from raygrpo.eval_config import EvalConfig, EvalSamplingConfig, EvalSetConfig
from raygrpo.evaluation import EvaluatedSet, Evaluation, make_scorers
from raygrpo.in_process import sample_groups
from raygrpo.logs import about_group
from raygrpo.prepare import prepare
from raygrpo.rewards import Scorer
from raygrpo.types import RolloutGroup, ScoredGroup

if TYPE_CHECKING:
    from raygrpo.engines.sampling import SamplingEngine

DATA_SET = "data"  # name of the set where a configuration has no `eval`


def evaluate(
    config: RunConfig, config_dir: str | os.PathLike, *, samples: int | None = None, num_threads: int
) -> list[EvaluatedSet]:
    """Evaluate config.model as `config.eval` says; without that section, on the prompts of config.data, sampled as in
    training.

    samples: completions of each prompt, instead of what the configuration says. Raises ValueError where the
    configuration or a prompt cannot be used.
    """
    from raygrpo.engines.sampling import make_engine

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings at each start are about what this package sets
    prepared = prepare(evaluated_config(config, samples), str(config_dir))
    config, evaluation = prepared.config, prepared.evaluation
    assert evaluation is not None
    engine = make_engine(config.model, config.generator, max_model_len=prepared.max_model_len, num_threads=num_threads)
    scorers = make_scorers(config, lambda reward: Scorer(reward, prepared.import_paths))
    try:
        return evaluate_with(engine, scorers, evaluation, version=0, at_a_time=groups_at_a_time(config))
    finally:
        for scorer in set(scorers.values()):
            scorer.close()


def evaluated_config(config: RunConfig, samples: int | None) -> RunConfig:
    """The configuration with an `eval` section that says what to do."""
    given = config.eval
    if given is None:
        sampling = EvalSamplingConfig.model_validate(config.generator.sampling.model_dump())
        given = EvalConfig(sets={DATA_SET: EvalSetConfig(data=config.data, sampling=sampling)})
    sets = {name: settings.model_dump() for name, settings in given.sets.items()}
    for settings in sets.values() if samples is not None else ():
        kept = [k for k in settings["pass_at"] if k <= samples]
        settings |= {"samples": samples, "pass_at": kept}
    return RunConfig.model_validate(config.model_dump() | {"eval": given.model_dump() | {"sets": sets}})


def groups_at_a_time(config: RunConfig) -> int | None:
    """See in_process.sample_groups."""
    return None if config.deterministic else config.generator.max_groups


def evaluate_with(
    engine: SamplingEngine, scorers: dict[str, Scorer], evaluation: Evaluation, *, version: int, at_a_time: int | None
) -> list[EvaluatedSet]:
    """Sample all rows with the engine's weights, and score them. scorers: by set."""
    requests = [evaluation.request(row) for row in range(len(evaluation))]
    groups = iter(sample_groups(engine, requests, version=version, at_a_time=at_a_time))
    evaluated = []
    for part in evaluation.sets:
        scored = [_score(scorers[part.name], next(groups)) for _ in range(len(part.prompts))]
        evaluated.append(EvaluatedSet(name=part.name, settings=part.settings, groups=scored))
    return evaluated


def _score(scorer: Scorer, group: RolloutGroup) -> ScoredGroup:
    with about_group(group.ticket, is_evaluation=True):
        return scorer.score(group)


def describe(evaluated: EvaluatedSet, show: int) -> str:
    """A few lines for a person: the set's figures, and the first completion of so many prompts."""
    values = {name.rpartition("/")[2]: value for name, value in evaluated.metrics.items()}
    passes = "".join(f", {name.replace('_at_', '@')} {value:.3f}" for name, value in values.items() if "_at_" in name)
    failed = f"; {values['num_failed']:.0f} failed to get a reward and count as 0" if values["num_failed"] else ""
    count = f"{evaluated.settings.samples} x {len(evaluated.groups)} completions{failed}"
    error = f"standard error {values['standard_error']:.3f}"
    lines = [
        f"{evaluated.name}: mean reward {values['reward']:.3f} ({error}){passes}, "
        f"{values['mean_length']:.0f} tokens long, of {count}"
    ]
    for scored in evaluated.groups[:show]:
        group = scored.group
        if group.rollouts:
            what = f"completion {group.rollouts[0].text!r}: {scored.rewards[0].error or scored.rewards[0].total}"
        else:
            what = group.error
        lines.append(f"  answer {group.prompt.answer!r}, {what}")
    return "\n".join(lines)
