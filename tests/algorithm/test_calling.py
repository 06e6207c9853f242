"""What somebody meets who calls the functions on tensors of their own: signatures, plain settings, errors, NaN."""

from __future__ import annotations

import inspect
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raygrpo.algorithm import AlgorithmConfig, compute_advantages, policy_loss
from raygrpo.algorithm_config import AdvantageConfig, CorrectionConfig, KLConfig, OverlongConfig
from tests.algorithm.batches import random_batch


def test_signatures() -> None:
    advantages = inspect.signature(compute_advantages).parameters
    assert list(advantages)[:3] == ["rewards", "group_index", "settings"]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is None for p in list(advantages.values())[3:])
    loss = inspect.signature(policy_loss).parameters
    positional = ["logprobs", "old_logprobs", "advantages", "loss_mask", "rollout_index", "settings"]
    optional = ["behaviour_logprobs", "ref_logprobs", "entropy", "totals"]
    assert list(loss)[:10] == positional + optional
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in list(loss.values())[:6])
    assert all(p.kind is p.KEYWORD_ONLY and p.default is None for p in list(loss.values())[6:])


def test_a_plain_shell_needs_neither_ray_nor_an_engine() -> None:
    code = """
import sys, torch
from raygrpo.algorithm import AlgorithmConfig, compute_advantages, policy_loss
settings = AlgorithmConfig()
a = compute_advantages(torch.tensor([1., 0., 0., 1.]), torch.tensor([0, 0, 0, 0]), settings)
logprobs = torch.tensor([-1., -2., -3., -4., -5.], requires_grad=True)
index = torch.tensor([0, 0, 1, 2, 3])
loss, metrics = policy_loss(logprobs, logprobs.detach(), a, torch.ones(5, dtype=torch.bool), index, settings)
loss.backward()
print(a.tolist(), loss.item(), logprobs.grad.tolist())
assert not {"ray", "vllm", "deepspeed", "transformers"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    unit = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    numbers = [float(word) for word in done.stdout.replace("[", " ").replace("]", " ").replace(",", " ").split()]
    gradient = [-unit / 5, -unit / 5, unit / 5, unit / 5, -unit / 5]
    assert numbers == pytest.approx([unit, -unit, -unit, unit, -unit / 5, *gradient], rel=1e-6)


def test_the_documented_code_runs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    assert names["advantages"].tolist() == pytest.approx([0.8660239, -0.8660239, -0.8660239, 0.8660239], rel=1e-6)
    assert names["loss"].isfinite() and names["logprobs"].grad.abs().sum() > 0


def test_sections_may_be_objects_and_keep_what_the_preset_set() -> None:
    for preset in (None, "rloo", "reinforce_pp", "grpo", "dapo"):
        objects = AlgorithmConfig(
            preset=preset,
            advantage=AdvantageConfig(eps=1e-4),
            kl=KLConfig(coef=0.5),
            correction=CorrectionConfig(cap=3.0),
            overlong=OverlongConfig(mask=True),
        )
        mappings = AlgorithmConfig(
            preset=preset,
            advantage={"eps": 1e-4},
            kl={"coef": 0.5},
            correction={"cap": 3.0},
            overlong={"mask": True},
        )
        assert objects == mappings
    rloo = AlgorithmConfig(preset="rloo", kl=KLConfig(coef=0.5))
    assert (rloo.kl.coef, rloo.kl.estimator, rloo.kl.placement) == (0.5, "k1", "reward")


def arguments() -> dict[str, Any]:
    batch = random_batch(0, lengths=[2, 3])
    return {
        "logprobs": batch.logprobs,
        "old_logprobs": batch.old_logprobs,
        "advantages": torch.tensor([1.0, -1.0], dtype=torch.float64),
        "loss_mask": torch.ones(5, dtype=torch.bool),
        "rollout_index": batch.rollout_index,
        "settings": AlgorithmConfig(kl=KLConfig(coef=0.1), entropy_coef=0.1),
        "behaviour_logprobs": batch.behaviour_logprobs,
        "ref_logprobs": batch.ref_logprobs,
        "entropy": batch.entropy,
    }


@pytest.mark.parametrize(
    "name", ["logprobs", "old_logprobs", "loss_mask", "behaviour_logprobs", "ref_logprobs", "entropy"]
)
def test_a_tensor_of_another_length_is_named(name: str) -> None:
    given = arguments()
    for wrong in (given[name][:-1], given[name][None], given[name][:, None]):
        with pytest.raises(ValueError, match=rf"{name} is \[.*\] but rollout_index \[5\]"):
            policy_loss(**given | {name: wrong})


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"advantages": torch.ones(2, 1)}, r"advantages are \[R\], one for each rollout; got \[2, 1\]"),
        ({"advantages": torch.ones(1)}, r"rollout_index goes from 0 to 1, but there are 1 advantages"),
        ({"rollout_index": torch.tensor([-1, 0, 1, 1, 1])}, r"rollout_index goes from -1 to 1"),
        ({"rollout_index": torch.zeros(5)}, r"rollout_index is \[S\], integers, .* got \[5\], torch.float32"),
        ({"rollout_index": torch.zeros(1, 5).long()}, r"rollout_index is \[S\], .* got \[1, 5\]"),
    ],
)
def test_indices_and_advantages_that_do_not_fit_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_loss(**arguments() | wrong)


def test_masked_tokens_may_belong_to_no_rollout() -> None:
    given = arguments()
    mask = torch.tensor([True, False, True, True, False])
    expected, _ = policy_loss(**given | {"loss_mask": mask})
    loss, _ = policy_loss(**given | {"loss_mask": mask, "rollout_index": torch.tensor([0, -1, 1, 1, 99])})
    assert loss == expected


@pytest.mark.parametrize(
    "rewards, groups, more, message",
    [
        (torch.zeros(4), [[0, 0], [1, 1]], {}, r"group_index is \[R\], integers; got \[2, 2\]"),
        (torch.zeros(2), [0.0, 1.0], {}, r"group_index is \[R\], integers; got \[2\], torch.float32"),
        (torch.zeros(2, 2, 2), [0, 1], {}, r"rewards are \[R\] or \[R, K\] .* got \[2, 2, 2\]"),
        (torch.zeros(3, 2), [0, 0, 1], {"reward_weights": torch.ones(1)}, r"2 reward functions but .* \[1\]"),
        (torch.zeros(3), [0, 0, 1], {"num_tokens": torch.ones(2)}, r"3 rewards but num_tokens is \[2\]"),
    ],
)
def test_rewards_that_do_not_fit_are_refused(rewards: Tensor, groups: list, more: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute_advantages(rewards, torch.tensor(groups), AlgorithmConfig(), **more)


@pytest.mark.parametrize("loss", [{"loss": "ppo_clip", "dual_clip": 3.0}, {"loss": "cispo"}, {"loss": "sapo"}])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mean"])
@pytest.mark.parametrize("action", ["truncate", "mask"])
def test_nan_that_counts_is_never_hidden(loss: dict, level: str, action: str) -> None:
    """No bound, mask or minimum may swallow it: the learner stops a run by the loss."""
    settings = AlgorithmConfig(
        **loss, ratio=level, correction={"level": level, "action": action}, kl={"coef": 0.1}, entropy_coef=0.1
    )
    given = arguments() | {"settings": settings}
    assert policy_loss(**given)[0].isfinite()
    for name in ("logprobs", "old_logprobs", "behaviour_logprobs", "ref_logprobs", "entropy", "advantages"):
        spoilt = given[name].detach().clone()
        spoilt[-1] = math.nan
        assert policy_loss(**given | {name: spoilt})[0].isnan(), name
