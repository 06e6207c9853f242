"""Adapters under DeepSpeed: the reference is the base with adapters off, and merged weights are what the policy is."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from transformers import AutoModelForCausalLM

from raygrpo.config import RunConfig
from raygrpo.engines.deepspeed import DeepSpeedEngine
from raygrpo.engines.lora import AdaptersOff, add_adapters, merged_weights
from raygrpo.roles.policy_update import PolicyUpdater
from raygrpo.shared_prefix import enable_shared_prefix
from raygrpo.types import ScoredGroup
from tests.roles.update_cases import MAX_COMPLETION_TOKENS, case_config, make_step, plain_scores
from tests.tiny_models import tiny_model

TARGETS = ["q_proj", "v_proj", "down_proj"]
CASES = ["kl_in_loss", "four_updates_kl_in_reward_in_parts"]
pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), hidden_size=32, num_heads=2, num_kv_heads=1, max_positions=64)


@pytest.fixture(scope="module")
def steps(model_dir) -> list[list[ScoredGroup]]:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    return [make_step(model, step) for step in range(2)]


@dataclass
class Outcome:
    metrics: list[dict[str, float]]
    merged: dict[str, Tensor]
    adapters: dict[str, Tensor]
    policy: Any


def train(rank: int, world: int, config: RunConfig, steps: list[list[ScoredGroup]], *, second_copy: bool) -> Outcome:
    """Two steps of LoRA; the reference is the base with adapters off, or a model of its own."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    enable_shared_prefix(base)
    policy = add_adapters(base, rank=4, alpha=8, target_modules=TARGETS).train()
    engine = DeepSpeedEngine(policy, config.learner, dtype="float32", num_updates=8)
    if second_copy:
        reference = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32).eval()
        enable_shared_prefix(reference)
    else:
        reference = AdaptersOff(engine.module, policy)
    updater = PolicyUpdater(
        engine,
        reference,
        config.algorithm,
        config.reward,
        max_tokens=config.learner.max_tokens,
        temperature=1.0,
        max_completion_tokens=MAX_COMPLETION_TOKENS,
        skip_zero_advantages=True,
        device=torch.device("cpu"),
    )
    metrics = [updater.update(groups[rank::world], step)[0] for step, groups in enumerate(steps)]
    merged = {name: tensor.clone() for name, tensor in merged_weights(policy, engine.named_weights())}
    adapters = {name: tensor.clone() for name, tensor in engine.named_weights() if "lora_" in name}
    return Outcome(metrics, merged, adapters, policy)


def train_on_ranks(rank: int, directory: str, runs: list[tuple[str, RunConfig]], steps: list) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    for name, config in runs:
        outcome = train(rank, 2, config, steps, second_copy=False)
        torch.save((outcome.metrics, outcome.merged), f"{directory}/{name}-{rank}.pt")
    dist.destroy_process_group()


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max((found[name] - expected[name]).abs().max().item() for name in expected)


@pytest.mark.parametrize(("stage", "case"), [(1, CASES[0]), (2, CASES[0]), (3, CASES[0]), (3, CASES[1])])
def test_the_base_with_adapters_off_is_the_reference(stage: int, case: str, model_dir, steps) -> None:
    config = case_config(model_dir, case, stage)
    alone = train(0, 1, config, steps, second_copy=False)
    expected = train(0, 1, config, steps, second_copy=True)
    assert largest_difference(alone.adapters, expected.adapters) < 1e-6
    for one, other in zip(alone.metrics, expected.metrics, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert alone.metrics[1]["policy/kl"] > 1e-4, "the policy has left its reference"
    # The penalty is at work: without it the adapters end elsewhere.
    without = case_config(model_dir, "plain" if case == "kl_in_loss" else "four_updates", stage)
    assert largest_difference(train(0, 1, without, steps, second_copy=False).adapters, expected.adapters) > 1e-4


def test_two_learners_do_what_one_does(model_dir, steps, tmp_path) -> None:
    runs = [(case, case_config(model_dir, case, stage)) for case, stage in zip(CASES, (3, 1), strict=True)]
    mp.spawn(train_on_ranks, (str(tmp_path), runs, steps), nprocs=2)
    for name, config in runs:
        alone = train(0, 1, config, steps, second_copy=False)
        for rank in range(2):
            metrics, merged = torch.load(tmp_path / f"{name}-{rank}.pt")
            assert largest_difference(merged, alone.merged) < 5e-6
            assert metrics[1]["policy/kl"] == pytest.approx(alone.metrics[1]["policy/kl"], rel=1e-3)


@pytest.mark.parametrize("stage", [1, 3])
def test_merged_weights_are_the_policy_under_the_names_of_the_base(stage: int, model_dir, steps) -> None:
    outcome = train(0, 1, case_config(model_dir, "plain", stage), steps, second_copy=False)
    fresh = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    start = {name: tensor.clone() for name, tensor in fresh.named_parameters()}
    assert outcome.merged.keys() == start.keys()
    moved = {name for name in start if not torch.equal(start[name], outcome.merged[name])}
    assert moved == {name for name in start if name.split(".")[-2] in TARGETS}, "only what has adapters changes"
    fresh.load_state_dict(outcome.merged, strict=False)
    prompt, completion = [3, 7, 11, 200], [5, 9, 30, 31, 32]
    found, _ = plain_scores(fresh, prompt, completion, 1.0)
    if stage == 1:  # under ZeRO-3 the parameters are not there outside the engine
        expected, _ = plain_scores(outcome.policy, prompt, completion, 1.0)
        assert (found - expected).abs().max() < 1e-5
        with outcome.policy.disable_adapter():
            base, _ = plain_scores(outcome.policy, prompt, completion, 1.0)
        assert (base - expected).abs().max() > 1e-3


def test_a_layer_that_is_not_there(model_dir) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    with pytest.raises(ValueError, match="wrong_proj"):
        add_adapters(model, rank=2, alpha=2, target_modules=["wrong_proj"])
