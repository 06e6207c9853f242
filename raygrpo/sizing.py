"""How much memory a process of each role needs, from the model's shape and the settings, before anything starts.

`raygrpo check` prints it, and the node types in cluster/ were chosen by it. Weights, optimizer and gradients follow
from what DeepSpeed and the learner allocate; activations, the LM head and the KV cache are those of the longest prompts
and completions; PROCESS_BYTES and DEVICE_BYTES are allowances for what no formula gives. What a process keeps on its
device (a GPU, where it has one) and in the host's memory is told apart, and which parts exist at the same time.

Letters: P parameters, T those that are trained, N learners, b bytes of a number in model.dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raygrpo.config import LoraConfig, RunConfig
from raygrpo.shared_prefix.head import CHUNK_ROWS
from raygrpo.snapshot import BUCKET_BYTES

GIB = 2**30
PROCESS_BYTES = 2 * GIB  # torch, the engine's libraries, Python: of a learner's or generator's process, besides tensors
SCORER_BYTES = GIB // 2  # a Ray worker and the child that runs reward functions, without what those load
DEVICE_BYTES = 2 * GIB  # CUDA's context, cuBLAS and NCCL workspaces, CUDA graphs, fragmentation
MAX_SEQUENCES = 1024  # that vLLM runs at a time unless generator.vllm.max_num_seqs says otherwise

When = Literal["always", "in a pass", "in a step", "while loading"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """What memory depends on. `of` reads it from a Hugging Face config, without any weights."""

    num_parameters: int
    num_trained: int
    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # of the MLP; of a mixture of experts, of all the experts that a token meets
    vocabulary: int
    norms_heads: bool  # queries and keys are normalised

    @classmethod
    def of(cls, model: Any, lora: LoraConfig | None = None, *, trust_remote_code: bool = False) -> ModelSize:
        """Counts parameters exactly, on torch's meta device: tied ones once, adapters as peft adds them."""
        import torch
        from transformers import AutoModelForCausalLM

        from raygrpo.lora import add_adapters

        with torch.device("meta"):
            network: Any = AutoModelForCausalLM.from_config(model, trust_remote_code=trust_remote_code)
            num_parameters = sum(parameter.numel() for parameter in network.parameters())
            norms_heads = any("q_norm" in name for name, _ in network.named_parameters())
            if lora is not None:
                network = add_adapters(network, lora)
        trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
        text = model.get_text_config()
        experts = getattr(text, "num_experts_per_tok", None)
        width = (getattr(text, "moe_intermediate_size", None) or text.intermediate_size) if experts else None
        return cls(
            num_parameters=num_parameters,
            num_trained=trained,
            num_layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            heads=text.num_attention_heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            intermediate=experts * width if experts and width else text.intermediate_size,
            vocabulary=text.vocab_size,
            norms_heads=norms_heads,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    name: str
    num_bytes: float
    why: str
    when: When = "always"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleMemory:
    """Of one process."""

    role: str
    num_processes: int
    num_gpus: float  # of each; 0: `device` lies in the host's memory too
    gpu_memory_share: float = 1.0  # of each GPU's memory, what it may fill
    device: tuple[Part, ...]
    host: tuple[Part, ...]

    @property
    def device_peak(self) -> float:
        return peak(self.device)

    @property
    def host_peak(self) -> float:
        """Includes the device's parts where the device is the host."""
        return peak(self.host) if self.num_gpus else peak((*self.host, *self.device))

    @property
    def gpu_share(self) -> float:
        """Bytes on each GPU of a process that has several."""
        return self.device_peak / max(1.0, self.num_gpus)


def peak(parts: Sequence[Part]) -> float:
    """The most that is there at a time: passes and steps follow one another, and loading comes before all the rest."""

    def total(when: When) -> float:
        return sum(part.num_bytes for part in parts if part.when == when)

    return max(total("always") + max(total("in a pass"), total("in a step")), total("while loading"))


def memory(config: RunConfig, size: ModelSize, prompt_tokens: int) -> list[RoleMemory]:
    """Of every role. prompt_tokens: of the longest prompt."""
    scorer = Part(
        name="scorer", num_bytes=SCORER_BYTES, why="a Ray worker and its child; what reward functions load is extra"
    )
    return [
        _learner(config, size),
        _generator(config, size, prompt_tokens),
        RoleMemory(role="reward", num_processes=config.reward.num_workers, num_gpus=0, device=(), host=(scorer,)),
    ]


def object_store_bytes(config: RunConfig, size: ModelSize) -> float:
    """Of a node with a learner or generators: two published versions, the new one beside the one it replaces."""
    return 0.0 if config.generator.weight_transfer == "direct" else 2 * _published_bytes(config, size)


def activation_bytes(size: ModelSize, dtype_bytes: int) -> int:
    """What one token leaves in one layer for its backward pass: the inputs of norms (in float32), of projections, of
    the attention and of the gated MLP, as the Llama family's modules in transformers keep them."""
    b, q, kv = dtype_bytes, size.heads * size.head_dim, size.kv_heads * size.head_dim
    norms = 2 * (4 + 2 * b) * size.hidden + size.norms_heads * (4 + 2 * b) * (q + kv)
    return norms + b * (2 * q + 2 * kv) + 4 * size.heads + 4 * b * size.intermediate


def kv_bytes_per_token(size: ModelSize, dtype_bytes: int) -> int:
    """Keys and values of all layers."""
    return 2 * size.num_layers * size.kv_heads * size.head_dim * dtype_bytes


def _learner(config: RunConfig, size: ModelSize) -> RoleMemory:
    learner, n, b = config.learner, config.learner.num_workers, _dtype_bytes(config)
    zero, stage = learner.deepspeed["zero_optimization"], learner.zero_stage
    p, t = size.num_parameters, size.num_trained
    shard = n if stage == 3 else 1
    has_reference = config.algorithm.kl.coef > 0 and config.model.lora is None
    tokens, rows = learner.max_tokens, CHUNK_ROWS["cuda" if learner.num_gpus else "cpu"]
    layer = tokens * activation_bytes(size, b)
    if config.model.gradient_checkpointing:
        activations = size.num_layers * tokens * size.hidden * b + layer
        why = "every layer's input, and one layer computed again, for learner.max_tokens tokens"
    else:
        activations = size.num_layers * layer
        why = "what every layer keeps for its backward pass, for learner.max_tokens tokens"
    parts = [
        Part(name="weights", num_bytes=p * b / shard, why="P b" + " / N (ZeRO 3)" * (stage == 3)),
        Part(
            name="master weights", num_bytes=4 * t / n, why="4 T / N: float32, beside the weights in every ZeRO stage"
        ),
        Part(name="Adam's moments", num_bytes=8 * t / n, why="8 T / N: two in float32"),
        Part(name="gradients", num_bytes=t * b / (n if stage > 1 else 1), why="T b" + " / N (ZeRO 2, 3)" * (stage > 1)),
        Part(name="activations", num_bytes=activations, why=why, when="in a pass"),
        Part(
            name="LM head",
            num_bytes=rows * size.vocabulary * (3 * 4 + b) + size.vocabulary * size.hidden * (4 + b),
            why=f"logits of {rows} rows three times in float32, and the gradient of the head's weight",
            when="in a pass",
        ),
        Part(
            name="gradients in float32",
            num_bytes=4 * t / n if b < 4 else 0,
            why="4 T / N: what Adam reads, made at the update",
            when="in a step",
        ),
        Part(
            name="whole model",
            num_bytes=p * b * (1 + has_reference) + DEVICE_BYTES * bool(learner.num_gpus),
            why="P b: every learner loads it before ZeRO divides it" + ", and the reference policy" * has_reference,
            when="while loading",
        ),
    ]
    if stage > 1:
        bucket = min(zero.get("reduce_bucket_size", 500_000_000), t)
        parts.append(
            Part(name="reduction bucket", num_bytes=bucket * b, why="zero_optimization.reduce_bucket_size x b")
        )
    if stage == 3 and n > 1:
        live = min(zero.get("stage3_max_live_parameters", 1_000_000_000), p)
        parts.append(
            Part(
                name="gathered weights",
                num_bytes=live * b,
                why="zero_optimization.stage3_max_live_parameters x b",
                when="in a pass",
            )
        )
    if has_reference:
        parts.append(
            Part(name="reference policy", num_bytes=p * b, why="P b: algorithm.kl.coef > 0; whole on every learner")
        )
    if learner.num_gpus:
        parts.append(Part(name="device", num_bytes=DEVICE_BYTES, why="allowance: context, workspaces, fragmentation"))
    host = [Part(name="process", num_bytes=PROCESS_BYTES, why="allowance: libraries")]
    if learner.num_gpus:
        loading = PROCESS_BYTES + p * b
        host.append(Part(name="loaded model", num_bytes=loading, why="P b on its way to the GPU", when="while loading"))
    published = _published_bytes(config, size)
    if config.generator.weight_transfer == "direct":
        kept = config.kept_versions
        why = "rank 0 keeps what generators pull" + f": {kept} versions, since one may be evaluated" * (kept > 1)
        parts.append(Part(name="published weights", num_bytes=kept * published, why=why))
    else:
        host.append(Part(name="packed weights", num_bytes=published, why="rank 0, at each publish", when="in a step"))
    return RoleMemory(
        role="learner",
        num_processes=n,
        num_gpus=learner.num_gpus,
        gpu_memory_share=min(1.0, learner.num_gpus),
        device=tuple(parts),
        host=tuple(host),
    )


def _generator(config: RunConfig, size: ModelSize, prompt_tokens: int) -> RoleMemory:
    generator, b = config.generator, _dtype_bytes(config)
    in_flight = (config.max_staleness + 1) * config.groups_per_step
    groups = min(generator.max_groups, math.ceil(in_flight / generator.num_actors))
    tokens = prompt_tokens + config.group_size * generator.sampling.max_tokens
    sequences = min(groups * config.group_size, generator.vllm.get("max_num_seqs", MAX_SEQUENCES))
    parts = [
        Part(name="weights", num_bytes=size.num_parameters * b, why="P b"),
        Part(
            name="KV cache",
            num_bytes=groups * tokens * kv_bytes_per_token(size, b),
            why=f"{groups} groups at their longest, prompts once; with less, groups wait or are computed again",
        ),
        Part(
            name="logits",
            num_bytes=sequences * size.vocabulary * 4 * 2,
            why=f"of {sequences} sequences in float32, and their log-probabilities",
        ),
    ]
    if generator.weight_transfer == "direct":
        largest = max(BUCKET_BYTES, size.vocabulary * size.hidden * b)
        coming = min(_published_bytes(config, size), 2 * largest)
        parts.append(Part(name="weights that come in", num_bytes=coming, why="two buckets, one of which is loaded"))
    if generator.num_gpus:
        per_gpu = DEVICE_BYTES * max(1.0, generator.num_gpus)
        parts.append(Part(name="device", num_bytes=per_gpu, why="allowance: context, workspaces, CUDA graphs"))
    ranks = generator.tensor_parallel_size
    host = [Part(name="process", num_bytes=PROCESS_BYTES, why="allowance: libraries")]
    if ranks > 1:
        host.append(Part(name="ranks", num_bytes=ranks * PROCESS_BYTES, why="the same for each: tensor_parallel_size"))
    if ranks > 1 and generator.weight_transfer == "object_store":
        why = f"{ranks} P b: vLLM hands them to each rank whole"
        received = ranks * size.num_parameters * b
        host.append(Part(name="weights that come in", num_bytes=received, why=why, when="in a step"))
    if config.model.lora is not None:
        merged = 2 * size.num_parameters * b
        host.append(Part(name="base and merged weights", num_bytes=merged, why="2 P b: adapters are merged here"))
    return RoleMemory(
        role="generator",
        num_processes=generator.num_actors,
        num_gpus=generator.num_gpus,
        gpu_memory_share=generator.gpu_memory_share,
        device=tuple(parts),
        host=tuple(host),
    )


def _published_bytes(config: RunConfig, size: ModelSize) -> float:
    return (size.num_trained if config.model.lora is not None else size.num_parameters) * _dtype_bytes(config)


def _dtype_bytes(config: RunConfig) -> int:
    return {"float32": 4, "bfloat16": 2}[config.model.dtype]


def misfits(roles: Sequence[RoleMemory], *, gpu_bytes: float | None, host_bytes: float) -> list[str]:
    """A sentence for each role that needs more than a machine has. gpu_bytes: of one of its GPUs; None: no GPUs."""
    sentences = []
    for role in roles:
        if role.num_gpus and gpu_bytes is not None:
            available = gpu_bytes * role.gpu_memory_share
            if role.gpu_share > available:
                sentences.append(
                    f"a {role.role} needs about {role.gpu_share / GIB:.1f} GiB of each GPU, of which it has "
                    f"{available / GIB:.1f} GiB"
                )
    total = sum(role.num_processes * role.host_peak for role in roles)
    if total > host_bytes:
        sentences.append(
            f"all processes together need about {total / GIB:.1f} GiB of the host's memory, of which there are "
            f"{host_bytes / GIB:.1f} GiB"
        )
    return sentences
