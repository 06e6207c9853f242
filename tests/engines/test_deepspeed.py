"""DeepSpeed's updates against torch's own, for every ZeRO stage."""

from __future__ import annotations

import math
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from raygrpo.config import LearnerConfig, OptimizerConfig
from raygrpo.engines import deepspeed as engine_module
from raygrpo.engines.deepspeed import DeepSpeedEngine, deepspeed_config, learning_rate
from raygrpo.types import RunStopped

pytestmark = pytest.mark.usefixtures("process_group")
zero_stages = pytest.mark.parametrize("stage", [1, 2, 3])


class Tied(nn.Module):
    """A little model with what real ones have: a tied head, a bias-free layer, a norm, sizes that nothing divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 7)
        self.inner = nn.Linear(7, 11, bias=False)
        self.norm = nn.LayerNorm(11)
        self.outer = nn.Linear(11, 7)
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        return self.head(hidden + self.outer(torch.tanh(self.norm(self.inner(hidden)))))


def make_engine(model: nn.Module, stage: int, *, dtype: str = "float32", num_updates: int = 10, **learner: Any):
    settings = {"deepspeed": {"zero_optimization": {"stage": stage}}} | learner
    return DeepSpeedEngine(model, LearnerConfig(**settings), dtype=dtype, num_updates=num_updates)


def tied_model() -> Tied:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tied()


def loss_of(model: nn.Module, ids: torch.Tensor, targets: torch.Tensor, total: int) -> torch.Tensor:
    return nn.functional.cross_entropy(model(ids).float(), targets, reduction="sum") / total


def largest_difference(engine: DeepSpeedEngine, reference: nn.Module) -> float:
    expected = dict(reference.named_parameters())
    found = {name: tensor.clone() for name, tensor in engine.named_weights()}
    assert found.keys() == expected.keys()
    return max((found[name].float() - expected[name].float()).abs().max().item() for name in expected)


# The learning rate.


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({}, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"warmup_steps": 4}, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
        ({"schedule": "linear"}, [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]),
        ({"schedule": "linear", "final_lr_fraction": 0.5}, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]),
        ({"schedule": "linear", "warmup_steps": 2}, [0.5, 1.0, 1.0, 2 / 3, 1 / 3, 0.0]),
        ({"schedule": "cosine"}, [0.5 + 0.5 * math.cos(math.pi * k / 5) for k in range(6)]),
        (
            {"schedule": "cosine", "warmup_steps": 1, "final_lr_fraction": 0.1},
            [1.0, 1.0, 0.8681981, 0.55, 0.2318019, 0.1],
        ),
    ],
)
def test_learning_rates_are_those_computed_by_hand(settings, rates):
    optimizer = OptimizerConfig(lr=2e-3, **settings)
    assert [learning_rate(optimizer, update, 6) / 2e-3 for update in range(6)] == pytest.approx(rates, abs=1e-7)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_of_runs_that_are_shorter_than_the_warm_up_or_longer_than_said(schedule):
    optimizer = OptimizerConfig(lr=1.0, warmup_steps=10, schedule=schedule, final_lr_fraction=0.25)
    assert [learning_rate(optimizer, update, 3) for update in range(3)] == pytest.approx([0.1, 0.2, 0.3])
    end = 1.0 if schedule == "constant" else 0.25
    assert learning_rate(optimizer, 500, 100) == pytest.approx(end)
    assert learning_rate(OptimizerConfig(lr=1.0, schedule=schedule), 0, 1) == 1.0


# Updates.


@zero_stages
def test_updates_equal_torchs_adamw_with_clipped_gradients(stage):
    """Several updates, each of another number of micro-batches, some clipped and some not."""
    optimizer = {"lr": 3e-3, "betas": [0.8, 0.9], "eps": 1e-4, "weight_decay": 0.1, "max_grad_norm": 10.0}
    optimizer |= {"warmup_steps": 2, "schedule": "linear"}
    model, reference = tied_model(), tied_model()
    engine = make_engine(model, stage, num_updates=6, optimizer=optimizer)
    plain = torch.optim.AdamW(reference.parameters(), lr=3e-3, betas=(0.8, 0.9), eps=1e-4, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    norms = []
    for update, micro_batches in enumerate([1, 4, 2, 7, 1, 3]):
        ids = torch.randint(13, (29,), generator=generator)
        targets = torch.randint(13, (29,), generator=generator)
        scale = 29 if update % 2 else 8  # some gradients exceed the bound
        for part in torch.arange(29).tensor_split(micro_batches):
            engine.backward(loss_of(engine.module, ids[part], targets[part], scale))
        norm, rate = engine.step(update)

        plain.zero_grad()
        loss_of(reference, ids, targets, scale).backward()
        expected_norm = nn.utils.clip_grad_norm_(reference.parameters(), 10.0).item()
        plain.param_groups[0]["lr"] = rate
        plain.step()
        assert rate == pytest.approx(3e-3 * [0.5, 1.0, 1.0, 2 / 3, 1 / 3, 0.0][update])
        assert norm == pytest.approx(expected_norm, rel=1e-5)
        assert largest_difference(engine, reference) < 1e-6
        norms.append(norm)
    assert min(norms) < 10.0 < max(norms), "the bound must matter in some updates and not in others"
    assert (reference.inner.weight - tied_model().inner.weight).abs().max() > 5e-3


@zero_stages
def test_gradients_do_not_leak_into_the_next_update(stage):
    """An update whose losses are zero leaves a fresh optimizer's weights where they are."""
    engine = make_engine(tied_model(), stage, optimizer={"lr": 1e-2})
    ids = torch.arange(13)
    engine.backward(0.0 * loss_of(engine.module, ids, ids, 13))
    norm, _ = engine.step(0)
    assert norm == 0.0
    assert largest_difference(engine, tied_model()) == 0.0
    engine.backward(loss_of(engine.module, ids, ids, 13))
    assert engine.step(1)[0] > 0.01
    engine.backward(0.0 * loss_of(engine.module, ids, ids, 13))
    assert engine.step(2)[0] == 0.0


@zero_stages
def test_frozen_parameters_stay_and_are_published(stage):
    model = tied_model()
    model.inner.weight.requires_grad_(False)
    engine = make_engine(model, stage, optimizer={"lr": 1e-2})
    ids = torch.arange(13)
    engine.backward(loss_of(engine.module, ids, ids, 13))
    engine.step(0)
    found = {name: tensor.clone() for name, tensor in engine.named_weights()}
    assert torch.equal(found["inner.weight"], tied_model().inner.weight)
    assert not torch.equal(found["outer.weight"], tied_model().outer.weight)


@zero_stages
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_the_run(stage, bad):
    engine = make_engine(tied_model(), stage)
    ids = torch.arange(13)
    engine.backward(bad * loss_of(engine.module, ids, ids, 13))
    with pytest.raises(RunStopped, match="gradient norm of update 3"):
        engine.step(3)


# Precision.


@zero_stages
def test_bfloat16_keeps_float32_masters(stage):
    """Fifty updates of 1e-4 relative size: each alone is lost in bfloat16 (whose step at 1 is 2^-7), together they are
    five per mille, a change that the published weights must show where it crosses a step."""
    model = nn.Linear(64, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.linspace(1.0, 1.99, 64))
    start = model.weight.detach().to(torch.bfloat16).clone()
    engine = make_engine(
        model.to(torch.bfloat16), stage, dtype="bfloat16", optimizer={"lr": 1e-4, "max_grad_norm": 1e9}
    )
    reference = start.float().clone().requires_grad_()
    plain = torch.optim.AdamW([reference], lr=1e-4, weight_decay=0.0)
    for update in range(50):
        inputs = torch.ones(1, 64, dtype=torch.bfloat16)
        engine.backward(engine.module(inputs).float().sum())
        engine.step(update)
        reference.grad = torch.ones_like(reference)
        plain.step()
    ((_, found),) = ((name, tensor.clone()) for name, tensor in engine.named_weights())
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, reference.detach().to(torch.bfloat16))
    moved = (found != start).float().mean().item()
    assert moved > 0.4, "the small updates were lost"


# What is passed through, and what is read.


def test_options_reach_deepspeed_and_cannot_undo_ours():
    learner = LearnerConfig(
        deepspeed={"zero_optimization": {"stage": 2, "reduce_bucket_size": 123}, "steps_per_print": 7},
        optimizer={"max_grad_norm": 0.5},
    )
    told = deepspeed_config(learner, "bfloat16")
    assert told["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 123}
    assert told["steps_per_print"] == 7
    assert (told["gradient_clipping"], told["bf16"]) == (0.5, {"enabled": True})
    assert deepspeed_config(LearnerConfig(), "float32")["bf16"] == {"enabled": False}


def test_a_passed_option_has_an_effect():
    """ZeRO-3 does not take apart again what is smaller than its persistence threshold."""

    def num_lasting(threshold: int) -> int:
        zero = {"stage": 3, "stage3_param_persistence_threshold": threshold}
        model = tied_model()
        make_engine(model, 3, deepspeed={"zero_optimization": zero})
        return sum(parameter.ds_persist for parameter in model.parameters())

    assert num_lasting(0) == 0
    assert num_lasting(80) == 5  # norm's two of 11, outer's bias of 7, and the matrices of 77
    assert num_lasting(10**6) == 6


@zero_stages
@pytest.mark.parametrize("gather_bytes", [1, 400, 2**30])
def test_named_weights_are_whole_and_in_order(stage, gather_bytes, monkeypatch):
    monkeypatch.setattr(engine_module, "GATHER_BYTES", gather_bytes)
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    engine = make_engine(tied_model(), stage, deepspeed={"zero_optimization": zero})
    expected = tied_model()
    assert largest_difference(engine, expected) == 0.0
    assert [name for name, _ in engine.named_weights()] == [name for name, _ in expected.named_parameters()]
    assert all(not tensor.requires_grad for _, tensor in engine.named_weights())


def test_zero_3_gathers_no_more_than_a_bucket_at_a_time(monkeypatch):
    monkeypatch.setattr(engine_module, "GATHER_BYTES", 1)
    model = tied_model()
    engine = make_engine(
        model, 3, deepspeed={"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    )
    for _ in engine.named_weights():
        assert sum(parameter.numel() > 0 for parameter in model.parameters()) == 1
    assert sum(parameter.numel() > 0 for parameter in model.parameters()) == 0


def test_the_policy_trains_after_its_weights_were_read():
    """Reading between updates, as every publish does, changes nothing."""
    engines = [make_engine(tied_model(), 3, optimizer={"lr": 1e-2}) for _ in range(2)]
    ids = torch.arange(13)
    for update in range(3):
        for engine in engines:
            engine.backward(loss_of(engine.module, ids, ids.flip(0), 13))
            engine.step(update)
        list(engines[0].named_weights())
    read, unread = ({name: tensor.clone() for name, tensor in engine.named_weights()} for engine in engines)
    assert read.keys() == unread.keys() and all(torch.equal(read[name], unread[name]) for name in read)


# Checkpoints that cannot be written.

FILES = {  # rank whose write fails -> a file of it
    0: "zero_to_fp32.py",
    1: f"{engine_module.CHECKPOINT_TAG}/zero_pp_rank_1_mp_rank_00_optim_states.pt",
}


def save_on_two_ranks(rank: int, directory: str) -> None:
    """Save with each rank in turn unable to write, then with both able."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    limit = timedelta(seconds=120)  # a rank that is missed in a barrier fails the other
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2, timeout=limit)
    engine = make_engine(tied_model(), 3, deepspeed={"zero_optimization": {"stage": 3}})
    for failing, file in (FILES | {None: ""}).items():
        target = Path(directory, f"of-{failing}")
        (target / file).mkdir(parents=True, exist_ok=True)  # where a file should be written
        dist.barrier()
        try:
            engine.save(target)
            failed = False
        except (OSError, RuntimeError):
            failed = True
        assert failed == (rank == failing)
    Path(directory, f"passed-{rank}").touch()
    dist.destroy_process_group()


@pytest.mark.slow  # two processes start
def test_a_rank_that_cannot_write_holds_up_no_other(tmp_path):
    mp.spawn(save_on_two_ranks, (str(tmp_path),), nprocs=2)
    assert [(tmp_path / f"passed-{rank}").exists() for rank in range(2)] == [True, True]
