"""GRPO here and in TRL's GRPOTrainer: the same model, prompts in the same order, reward and hyperparameters.

    python benchmarks/against_trl.py --plot docs/images/against_trl.png    # seeds 0 1 2, about ten minutes on two cores

1.  Learning curves. The quickstart is trained by both on several seeds. They sample with other engines, so curves can
    agree within seed noise only: the table says by how much they differ in windows of WINDOW steps, in standard errors.
2.  The same rollouts. Every rollout that TRL sampled and trained on is given to our learner as well, and the weights of
    both are compared after each step: this has no seed noise. It ends with 1 if they part.

TRL runs on the CPU with transformers' generation. What is set apart from the quickstart: advantage.eps is TRL's 1e-4.
Runs that are already in the output directory with the same settings are not repeated.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1")

import torch
from runs import QUICKSTART, Summary, markdown_table, study_arguments, train

from raygrpo.config import RunConfig
from raygrpo.config_file import load_config
from raygrpo.engines.deepspeed import learning_rate
from raygrpo.imports import import_object
from raygrpo.prepare import PreparedRun, prepare
from raygrpo.types import Prompt, Reward, Rollout, RolloutGroup, ScoredGroup

SAME_AS_TRL = ["algorithm.advantage.eps=1e-4"]
WINDOW = 5
MICRO_BATCH = 16  # completions that TRL encodes at a time
REPLAY_TOLERANCE = 0.02  # of how far the weights have moved: Adam turns rounding of tiny gradients into steps
OURS, THEIRS = "raygrpo", "TRL 1.16"


def main() -> int:
    parser = study_arguments(__doc__, "runs/against_trl")
    parser.add_argument("--plot", type=Path, help="draw the curves into this file")
    parser.add_argument("--trl-steps", type=int, help="stop TRL after so many steps of the same schedule")
    arguments = parser.parse_args()
    overrides = SAME_AS_TRL + ([f"num_steps={arguments.steps}"] if arguments.steps else [])
    runs = [
        prepare(load_config(QUICKSTART, [*overrides, f"seed={seed}"]), QUICKSTART.parent) for seed in arguments.seeds
    ]
    ours = [train(f"raygrpo-seed{seed}", [*overrides, f"seed={seed}"], arguments.output) for seed in arguments.seeds]
    theirs = []
    for run in runs:
        num_steps = min(arguments.trl_steps or run.config.num_steps, run.config.num_steps)
        theirs.append(trl_run(run, arguments.output / f"trl-seed{run.config.seed}-{num_steps}.json", num_steps))
    ours = [history[: len(recorded["steps"])] for history, recorded in zip(ours, theirs, strict=True)]
    replays = [replay(run, recorded) for run, recorded in zip(runs, theirs, strict=True)]
    curves = {
        OURS: [[metrics["reward/mean"] for metrics in run] for run in ours],
        THEIRS: [[step["reward"] for step in run["steps"]] for run in theirs],
    }
    print(comparison(curves, ours, theirs, replays))
    print()
    print(windows(curves))
    print()
    for seed, outcome in zip(arguments.seeds, replays, strict=True):
        distances = [distance for distance, _ in outcome]
        shown = [f"{distances[step - 1]:.1e} after {step}" for step in (1, 10, 20, 30, 40) if step <= len(distances)]
        print(f"same rollouts, seed {seed}: weights apart, as a share of how far they moved: {', '.join(shown)} steps")
    if arguments.plot:
        draw(curves, arguments.plot)
    return 0 if max(distance for outcome in replays for distance, _ in outcome) < REPLAY_TOLERANCE else 1


# TRL.


def trl_run(prepared: PreparedRun, path: Path, num_steps: int) -> dict[str, Any]:
    """{"settings", "steps": [{"reward", "seconds", "generate_s", "generate_cpu_s", "learn_cpu_s", "tokens",
    "padded_tokens", "groups"}], "weights"}: wall and CPU seconds; groups are [prompt_ids, [completion_ids], [reward]];
    weights a file with those after each step."""
    config = prepared.config
    settings = config.model_dump(mode="json", exclude={"name", "output_dir", "tracking", "checkpoint"})
    if path.exists():
        found = json.loads(path.read_text())
        if found["settings"] == settings:
            return found
    print(f"{path.stem}: training", file=sys.stderr, flush=True)
    prompts = [prepared.prompts.at(ticket, config.seed) for ticket in range(num_steps * config.groups_per_step)]
    trainer = _trl_trainer(prepared, prompts, path.with_suffix(""))
    trainer.train()
    assert trainer.seen_prompts == [prompt.prompt_ids for prompt in prompts], "TRL tokenised or ordered otherwise"
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    steps = [step | {"reward": reward} for step, reward in zip(trainer.steps, rewards, strict=True)]
    weights = path.with_suffix(".pt")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(trainer.weights, weights)
    result = {"settings": settings, "steps": steps, "weights": str(weights.absolute())}
    path.write_text(json.dumps(result))
    return result


def _trl_trainer(prepared: PreparedRun, prompts: Sequence[Prompt], output_dir: Path) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback

    import_utils = importlib.import_module("trl.import_utils")
    with mock.patch.object(import_utils, "is_vllm_available", lambda *_, **__: False):  # importing vLLM takes 20 s
        from trl import GRPOTrainer

    config = prepared.config
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)

    class Measured(GRPOTrainer):
        """Notes what a step was made of, and how long its parts took."""

        steps: list[dict[str, Any]] = []
        seen_prompts: list[list[int]] = []
        weights: list[dict[str, torch.Tensor]] = []

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            start_s, start_cpu_s = time.perf_counter(), time.process_time()
            batch = super()._generate_and_score_completions(inputs)
            prompts, lengths = batch["prompt_mask"].sum(1), batch["completion_mask"].sum(1)
            groups = []
            for first in range(0, len(prompts), config.group_size):
                members = range(first, first + config.group_size)
                prompt_ids = batch["prompt_ids"][first][-int(prompts[first]) :].tolist()
                completions = [batch["completion_ids"][i][: int(lengths[i])].tolist() for i in members]
                self.seen_prompts.append(prompt_ids)
                groups.append([prompt_ids, completions, self.last_rewards[first : first + config.group_size]])
            self.steps.append(
                {
                    "generate_s": time.perf_counter() - start_s,
                    "generate_cpu_s": time.process_time() - start_cpu_s,
                    "tokens": int((prompts + lengths).sum()),
                    "padded_tokens": batch["prompt_ids"].numel() + batch["completion_ids"].numel(),
                    "groups": groups,
                }
            )
            return batch

        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
            rewards = super()._calculate_rewards(*args, **kwargs)
            self.last_rewards = rewards[:, 0].tolist()
            return rewards

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start_s, self.start_cpu_s = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            step = trainer.steps[-1]
            step["seconds"] = time.perf_counter() - self.start_s
            step["learn_cpu_s"] = time.process_time() - self.start_cpu_s - step["generate_cpu_s"]
            trainer.weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})

    (function,) = config.reward.functions
    reward = import_object(function.use, prepared.import_paths)

    def reward_function(completions: list[str], answer: list[Any], **_: Any) -> list[float]:
        scores = [reward(completion, given) for completion, given in zip(completions, answer, strict=True)]
        return [score for score, _ in scores]  # without the text that says why

    trainer = Measured(
        model=model,
        reward_funcs=reward_function,
        args=_trl_settings(config, len(prompts) // config.groups_per_step, output_dir),
        train_dataset=Dataset.from_list([{"prompt": prompt.text, "answer": prompt.answer} for prompt in prompts]),
        processing_class=prepared.tokenizer,
        optimizers=_optimizer_and_schedule(model, config),
        callbacks=[Clock()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _trl_settings(config: RunConfig, num_steps: int, output_dir: Path) -> Any:
    """What TRL calls what our configuration asks for."""
    from trl import GRPOConfig

    algorithm, sampling = config.algorithm, config.generator.sampling
    assert (algorithm.aggregation, algorithm.ratio, algorithm.loss) == ("token_mean", "token", "ppo_clip")
    assert algorithm.updates_per_step == 1 and algorithm.kl.coef == algorithm.entropy_coef == 0
    assert algorithm.advantage.scale == algorithm.advantage.baseline == "group"
    return GRPOConfig(
        output_dir=str(output_dir),
        seed=config.seed,
        max_steps=num_steps,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=config.completions_per_step // MICRO_BATCH,
        num_generations=config.group_size,
        shuffle_dataset=False,
        max_completion_length=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=max(sampling.top_k, 0),
        loss_type="dapo",  # mean over all tokens of the step: our token_mean
        epsilon=algorithm.clip_low,
        epsilon_high=algorithm.clip_high,
        beta=0.0,
        scale_rewards="group",
        max_grad_norm=config.learner.optimizer.max_grad_norm,
        use_vllm=False,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )


def _optimizer_and_schedule(model: torch.nn.Module, config: RunConfig) -> tuple[Any, Any]:
    adam = config.learner.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=adam.lr, betas=adam.betas, eps=adam.eps, weight_decay=adam.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda update: learning_rate(adam, update, config.num_steps) / adam.lr
    )
    return optimizer, schedule


# The same rollouts in our learner.


def replay(prepared: PreparedRun, trl: dict[str, Any]) -> list[tuple[float, float]]:
    """Of each step: the distance of our weights from TRL's as a share of the distance that TRL's have moved, and the
    CPU seconds that our learner took."""
    import torch.distributed as dist

    from raygrpo.roles.policy import build_policy

    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it; TRL, which must run before, would go distributed
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    # TRL samples with the policy itself: nothing to correct, and nothing to compare with.
    correction = prepared.config.algorithm.correction.model_copy(update={"level": "none"})
    algorithm = prepared.config.algorithm.model_copy(update={"correction": correction})
    learner = prepared.config.learner.model_copy(update={"num_threads": torch.get_num_threads()})  # as TRL had
    config: RunConfig = prepared.config.model_copy(update={"algorithm": algorithm, "learner": learner})
    _, engine, updater, _ = build_policy(config)
    start = {name: weight.clone() for name, weight in engine.named_weights()}
    outcome = []
    after = torch.load(trl["weights"])
    for step, (recorded, weights) in enumerate(zip(trl["steps"], after, strict=True)):
        groups = [_scored(step, place, *group) for place, group in enumerate(recorded["groups"])]
        start_cpu_s = time.process_time()
        updater.update(groups, step)
        learn_cpu_s = time.process_time() - start_cpu_s
        apart = moved = 0.0
        for name, weight in engine.named_weights():
            apart += float((weight - weights[name]).double().square().sum())
            moved += float((weights[name] - start[name]).double().square().sum())
        outcome.append((math.sqrt(apart / moved), learn_cpu_s))
    return outcome


def _scored(step: int, place: int, prompt_ids: list[int], completions: list[list[int]], rewards: list[float]):
    rollouts = [
        Rollout(completion_ids=ids, behaviour_logprobs=[0.0] * len(ids), finish_reason="stop", text="", end_s=0.0)
        for ids in completions
    ]
    group = RolloutGroup(
        ticket=step * 1_000_000 + place,
        prompt=Prompt(prompt_id=place, prompt_ids=prompt_ids, text=""),
        policy_version=step,
        rollouts=rollouts,
        generator="TRL",
        generate_start_s=0.0,
        generate_end_s=0.0,
    )
    scores = [Reward(total=reward, components=[reward]) for reward in rewards]
    return ScoredGroup(group=group, rewards=scores, score_start_s=0.0, score_end_s=0.0)


# What came of it.


def comparison(curves: dict[str, list[list[float]]], ours: list[Any], theirs: list[Any], replays: list[Any]) -> str:
    """Both side by side: reward, time of a step, and on the same rollouts what learning takes."""

    def mean(values: Any) -> float:
        return statistics.fmean(values)

    seconds = {
        OURS: [[metrics["timing_s/step"] for metrics in run] for run in ours],
        THEIRS: [[step["seconds"] for step in run["steps"]] for run in theirs],
    }
    learn = {  # without the first step, which compares itself with the ordinary forward
        OURS: mean(cpu_s for outcome in replays for _, cpu_s in outcome[1:]),
        THEIRS: mean(step["learn_cpu_s"] for run in theirs for step in run["steps"][1:]),
    }
    tokens = {
        OURS: mean(metrics["prefix/tokens_encoded"] for run in ours for metrics in run),
        THEIRS: mean(step["padded_tokens"] for run in theirs for step in run["steps"]),
    }
    rows = [
        [name, *Summary.of(curves[name], seconds[name]).cells(), f"{tokens[name]:,.0f}", f"{learn[name]:.2f}"]
        for name in curves
    ]
    header = ["", "reward, first 5 steps", "last 10 steps", "s per step", "tokens a learner encodes", "CPU s to learn"]
    return markdown_table(header, rows)


def windows(curves: dict[str, list[list[float]]]) -> str:
    """Differences of the means over seeds, window by window, in standard errors.

    Three seeds say little about their spread. The variance of a window's mean is therefore the larger of that between
    seeds and of what the steps' spreads between seeds imply if steps are independent, as they are before runs part.
    """

    def variance(runs: list[list[float]]) -> float:
        of_means = statistics.variance([statistics.fmean(run) for run in runs])
        of_steps = statistics.fmean(statistics.variance(step) for step in zip(*runs, strict=True))
        return max(of_means, of_steps / len(runs[0]))

    num_steps, num_seeds = len(curves[OURS][0]), len(curves[OURS])
    rows = []
    for first in range(0, num_steps, WINDOW):
        parts = {name: [run[first : first + WINDOW] for run in runs] for name, runs in curves.items()}
        ours, theirs = (statistics.fmean(value for run in parts[name] for value in run) for name in (OURS, THEIRS))
        error = math.sqrt(sum(map(variance, parts.values())) / num_seeds) if num_seeds > 1 else math.nan
        label = f"{first + 1} to {min(first + WINDOW, num_steps)}"
        rows.append([label, f"{ours:.3f}", f"{theirs:.3f}", f"{error:.3f}", f"{(ours - theirs) / error:+.1f}"])
    return markdown_table(["steps", OURS, THEIRS, "standard error", "difference in standard errors"], rows)


def draw(curves: dict[str, list[list[float]]], path: Path) -> None:
    """Mean over seeds, and a band from the lowest to the highest seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4), dpi=130, layout="constrained")
    axes = figure.subplots()
    for (name, runs), colour in zip(curves.items(), ("#1f6fb4", "#d97706"), strict=True):
        steps = range(1, len(runs[0]) + 1)
        by_step = list(zip(*runs, strict=True))
        axes.fill_between(steps, [min(v) for v in by_step], [max(v) for v in by_step], color=colour, alpha=0.18, lw=0)
        axes.plot(steps, [statistics.fmean(v) for v in by_step], color=colour, lw=2, label=name)
    num_seeds = len(next(iter(curves.values())))
    axes.set(xlabel="step", ylabel="mean reward", ylim=(0, 1), xlim=(1, len(steps)))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(f"GRPO on the quickstart, {num_seeds} seeds: mean, lowest and highest", loc="left", fontsize=10)
    axes.legend(frameon=False, loc="lower right")
    axes.grid(axis="y", color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
