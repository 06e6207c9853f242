"""The memory estimate against what is really allocated, and what it says of models too large to run here."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from raygrpo.bench.memory import saved_bytes
from raygrpo.config import LoraConfig, RunConfig
from raygrpo.engines.deepspeed import DeepSpeedEngine
from raygrpo.lora import add_adapters
from raygrpo.shared_prefix import SharedPrefixBatch, enable_shared_prefix, score_completions
from raygrpo.sizing import (
    GIB,
    PROCESS_BYTES,
    ModelSize,
    Part,
    activation_bytes,
    kv_bytes_per_token,
    memory,
    misfits,
    object_store_bytes,
    peak,
)
from tests.conftest import run_config
from tests.tiny_models import tiny_model

QWEN3_8B = Qwen3Config(
    vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (QWEN3_8B, 8_190_735_360),
        (
            Qwen2Config(
                vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True,
            ),
            1_543_714_304,
        ),
        (
            LlamaConfig(
                vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
            ),
            8_030_261_248,
        ),
    ],
)  # fmt: skip
def test_parameters_are_those_of_the_published_models(config, published):
    """Qwen3-8B, Qwen2.5-1.5B and Llama-3.1-8B, as their model cards' safetensors count them."""
    size = ModelSize.of(config)
    assert size.num_parameters == size.num_trained == published


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma3_text"])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_parameters_and_trained_ones_are_counted_as_the_learner_has_them(architecture, lora, tmp_path):
    path = tiny_model(tmp_path, architecture)
    model = AutoModelForCausalLM.from_pretrained(path)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    model = add_adapters(model, lora) if lora is not None else model
    size = ModelSize.of(AutoConfig.from_pretrained(path), lora)
    assert size.num_parameters == num_parameters
    assert size.num_trained == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def parts_of(config: RunConfig, size: ModelSize, role: str = "learner") -> dict[str, float]:
    need = next(need for need in memory(config, size, 100) if need.role == role)
    return {part.name: part.num_bytes for part in (*need.device, *need.host)}


def storages() -> dict[int, torch.UntypedStorage]:
    """By address, of all tensors that Python holds in this process. They stay as long as the result does."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}


def bytes_since(before: dict[int, torch.UntypedStorage]) -> int:
    """Of what was allocated meanwhile: what other tests left behind may go at any time, and does not count."""
    return sum(storage.nbytes() for address, storage in storages().items() if address not in before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [1, 3])
def test_weights_optimizer_and_gradients_are_what_deepspeed_allocates(stage, dtype, process_group, tmp_path):
    before = storages()
    policy = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path, hidden_size=128), dtype=getattr(torch, dtype))
    config = run_config(model={"dtype": dtype}, learner={"deepspeed": {"zero_optimization": {"stage": stage}}})
    parts = parts_of(config, ModelSize.of(policy.config))
    lasting = parts["weights"] + parts["master weights"] + parts.get("reduction bucket", 0)
    enable_shared_prefix(policy)
    engine = DeepSpeedEngine(policy.train(), config.learner, dtype=dtype, num_updates=1)
    kept = parts["gradients"] if stage == 3 else 0  # a buffer from the start; elsewhere made by the backward pass
    # Flat buffers are padded, and buffers of the model and a few scalars lie beside.
    assert bytes_since(before) == pytest.approx(lasting + kept, rel=0.03)
    batch = SharedPrefixBatch.from_groups([([1, 2, 3], [[4, 5], [6, 7, 8]])])
    engine.backward(score_completions(engine.module, batch).logprobs.sum())
    assert bytes_since(before) == pytest.approx(lasting + parts["gradients"], rel=0.03)
    engine.step(0)
    assert bytes_since(before) == pytest.approx(lasting + kept + parts["Adam's moments"], rel=0.03)


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_a_forward_pass_saves(architecture, dtype, tmp_path):
    """A layer's share: the difference between a model with four layers and one with two, beside which the head goes."""
    batch = SharedPrefixBatch.from_groups([(list(range(200)), [list(range(i, i + 100)) for i in range(2)])])

    def saved(num_layers: int) -> int:
        path = tiny_model(
            tmp_path / str(num_layers), architecture, hidden_size=128, num_layers=num_layers, initializer_range=0.05
        )
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).train()
        enable_shared_prefix(model)
        return saved_bytes(lambda: score_completions(model, batch).logprobs, model.parameters())[1]

    per_token = (saved(4) - saved(2)) / 2 / 400
    size = ModelSize.of(AutoConfig.from_pretrained(tmp_path / "4"))
    assert activation_bytes(size, torch.finfo(getattr(torch, dtype)).bits // 8) == pytest.approx(per_token, rel=0.25)


def test_checkpointing_keeps_a_layers_input_instead_of_the_layer():
    size = ModelSize.of(QWEN3_8B)
    settings = {"model": {"dtype": "bfloat16"}, "learner": {"max_tokens": 1000}}
    plain = parts_of(run_config(**settings), size)["activations"]
    assert plain == 36 * 1000 * activation_bytes(size, 2)
    settings["model"]["gradient_checkpointing"] = True
    assert parts_of(run_config(**settings), size)["activations"] == 36 * 1000 * 4096 * 2 + plain / 36


def test_each_zero_stage_divides_one_thing_more():
    size = ModelSize.of(QWEN3_8B)
    p = size.num_parameters

    def parts(stage: int) -> dict[str, float]:
        learner = {"num_workers": 4, "deepspeed": {"zero_optimization": {"stage": stage}}}
        return parts_of(run_config(groups_per_step=4, model={"dtype": "bfloat16"}, learner=learner), size)

    for stage, weights, gradients in ((1, 2 * p, 2 * p), (2, 2 * p, p / 2), (3, p / 2, p / 2)):
        part = parts(stage)
        assert (part["weights"], part["gradients"]) == (weights, gradients)
        assert (part["master weights"], part["Adam's moments"]) == (p, 2 * p)
        assert part["whole model"] == 2 * p, "loaded before it is divided"
    assert parts(3)["gathered weights"] == 2e9


def test_a_reference_policy_counts_once_more_and_adapters_need_none():
    size = ModelSize.of(QWEN3_8B)
    lora = LoraConfig(rank=16)
    kl = {"model": {"dtype": "bfloat16"}, "algorithm": {"kl": {"coef": 0.1}}}
    assert parts_of(run_config(**kl), size)["reference policy"] == 2 * size.num_parameters
    adapted = ModelSize.of(QWEN3_8B, lora)
    config = run_config(**kl | {"model": {"dtype": "bfloat16", "lora": {"rank": 16}}})
    parts = parts_of(config, adapted)
    assert "reference policy" not in parts
    assert parts["Adam's moments"] == 8 * adapted.num_trained
    assert object_store_bytes(config, adapted) == 2 * 2 * adapted.num_trained < 2 * GIB


def test_what_generators_pull_lies_with_the_learner_and_not_in_the_object_store():
    size = ModelSize.of(QWEN3_8B)
    published = 2 * size.num_parameters
    settings = {"model": {"dtype": "bfloat16"}, "generator": {"weight_transfer": "direct"}}
    config = run_config(**settings)
    assert parts_of(config, size)["published weights"] == published
    assert "packed weights" not in parts_of(config, size) and object_store_bytes(config, size) == 0
    coming = parts_of(config, size, "generator")["weights that come in"]
    assert coming == 2 * 2 * QWEN3_8B.vocab_size * QWEN3_8B.hidden_size, "the embedding twice: larger than a bucket"
    evaluated = run_config(**settings, eval={"every": 1, "data": {"source": "held_out.jsonl"}})
    assert parts_of(evaluated, size)["published weights"] == 2 * published
    assert "published weights" not in parts_of(run_config(model={"dtype": "bfloat16"}), size)


def test_the_kv_cache_holds_the_groups_in_flight_with_their_prompts_once():
    size = ModelSize.of(QWEN3_8B)
    assert kv_bytes_per_token(size, 2) == 147_456
    config = run_config(
        groups_per_step=64, group_size=8, max_staleness=1, model={"dtype": "bfloat16"},
        generator={"num_actors": 8, "sampling": {"max_tokens": 1000}},
    )  # fmt: skip
    assert parts_of(config, size, "generator")["KV cache"] == 16 * (100 + 8 * 1000) * 147_456
    fewer = config.model_copy(update={"generator": config.generator.model_copy(update={"max_groups": 4})})
    assert parts_of(fewer, size, "generator")["KV cache"] == 4 * (100 + 8 * 1000) * 147_456


def test_what_exists_at_different_times_does_not_add_up():
    part = Part(name="a", num_bytes=10, why="")
    parts = [part] + [
        dataclasses.replace(part, num_bytes=size, when=when)
        for size, when in ((5, "in a pass"), (2, "in a step"), (12, "while loading"))
    ]
    assert peak(parts) == 15
    assert peak([*parts, dataclasses.replace(part, num_bytes=9, when="while loading")]) == 21


def test_a_role_that_does_not_fit_is_named_with_both_figures():
    size = ModelSize.of(QWEN3_8B)
    config = run_config(model={"dtype": "bfloat16"}, learner={"num_gpus": 1}, generator={"num_gpus": 1})
    needs = memory(config, size, 100)
    [sentence] = misfits(needs, gpu_bytes=80 * GIB, host_bytes=1000 * GIB)
    assert sentence.startswith("a learner needs about ") and sentence.endswith("of which it has 80.0 GiB")
    assert misfits(needs, gpu_bytes=400 * GIB, host_bytes=1000 * GIB) == []
    assert "host's memory, of which there are 1.0 GiB" in misfits(needs, gpu_bytes=400 * GIB, host_bytes=GIB)[0]


def test_what_a_process_may_fill_of_a_shared_gpu_is_what_it_is_measured_by():
    size = ModelSize.of(QWEN3_8B)

    def available(**settings: Any) -> list[str]:
        config = run_config(model={"dtype": "bfloat16"}, **settings)
        sentences = misfits(memory(config, size, 100), gpu_bytes=20 * GIB, host_bytes=1000 * GIB)
        return [sentence.rpartition("has ")[2] for sentence in sentences]

    assert available(learner={"num_gpus": 0.5}, generator={"num_gpus": 0.5}) == ["10.0 GiB", "9.2 GiB"]
    assert available(generator={"num_gpus": 1, "vllm": {"gpu_memory_utilization": 0.25}}) == ["5.0 GiB"]


def test_every_rank_of_an_engine_receives_the_whole_model():
    size = ModelSize.of(QWEN3_8B)

    def host(**generator: Any) -> float:
        return memory(run_config(model={"dtype": "bfloat16"}, generator=generator), size, 100)[1].host_peak

    two = {"num_gpus": 2, "vllm": {"tensor_parallel_size": 2}}
    ranks = 2 * PROCESS_BYTES
    assert host(**two) - host(num_gpus=1) == ranks + 2 * 2 * size.num_parameters
    assert host(**two, weight_transfer="direct") - host(num_gpus=1) == ranks


def test_a_process_without_a_gpu_holds_everything_in_the_hosts_memory():
    size = ModelSize.of(QWEN3_8B)
    learner = memory(run_config(), size, 100)[0]
    assert learner.host_peak == peak((*learner.device, *learner.host)) > learner.device_peak
