"""The policy of a learner: how it is loaded and wrapped, and the Hugging Face model that it becomes in the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raygrpo.config import ModelConfig, RunConfig
from raygrpo.lora import add_adapters, merge, split_adapters

if TYPE_CHECKING:
    import torch
    from torch import nn

    from raygrpo.engines.deepspeed import DeepSpeedEngine
    from raygrpo.shared_prefix.cost import ModelShape


def build_policy(config: RunConfig) -> tuple[nn.Module, DeepSpeedEngine, Any, ModelShape]:
    """The policy, its engine, its updater, and its shape for the cost model; needs torch.distributed."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from raygrpo.engines.deepspeed import DeepSpeedEngine
    from raygrpo.roles.policy_update import PolicyUpdater
    from raygrpo.shared_prefix import enable_shared_prefix
    from raygrpo.shared_prefix.cost import ModelShape

    transformers_logging.disable_progress_bar()
    learner, algorithm = config.learner, config.algorithm
    device = torch.device("cuda", torch.cuda.current_device()) if learner.num_gpus else torch.device("cpu")
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(learner.num_threads or max(1, cores // learner.num_workers))
    torch.manual_seed(config.seed)

    def load() -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(
            config.model.path,
            dtype=getattr(torch, config.model.dtype),
            trust_remote_code=config.model.trust_remote_code,
        )
        model.to(device)
        enable_shared_prefix(model, attention=learner.attention)
        return model

    policy = load()
    if config.model.lora is not None:
        policy = add_adapters(policy, config.model.lora)
    policy.train()
    if config.model.gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapters_off = getattr(policy, "disable_adapter", None) if config.model.lora is not None else None
    needs_reference = algorithm.kl.coef > 0 and adapters_off is None
    reference = load().eval().requires_grad_(False) if needs_reference else None
    shape = ModelShape.from_config(policy.config)
    num_updates = config.num_steps * algorithm.updates_per_step
    engine = DeepSpeedEngine(policy, learner, dtype=config.model.dtype, num_updates=num_updates)
    updater = PolicyUpdater(
        engine,
        reference,
        algorithm,
        config.reward,
        max_tokens=learner.max_tokens,
        temperature=config.generator.sampling.temperature,
        max_completion_tokens=config.generator.sampling.max_tokens,
        skip_zero_advantages=learner.skip_zero_advantages,
        min_shared_head=learner.min_shared_head,
        device=device,
        adapters_off=adapters_off,
    )
    return policy, engine, updater, shape


def export_policy(policy: Any, state: dict[str, torch.Tensor], model: ModelConfig, directory: str) -> None:
    """A directory that AutoModelForCausalLM.from_pretrained and vLLM load: safetensors, tokenizer, generation config.
    With LoRA the adapters are merged into the weights, and lie in `adapter` besides, for peft."""
    from transformers import AutoTokenizer

    Path(directory).mkdir(parents=True, exist_ok=True)
    if model.lora is not None:
        policy.save_pretrained(str(Path(directory, "adapter")), state_dict=state)
        frozen, adapters = split_adapters(state.items())
        state = merge(frozen, adapters, model.lora.scaling, model.dtype)
        policy = policy.get_base_model()
    policy.save_pretrained(directory, state_dict=state)
    AutoTokenizer.from_pretrained(model.path, trust_remote_code=model.trust_remote_code).save_pretrained(directory)
