"""The same functions in TRL 1.16 and verl 0.9.1, run from their installed sources.

TRL comes with the `test` extra. verl's requirements contradict ours and its wheel would put a package called `tests`
beside ours: it is installed apart, `pip install --no-deps --target <environment>/peers verl==0.9.1`, and single files
of it are loaded.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import textwrap
from collections import defaultdict
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

VERL = Path(sys.prefix) / "peers" / "verl"


class VerlConfig(SimpleNamespace):
    """Stands for verl's ActorConfig, which needs hydra to import."""

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


@cache
def verl() -> SimpleNamespace:
    """verl's core_algos and rollout_corr_helper, with what they import for other purposes replaced by empty modules."""
    if not VERL.exists():
        pytest.skip(f"pip install --no-deps --target {VERL.parent} verl==0.9.1")

    def stub(name: str, **content: Any) -> ModuleType:
        module = ModuleType(name)
        module.__dict__.update(content)
        return module

    def anything(name: str) -> type:
        return type(name, (), {})

    stubs = {
        "omegaconf": stub("omegaconf", DictConfig=anything("DictConfig")),
        "tensordict": stub("tensordict", TensorDict=anything("TensorDict")),
        "verl": stub("verl"),
        "verl.protocol": stub("verl.protocol", DataProto=anything("DataProto")),
        "verl.trainer": stub("verl.trainer"),
        "verl.trainer.config": stub("verl.trainer.config", AlgoConfig=anything("AlgoConfig")),
        "verl.trainer.config.algorithm": stub("verl.trainer.config.algorithm", RolloutCorrectionConfig=object),
        "verl.workers": stub("verl.workers"),
        "verl.workers.config": stub("verl.workers.config", ActorConfig=VerlConfig),
        "verl.workers.config.actor": stub("verl.workers.config.actor", PolicyLossConfig=object),
        "verl.utils": stub("verl.utils"),
        "verl.utils.device": stub(
            "verl.utils.device", get_device_name=lambda: "cpu", get_torch_device=lambda: torch.cpu
        ),
    }

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, VERL.parent / (name.replace(".", "/") + ".py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    with mock.patch.dict(sys.modules, stubs):
        groupwise = load("verl.utils.groupwise")
        stubs["verl.utils"].__dict__.update(
            as_torch_index=groupwise.as_torch_index, group_mean_std=groupwise.group_mean_std
        )
        load("verl.utils.import_utils")
        stubs["verl.utils"].torch_functional = load("verl.utils.torch_functional")
        return SimpleNamespace(
            core=load("verl.trainer.ppo.core_algos"), correction=load("verl.trainer.ppo.rollout_corr_helper")
        )


@cache
def _trl_trainers() -> tuple[ModuleType, ModuleType]:
    import_utils = importlib.import_module("trl.import_utils")
    with mock.patch.object(import_utils, "is_vllm_available", lambda *_, **__: False):  # importing vLLM takes 20 s
        from trl.trainer import grpo_trainer, rloo_trainer
    return grpo_trainer, rloo_trainer


class _OneProcess:
    """Stands for accelerate's Accelerator on one process."""

    num_processes = 1
    sync_gradients = True

    def gather(self, values: Tensor) -> Tensor:
        return values

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        return values


def _trainer(logprobs: Tensor, entropy: Tensor | None, **attributes: Any) -> SimpleNamespace:
    entropy = torch.zeros_like(logprobs) if entropy is None else entropy
    return SimpleNamespace(
        accelerator=_OneProcess(),
        model=SimpleNamespace(training=True),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropy, None),
        _metrics=defaultdict(lambda: defaultdict(list)),
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        **attributes,
    )


def _inputs(mask: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    ids = mask.long()
    return {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": mask.to(advantages.dtype),
        "advantages": advantages,
        "num_items_in_batch": mask.sum(),
    }


def trl_grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss_type: str = "dapo",
    importance_sampling_level: str = "token",
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    beta: float = 0.0,
    use_bias_correction_kl: bool = False,
    ref_logprobs: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    max_completion_length: int = 0,
) -> tuple[Tensor, dict[str, list[float]]]:
    """GRPOTrainer._compute_loss on given log-probabilities, all [R, T]; and what it logged."""
    trainer = _trainer(
        logprobs,
        entropy,
        args=SimpleNamespace(
            delta=delta,
            use_bias_correction_kl=use_bias_correction_kl,
            # Numbers in a run; as tensors TRL's where() keeps them in float64.
            sapo_temperature_pos=torch.tensor(1.0, dtype=torch.float64),
            sapo_temperature_neg=torch.tensor(1.05, dtype=torch.float64),
            steps_per_generation=1,
        ),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=importance_sampling_level,
        beta=beta,
        loss_type=loss_type,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        use_vllm=importance_sampling_ratio is not None,
        vllm_importance_sampling_correction=True,
        max_completion_length=max_completion_length,
        _entropy_bonus_enabled=entropy_coef > 0,
        use_adaptive_entropy=False,
        entropy_coef=entropy_coef,
    )
    inputs = _inputs(mask, advantages) | {
        "old_per_token_logps": old_logprobs,
        "ref_per_token_logps": ref_logprobs,
        "importance_sampling_ratio": importance_sampling_ratio,
    }
    loss = _trl_trainers()[0].GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss, trainer._metrics["train"]


def trl_rloo_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """RLOOTrainer._compute_loss on given log-probabilities [R, T]."""
    trainer = _trainer(logprobs, None, epsilon_low=0.2, epsilon_high=0.2)
    inputs = _inputs(mask, advantages) | {"old_logps": (old_logprobs * mask).sum(1)}
    return _trl_trainers()[1].RLOOTrainer._compute_loss(trainer, None, inputs)


def _run_part(method: Any, first_line: str, until_line: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run some lines of a long method as they stand in the installed source, in the given namespace."""
    lines = inspect.getsource(method).splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip().startswith(first_line))
    end = next(i for i in range(start, len(lines)) if lines[i].strip().startswith(until_line))
    exec(textwrap.dedent("\n".join(lines[start:end])), names)
    return names


def trl_grpo_advantages(rewards: Tensor, weights: Tensor, group_size: int, *, scale: str, aggregation: str) -> Tensor:
    """GRPOTrainer's advantages of rewards [R, K], groups in a row."""
    module = _trl_trainers()[0]
    names = vars(module) | {
        "self": SimpleNamespace(
            multi_objective_aggregation=aggregation,
            scale_rewards=scale,
            reward_weights=weights,
            reward_funcs=[None] * rewards.shape[1],
        ),
        "rewards_per_func": rewards,
        "num_generations": group_size,
        "device": "cpu",
        "unscorable_mask": rewards.isnan().all(dim=1),
    }
    method = module.GRPOTrainer._generate_and_score_completions
    return _run_part(method, 'if self.multi_objective_aggregation == "sum_then_normalize"', "# Slice to", names)[
        "advantages"
    ]


def trl_rloo_advantages(
    rewards: Tensor, group_size: int, *, beta: float, old: Tensor | None, ref: Tensor | None, mask: Tensor | None
) -> Tensor:
    """RLOOTrainer's advantages of rewards [R], groups in a row, its KL penalty taken off; old, ref, mask [R, T]."""
    module = _trl_trainers()[1]
    names = vars(module) | {
        "self": SimpleNamespace(
            reward_weights=torch.ones(1, dtype=rewards.dtype),
            reward_clip_range=None,
            beta=beta,
            normalize_advantages=False,
        ),
        "rewards_per_func": rewards[:, None],
        "num_generations": group_size,
        "device": "cpu",
        "gather": lambda values: values,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "completion_mask": mask,
    }
    method = module.RLOOTrainer._generate_and_score_completions
    return _run_part(method, "unscorable_mask = torch.isnan", "# Slice to", names)["advantages"]


def trl_importance_ratio(
    old: Tensor, behaviour: Tensor, mask: Tensor, *, mode: str, clip_min: float | None, clip_max: float
) -> Tensor:
    """GRPOTrainer's vLLM importance sampling ratio, [R, T] or [R, 1]."""
    module = _trl_trainers()[0]
    names = vars(module) | {
        "self": SimpleNamespace(
            vllm_importance_sampling_mode=mode,
            vllm_importance_sampling_clip_min=clip_min,
            vllm_importance_sampling_clip_max=clip_max,
        ),
        "old_per_token_logps": old,
        "sampling_per_token_logps": behaviour,
        "mask": mask,
    }
    method = module.GRPOTrainer._generate_and_score_completions
    first, until = (
        "per_token_logps_diff = (old_per_token_logps",
        "# Compute the per-token log probabilities for the reference",
    )
    return _run_part(method, first, until, names)["vllm_importance_sampling_ratio"]
