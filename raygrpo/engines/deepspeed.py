"""DeepSpeed as the learner's engine: one optimizer step over any number of micro-batches, and the weights it arrives
at.

The only file that imports deepspeed. It owns what DeepSpeed is told (`deepspeed_config`) and the ways around it that
training with a varying number of micro-batches takes; the loss and the batches belong to the learner.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raygrpo.config import LearnerConfig, OptimizerConfig
from raygrpo.engines.checkpoint_names import CheckpointNames
from raygrpo.types import RunStopped

CHECKPOINT_TAG = "deepspeed"
GATHER_BYTES = 256 * 2**20  # of parameters that ZeRO-3 puts together at a time when weights are read


def learning_rate(optimizer: OptimizerConfig, update: int, num_updates: int) -> float:
    """Of update 0 .. num_updates - 1: a linear rise over `warmup_steps`, then the schedule down to lr *
    final_lr_fraction."""
    if update < optimizer.warmup_steps:
        return optimizer.lr * (update + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return optimizer.lr
    span = max(1, num_updates - 1 - optimizer.warmup_steps)
    progress = min(1.0, (update - optimizer.warmup_steps) / span)
    remaining = 1.0 - progress if optimizer.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    floor = optimizer.final_lr_fraction
    return optimizer.lr * (floor + (1.0 - floor) * remaining)


def deepspeed_config(learner: LearnerConfig, dtype: str) -> dict[str, Any]:
    """What DeepSpeed gets: the user's options plus those that follow from other settings (config.py refuses a
    clash)."""
    return (
        {"steps_per_print": 2**31}
        | learner.deepspeed
        | {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,  # the number of micro-batches varies; step() ends an update
            "gradient_clipping": learner.optimizer.max_grad_norm,
            "bf16": {"enabled": dtype == "bfloat16"},  # with float32 master weights
            "zero_allow_untested_optimizer": True,  # torch.optim.AdamW
        }
    )


class DeepSpeedEngine:
    """One rank's share of the policy, its optimizer, and how both are stepped.

    torch.distributed must be initialised. All ranks must call every method, the same number of times: under ZeRO-3 each
    forward and backward is a collective.
    """

    def __init__(self, policy: nn.Module, learner: LearnerConfig, *, dtype: str, num_updates: int):
        """policy: a Hugging Face model, prepared by enable_shared_prefix. num_updates: of the whole run, for the
        learning rate."""
        import deepspeed

        # A shared-memory all-reduce for CPUs that DeepSpeed would compile at start-up: two minutes, g++ and ninja.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._settings = learner.optimizer
        self._num_updates = num_updates
        self._policy = policy
        parameters = [p for p in policy.parameters() if p.requires_grad]
        self._has_frozen = len(parameters) < sum(1 for _ in policy.parameters())  # those are on disk already
        optimizer = torch.optim.AdamW(
            parameters,
            lr=self._settings.lr,
            betas=self._settings.betas,
            eps=self._settings.eps,
            weight_decay=self._settings.weight_decay,
        )
        config = deepspeed_config(learner, dtype)
        # DeepSpeed allocates its reduction buckets whole, 2 GB each by default: no more than the parameters need.
        bucket_size = min(500_000_000, sum(p.numel() for p in parameters))
        config["zero_optimization"] = {"reduce_bucket_size": bucket_size} | config["zero_optimization"]
        self._names = CheckpointNames(policy)
        self._engine: Any
        self._optimizer: Any
        self._engine, self._optimizer, _, _ = deepspeed.initialize(model=policy, optimizer=optimizer, config=config)
        self._is_zero3 = self._engine.zero_optimization_partition_weights()

    @property
    def gathers_weights(self) -> bool:
        """Whether `named_weights` puts tensors together that are gone when the next is asked for; otherwise they stay
        until the next update."""
        return self._is_zero3

    @property
    def module(self) -> nn.Module:
        """The policy behind DeepSpeed's hooks: what every forward pass must go through."""
        return self._engine

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch. The losses of all micro-batches of all ranks are summed, so `loss` must
        already be divided by the whole step's denominator; DeepSpeed averages over ranks, which the factor undoes."""
        self._engine.backward(loss * self._engine.dp_world_size, scale_wrt_gas=False)

    def step(self, update: int) -> tuple[float, float]:
        """Clip, update the weights, clear the gradients; returns (gradient norm before clipping, learning rate).

        Raises RunStopped when the gradient is not finite: the weights are then spoilt, and the run must stop.
        """
        rate = learning_rate(self._settings, update, self._num_updates)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        if not math.isfinite(norm):
            raise RunStopped(f"the gradient norm of update {update} is {norm}")
        return norm, rate

    def save(self, directory: str | Path) -> None:
        """Write this rank's share of weights, master weights and optimizer into a directory that all ranks are given.

        Raises OSError or RuntimeError where that failed, on this rank alone, once all ranks are through: DeepSpeed
        gathers parameters and waits for all ranks after it has written, and a rank that left before would be missed
        there.
        """
        failures: list[Exception] = []

        def kept(write: Callable[..., object]) -> Callable[..., None]:
            """The same, but its error waits."""

            def attempt(*args: Any, **kwargs: Any) -> None:
                try:
                    write(*args, **kwargs)
                except (OSError, RuntimeError) as error:
                    failures.append(error)

            return attempt

        writer = self._engine.checkpoint_engine
        writer.save, self._engine._copy_recovery_script = kept(writer.save), kept(self._engine._copy_recovery_script)
        try:
            self._engine.save_checkpoint(
                str(directory), tag=CHECKPOINT_TAG, save_latest=False, exclude_frozen_parameters=self._has_frozen
            )
        finally:
            del writer.save, self._engine._copy_recovery_script
        if failures:
            raise failures[0]

    def load(self, directory: str | Path) -> None:
        """Read back what `save` wrote with as many ranks and the same ZeRO stage. The files are pickles: verify their
        digests before."""
        path, _ = self._engine.load_checkpoint(
            str(directory), tag=CHECKPOINT_TAG, load_module_strict=not self._has_frozen
        )
        if path is None:
            raise RuntimeError(f"DeepSpeed did not find its checkpoint in {directory}")

    def published_weights(self, *, trained_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        """As `named_weights`, with the names and shapes of the model's checkpoint."""
        for name, tensor in self.named_weights(trained_only=trained_only):
            yield from self._names(name, tensor).items()

    @torch.no_grad()
    def named_weights(self, *, trained_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        """(name in the model, full tensor on its device) of every parameter, or of those that are trained; tied ones
        once. Under ZeRO-3 in buckets, never the whole model at once: a tensor is valid until the next is asked for, and
        every rank must exhaust the iterator."""
        named: Any = self._policy.named_parameters()
        wanted = [(name, parameter) for name, parameter in named if parameter.requires_grad or not trained_only]
        if not self._is_zero3:
            for name, parameter in wanted:
                yield name, parameter.detach()
            return
        import deepspeed

        bucket: list[tuple[str, Any]] = []  # parameters with what DeepSpeed adds to them
        num_bytes = 0
        for name, parameter in wanted:
            bucket.append((name, parameter))
            num_bytes += parameter.ds_numel * parameter.element_size()
            if num_bytes >= GATHER_BYTES:
                with deepspeed.zero.GatheredParameters([p for _, p in bucket]):
                    yield from ((name, p.detach()) for name, p in bucket)
                bucket, num_bytes = [], 0
        with deepspeed.zero.GatheredParameters([p for _, p in bucket]):
            yield from ((name, p.detach()) for name, p in bucket)
