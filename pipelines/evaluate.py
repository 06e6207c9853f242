"""Mean reward of a model on questions, sampled as in training.

    python pipelines/evaluate.py pipelines/smollm2_cpu.yaml data.args.split=held_out model.path=DIRECTORY

Reads a run's YAML as `raygrpo train` does, with the same overrides: its data, its reward functions and its sampling
settings, one completion for each prompt, from the generator's engine in this process. Without Ray and without
learning.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from pathlib import Path

from raygrpo.config import RunConfig, load_config
from raygrpo.engines.sampling import make_engine
from raygrpo.prepare import prepare
from raygrpo.rewards import Scorer
from raygrpo.types import RolloutGroup, ScoredGroup


def evaluate(config: RunConfig, config_dir: Path, *, num_threads: int) -> list[ScoredGroup]:
    """One scored completion for each prompt, in the order of the source. `config.seed` makes the samples."""
    prepared = prepare(config, config_dir)
    engine = make_engine(config.model, config.generator, max_model_len=prepared.max_model_len, num_threads=num_threads)
    for index, prompt in enumerate(prepared.prompts):
        engine.add_group(str(index), prompt.prompt_ids, seeds=[(config.seed << 32) + index])
    rollouts = {}
    while engine.num_unfinished:
        rollouts |= {int(group_id): rollout for group_id, _, rollout in engine.step()}
    scorer = Scorer(config.reward, prepared.import_paths)
    try:
        return [
            scorer.score(
                RolloutGroup(
                    ticket=index,
                    prompt=prompt,
                    policy_version=0,
                    rollouts=[rollouts[index]],
                    generator="evaluate",
                    generate_start_s=0.0,
                    generate_end_s=0.0,
                )
            )
            for index, prompt in enumerate(prepared.prompts)
        ]
    finally:
        scorer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a run's YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the YAML")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of CPU kernels; default: all cores")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="print N answers and completions")
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
        results = evaluate(config, arguments.config.parent, num_threads=arguments.threads)
    except ValueError as error:
        sys.exit(f"evaluate: {error}")
    for result in results[: arguments.show]:
        prompt, rollout = result.group.prompt, result.group.rollouts[0]
        print(f"  answer {prompt.answer!r}, completion {rollout.text!r}: {result.rewards[0].total:g}")
    rewards = [result.rewards[0].total for result in results]
    error = statistics.pstdev(rewards) / math.sqrt(len(rewards))
    print(
        f"mean reward {statistics.mean(rewards):.3f} (standard error {error:.3f}) on {len(rewards)} prompts: "
        f"{config.model.path}"
    )


if __name__ == "__main__":
    main()
