"""Updates of a policy on awkward groups: run by PolicyUpdater on any number of ranks, and by a reference that shares no
code with it: one plain forward per completion, the formulas of the papers, torch's AdamW."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from raygrpo.config import RunConfig
from raygrpo.types import Prompt, Reward, Rollout, RolloutGroup, ScoredGroup
from tests.conftest import run_config

GROUPS_PER_STEP = 12  # so that 1, 2 and 3 ranks, and two mini-batches on each, share them evenly
MAX_COMPLETION_TOKENS = 9
SYSTEM_PROMPT = [3, 141, 59, 26]  # of two prompts in three
WEIGHTS = (1.0, 0.5)  # of the two reward functions
FAILED = Reward(total=0.0, components=[math.nan, 1.0], error="ValueError: no")

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "small_micro_batches": {"learner": {"max_tokens": 24}},  # most groups run in parts
    "middling_micro_batches": {"learner": {"max_tokens": 60}},
    "nothing_skipped": {"learner": {"skip_zero_advantages": False}},
    "truncated_masked": {"algorithm": {"overlong": {"mask": True}}},
    "overlong_penalty": {"algorithm": {"overlong": {"buffer": 0.5, "penalty": 2.0}}},
    "temperature": {"generator": {"sampling": {"temperature": 0.6, "max_tokens": MAX_COMPLETION_TOKENS}}},
    "sequence_mean": {"algorithm": {"aggregation": "sequence_mean", "advantage": {"scale": "none"}}},
    "kl_in_loss": {"algorithm": {"kl": {"coef": 0.4}}},
    "kl_in_reward": {"algorithm": {"kl": {"coef": 0.4, "placement": "reward", "estimator": "k1"}}},
    "entropy_bonus": {"algorithm": {"entropy_coef": 0.05}},
    "four_updates": {"algorithm": {"mini_batches": 2, "epochs": 2, "clip_high": 0.28}},
    "four_updates_kl_in_reward_in_parts": {
        "algorithm": {"mini_batches": 2, "epochs": 2, "kl": {"coef": 0.4, "placement": "reward", "estimator": "k3"}},
        "learner": {"max_tokens": 24},
    },
    "shared_heads": {"learner": {"min_shared_head": 3}},
    "shared_heads_kl_in_parts": {
        "learner": {"min_shared_head": 2, "max_tokens": 24},
        "algorithm": {"kl": {"coef": 0.4, "placement": "reward", "estimator": "k1"}},
    },
    "checkpointed_activations": {"model": {"gradient_checkpointing": True}, "learner": {"max_tokens": 40}},
}
_LORA = {"rank": 4, "alpha": 8.0, "target_modules": ["q_proj", "v_proj", "down_proj"]}
ADAPTER_CASES: dict[str, dict[str, Any]] = {  # the reference policy is the base with adapters off
    "adapters": {"model": {"lora": _LORA}},
    "adapters_kl_in_loss": {"model": {"lora": _LORA}, "algorithm": {"kl": {"coef": 2.0}}},
    "adapters_four_updates_kl_in_reward_in_parts": {
        "model": {"lora": _LORA},
        "algorithm": {"mini_batches": 2, "epochs": 2, "kl": {"coef": 0.4, "placement": "reward", "estimator": "k3"}},
        "learner": {"max_tokens": 24},
    },
}


def case_config(model: Path, case: str, stage: int = 1) -> RunConfig:
    """eps is large: where a gradient is as small as rounding, AdamW would turn that rounding into a whole step."""
    from raygrpo.section import merge

    base = {
        "model": {"path": str(model)},
        "num_steps": 4,
        "groups_per_step": GROUPS_PER_STEP,
        "group_size": 4,
        "reward": {"functions": [{"use": "exact_match"}, {"use": "format", "weight": 0.5}], "max_error_share": 0.9},
        "generator": {"sampling": {"max_tokens": MAX_COMPLETION_TOKENS}},
        "learner": {
            "deepspeed": {"zero_optimization": {"stage": stage}},
            "optimizer": {"lr": 5e-3, "eps": 1e-3, "betas": [0.8, 0.9], "weight_decay": 0.01, "max_grad_norm": 1.0},
            "num_threads": 1,
        },
    }
    return run_config(**merge(base, (CASES | ADAPTER_CASES)[case]))


def make_step(model: nn.Module, step: int, temperature: float = 1.0) -> list[ScoredGroup]:
    """The groups of a step in ticket order: ragged, some without advantage, some rewards failed, one group failed."""
    g = torch.Generator().manual_seed(100 + step)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (1,), generator=g))
        return torch.randint(0, 250, (length,), generator=g).tolist()

    groups = []
    for place in range(GROUPS_PER_STEP):
        prompt_ids = (SYSTEM_PROMPT if place % 3 else []) + ids(1, 10)
        rollouts, rewards = [], []
        for _ in range(0 if place == 5 else 4):
            completion_ids = ids(1, MAX_COMPLETION_TOKENS)
            with torch.no_grad():
                logprobs, _ = plain_scores(model, prompt_ids, completion_ids, temperature)
            noise = 0.4 * torch.randn(
                len(completion_ids), generator=g
            )  # some weights beyond the cap, some ratios clipped
            rollouts.append(
                Rollout(
                    completion_ids=completion_ids,
                    behaviour_logprobs=[min(value, 0.0) for value in (logprobs + noise).tolist()],
                    finish_reason="length" if len(completion_ids) == MAX_COMPLETION_TOKENS else "stop",
                    text="",
                    end_s=0.0,
                )
            )
            components = torch.randint(0, 3, (2,), generator=g).double().tolist()
            total = WEIGHTS[0] * components[0] + WEIGHTS[1] * components[1]
            rewards.append(Reward(total=total, components=components))
        if place in (2, 9):  # no spread
            rewards = [Reward(total=1.5, components=[1.0, 1.0])] * 4
        if place == 3:  # some failed
            rewards = [FAILED, rewards[1], FAILED, replace(rewards[3], components=[2.0, 1.0])]
        if place == 7:  # all failed
            rewards = [FAILED] * 4
        group = RolloutGroup(
            ticket=step * GROUPS_PER_STEP + place,
            prompt=Prompt(prompt_id=place, prompt_ids=prompt_ids, text=""),
            policy_version=step,
            rollouts=rollouts,
            generator="generator-0",
            generate_start_s=0.0,
            generate_end_s=0.0,
            error="" if rollouts else "no engine could serve it",
        )
        groups.append(ScoredGroup(group=group, rewards=rewards, score_start_s=0.0, score_end_s=0.0))
    return groups


# The updater.


def run_updates(rank: int, world: int, config: RunConfig, steps: list[list[ScoredGroup]]) -> dict[str, Any]:
    """Weights, metrics of each step and this rank's advantages, after the steps. Groups go round robin to the ranks."""
    from raygrpo.roles.policy import build_policy

    warnings.filterwarnings("ignore")
    _, engine, updater, _ = build_policy(config)
    metrics, advantages = [], []
    for step, groups in enumerate(steps):
        of_step, of_rank = updater.update(groups[rank::world], step)
        metrics.append(of_step)
        advantages.append(of_rank)
    weights = {name: tensor.clone() for name, tensor in engine.named_weights()}
    return {"weights": weights, "metrics": metrics, "advantages": advantages}


def run_on_ranks(rank: int, world: int, directory: str, runs: list[tuple[str, RunConfig]], steps: dict) -> None:
    """For torch.multiprocessing.spawn: one process of a gloo gang, which saves what it got of each run."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(rank))
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store{world}", rank=rank, world_size=world)
    for name, config in runs:
        result = run_updates(rank, world, config, steps[config.generator.sampling.temperature])
        torch.save(result, f"{directory}/{name}-{world}-{rank}.pt")
    dist.destroy_process_group()


# The reference.


def plain_scores(
    model: nn.Module, prompt_ids: list[int], completion_ids: list[int], temperature: float
) -> tuple[Tensor, Tensor]:
    """[C] log-probabilities and [C] entropies, by one ordinary forward."""
    logits = model(input_ids=torch.tensor([prompt_ids + completion_ids]), use_cache=False).logits[0]
    log_p = (logits[len(prompt_ids) - 1 : -1] / temperature).log_softmax(-1)
    return log_p.gather(1, torch.tensor(completion_ids)[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def reference_updates(load, config: RunConfig, steps: list[list[ScoredGroup]]) -> dict[str, Any]:
    """What `run_updates` should give. load: makes the model anew."""
    torch.manual_seed(config.seed)
    policy, frozen = load(), load()
    if config.model.lora is not None:
        lora = config.model.lora
        adapters = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.target_modules)
        policy = peft.get_peft_model(policy, adapters)
    policy.train()
    start = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    settings, adam = config.algorithm, config.learner.optimizer
    optimizer = torch.optim.AdamW(trained, lr=adam.lr, betas=adam.betas, eps=adam.eps, weight_decay=adam.weight_decay)
    advantages, norms = [], []
    for groups in steps:
        scored = [_score_group(policy, frozen, config, group) for group in groups]
        advantages.append([_group_advantages(config, group, s) for group, s in zip(groups, scored, strict=True)])
        for _ in range(settings.epochs):
            size = len(groups) // settings.mini_batches
            for first in range(0, len(groups), size):
                chosen = range(first, first + size)
                loss = _loss(policy, config, groups, scored, advantages[-1], chosen)
                optimizer.zero_grad()
                loss.backward()
                norms.append(nn.utils.clip_grad_norm_(trained, adam.max_grad_norm).item())
                optimizer.step()
    weights = {name: parameter.detach() for name, parameter in policy.named_parameters()}
    return {"start": start, "weights": weights, "advantages": advantages, "norms": norms}


def _score_group(policy, frozen, config: RunConfig, group: ScoredGroup) -> list[tuple[Tensor, Tensor]]:
    """(old, reference) log-probabilities of each completion, before the step's first update."""
    temperature = config.generator.sampling.temperature
    found = []
    for rollout in group.group.rollouts:
        request = (group.group.prompt.prompt_ids, rollout.completion_ids, temperature)
        with torch.no_grad():
            found.append((plain_scores(policy, *request)[0], plain_scores(frozen, *request)[0]))
    return found


def _group_advantages(config: RunConfig, group: ScoredGroup, scored) -> list[float]:
    settings = config.algorithm
    rewards = []
    for reward, rollout, (old, reference) in zip(group.rewards, group.group.rollouts, scored, strict=True):
        value = math.nan if reward.error else sum(w * c for w, c in zip(WEIGHTS, reward.components, strict=True))
        buffer = settings.overlong.buffer * MAX_COMPLETION_TOKENS
        if buffer:
            excess = (len(rollout.completion_ids) - MAX_COMPLETION_TOKENS + buffer) / buffer
            value -= settings.overlong.penalty * min(max(excess, 0.0), 1.0)
        if settings.kl.coef and settings.kl.placement == "reward":
            d = (reference - old).double()
            kl = -d if settings.kl.estimator == "k1" else d.exp() - d - 1
            value -= settings.kl.coef * kl.sum().item()
        rewards.append(value)
    valid = [value for value in rewards if not math.isnan(value)]
    if len(valid) < 2 or max(valid) == min(valid):
        return [0.0] * len(rewards)
    mean = sum(valid) / len(valid)
    std = math.sqrt(sum((value - mean) ** 2 for value in valid) / (len(valid) - 1))
    scale = std + 1e-6 if settings.advantage.scale == "group" else 1.0
    return [0.0 if math.isnan(value) else (value - mean) / scale for value in rewards]


def _loss(policy, config: RunConfig, groups, scored, advantages, chosen) -> Tensor:
    """Of one update, summed in float64 over the completions of the chosen groups."""
    settings = config.algorithm
    counted = [
        (i, j)
        for i in chosen
        for j, (rollout, reward) in enumerate(zip(groups[i].group.rollouts, groups[i].rewards, strict=True))
        if not reward.error and not (settings.overlong.mask and rollout.finish_reason == "length")
    ]
    num_tokens = sum(len(groups[i].group.rollouts[j].completion_ids) for i, j in counted)
    total = torch.zeros((), dtype=torch.float64)
    for i, j in counted:
        rollout, advantage = groups[i].group.rollouts[j], advantages[i][j]
        request = (groups[i].group.prompt.prompt_ids, rollout.completion_ids, config.generator.sampling.temperature)
        logprobs, entropy = plain_scores(policy, *request)
        old, reference = scored[i][j]
        old = old if settings.updates_per_step > 1 else logprobs.detach()
        weight = (old - torch.tensor(rollout.behaviour_logprobs)).exp().clamp(max=2.0)
        ratio = (logprobs - old).exp()
        clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
        loss = -torch.minimum(ratio * advantage, clipped * advantage) * weight
        if settings.kl.coef and settings.kl.placement == "loss":
            d = reference - logprobs
            loss = loss + settings.kl.coef * (d.exp() - d - 1)
        loss = loss - settings.entropy_coef * entropy
        share = num_tokens if settings.aggregation == "token_mean" else len(counted) * len(loss)
        total = total + loss.double().sum() / share
    return total
