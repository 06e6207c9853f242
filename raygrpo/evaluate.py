"""Mean reward of a model on prompts, sampled as in training: without Ray, without learning."""

from __future__ import annotations

import math
import os
import statistics
from dataclasses import dataclass

from raygrpo.config import RunConfig
from raygrpo.data import sample_seed
from raygrpo.engines.sampling import make_engine
from raygrpo.prepare import prepare
from raygrpo.rewards import Scorer
from raygrpo.types import RolloutGroup, ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    groups: list[ScoredGroup]  # one for each prompt, in the order of the source

    @property
    def rewards(self) -> list[float]:
        """Of all completions; 0 where a reward function failed."""
        return [reward.total for scored in self.groups for reward in scored.rewards]

    @property
    def num_failed(self) -> int:
        return sum(bool(reward.error) for scored in self.groups for reward in scored.rewards)

    @property
    def mean(self) -> float:
        return statistics.mean(self.rewards)

    @property
    def standard_error(self) -> float:
        """Of the mean over prompts."""
        means = [statistics.mean(reward.total for reward in scored.rewards) for scored in self.groups]
        return statistics.pstdev(means) / math.sqrt(len(means))


def evaluate(config: RunConfig, config_dir: str | os.PathLike, *, samples: int, num_threads: int) -> Evaluation:
    """`samples` completions for each prompt of config.data, by the generator's engine in this process, scored by
    config.reward. `config.seed` makes the samples.

    Raises ValueError where the configuration or a prompt cannot be used.
    """
    prepared = prepare(config, str(config_dir))
    engine = make_engine(config.model, config.generator, max_model_len=prepared.max_model_len, num_threads=num_threads)
    for index, prompt in enumerate(prepared.prompts):
        seeds = [sample_seed(config.seed, index, sample) for sample in range(samples)]
        engine.add_group(str(index), prompt.prompt_ids, seeds)
    rollouts = {}
    while engine.num_unfinished:
        rollouts |= {(int(group_id), sample): rollout for group_id, sample, rollout in engine.step()}
    scorer = Scorer(config.reward, prepared.import_paths)
    try:
        groups = [
            RolloutGroup(
                ticket=index,
                prompt=prompt,
                policy_version=0,
                rollouts=[rollouts[index, sample] for sample in range(samples)],
                generator="evaluate",
                generate_start_s=0.0,
                generate_end_s=0.0,
            )
            for index, prompt in enumerate(prepared.prompts)
        ]
        return Evaluation(groups=[scorer.score(group) for group in groups])
    finally:
        scorer.close()
