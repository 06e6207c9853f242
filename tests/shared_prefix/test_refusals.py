"""What cannot be exact is refused, with the reason; what goes wrong at run time is noticed on the first micro-batch."""

import dataclasses

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from raygrpo.shared_prefix import (
    SelfCheckError,
    SharedPrefixBatch,
    UnsupportedModelError,
    accumulate_gradients,
    completion_logprobs,
    enable_shared_prefix,
)
from raygrpo.shared_prefix.layout import AttentionCall
from tests.shared_prefix.tiny import _BASE, ragged_groups, random_ids, tiny_model


def build(architecture, **options):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **{**_BASE, **options}))


@pytest.mark.parametrize(
    ("architecture", "options", "reason"),
    [
        ("qwen3_next", {}, "layers of type linear_attention"),
        ("falcon_h1", {}, "layers of type hybrid"),
        ("llama4_text", {}, "layers of type chunked_attention"),
        ("mamba", {}, "linear_attention"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of type conv"),
        ("recurrent_gemma", {}, "convolutions over the sequence"),
        ("bloom", {}, "does not call attention through transformers' AttentionInterface"),
        ("llama", {"attention_dropout": 0.1}, "config.attention_dropout is 0.1"),
        ("phimoe", {"num_local_experts": 4}, "config.router_jitter_noise is 0.01"),
        ("modernbert-decoder", {}, "does not say where its layers are"),
        ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2}, "config.resid_pdrop is 0.1"),
        ("qwen3_moe", {"output_router_logits": True, "num_experts": 4}, "output_router_logits"),
    ],
)
def test_enabling_refuses(architecture, options, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        enable_shared_prefix(build(architecture, **options))


def test_encoder_decoders_and_other_modules_are_refused():
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(UnsupportedModelError, match="is an encoder-decoder"):
        enable_shared_prefix(t5)
    with pytest.raises(UnsupportedModelError, match="Linear is not a transformers model"):
        enable_shared_prefix(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("architecture", "options", "reason"),
    [
        ("diffllama", {}, "2 calls to attention; it must be one"),
        ("nemotron", {}, "does not pass keyword arguments"),
        ("doge", {}, "makes its own masks"),
        ("gpt_oss", {"num_local_experts": 4, "sliding_window": 5}, "passes 's_aux' to attention"),
        (
            "phimoe",
            {"num_local_experts": 4, "router_jitter_noise": 0.0, "sliding_window": 5},
            "does not say whether config.sliding_window = 5 holds",
        ),
    ],
)
def test_the_first_pass_refuses(architecture, options, reason):
    model = build(architecture, **options)
    enable_shared_prefix(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        completion_logprobs(model, SharedPrefixBatch.from_groups(ragged_groups()))


def test_dropout_of_an_adapter_added_later_is_refused():
    base = tiny_model()
    enable_shared_prefix(base)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.1))
    with pytest.raises(UnsupportedModelError, match=r"lora_dropout.* p = 0.1"):
        completion_logprobs(model, SharedPrefixBatch.from_groups(ragged_groups()))


def test_reentrant_checkpoints_are_refused():
    model = tiny_model()
    enable_shared_prefix(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UnsupportedModelError, match="use_reentrant"):
        completion_logprobs(model, SharedPrefixBatch.from_groups(ragged_groups()))


def test_models_that_were_not_prepared_and_bad_temperatures():
    model, batch = tiny_model(), SharedPrefixBatch.from_groups(ragged_groups())
    with pytest.raises(ValueError, match="call enable_shared_prefix"):
        completion_logprobs(model, batch)
    enable_shared_prefix(model)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature is"):
            completion_logprobs(model, batch, temperature)
    with pytest.raises(ValueError, match="attention = 'fast' is not one of auto, "):
        enable_shared_prefix(model, "fast")


def test_rotary_frequencies_that_depend_on_the_longest_sequence():
    g = torch.Generator().manual_seed(0)
    short, long = (random_ids(5, g), [random_ids(9, g)] * 2), (random_ids(20, g), [random_ids(9, g)] * 2)
    split = (random_ids(14, g), [random_ids(1, g), random_ids(4, g)])
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, **factors}
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = build("phi3", rope_parameters=longrope, original_max_position_embeddings=16)
    enable_shared_prefix(model)
    for groups in ([short], [long]):
        completion_logprobs(model, SharedPrefixBatch.from_groups(groups))
    for groups in ([short, long], [split]):
        with pytest.raises(ValueError, match="on different sides in different batches"):
            completion_logprobs(model, SharedPrefixBatch.from_groups(groups))
    model = build("llama", rope_parameters=dynamic, max_position_embeddings=16)
    enable_shared_prefix(model)
    completion_logprobs(model, SharedPrefixBatch.from_groups([short]))
    with pytest.raises(ValueError, match="Keep them shorter"):
        completion_logprobs(model, SharedPrefixBatch.from_groups([long]))


def siblings():
    g = torch.Generator().manual_seed(0)
    return SharedPrefixBatch.from_groups([(random_ids(40, g), [random_ids(20, g) for _ in range(4)])])


def leaking(batch):
    """The last completion sees the one before it."""
    own = AttentionCall(0, (40, 20, 20, 40), 0, (40, 20, 20, 40))
    return dataclasses.replace(batch.plan, own=own)


def blind(batch):
    """Completions do not see the last token of their prompt."""
    call = batch.plan.above[0]
    return dataclasses.replace(batch.plan, above=(AttentionCall(call.q_start, call.q_lens, 0, (39,)),))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mistake", [leaking, blind])
@pytest.mark.parametrize("scale", [0.02, 0.1])
def test_a_wrong_mask_does_not_pass_the_self_check(dtype, mistake, scale):
    """The kernels are given wrong calls, while segments and parents are right. Small weights make it hard to see."""
    model = tiny_model("qwen3", dtype, initializer_range=scale)
    enable_shared_prefix(model)
    batch = siblings()
    right = batch.plan
    wrong = mistake(batch)
    for name in ("starts", "parents", "offsets"):  # what segments are, by which the check goes
        vars(wrong)[name] = getattr(right, name)
    vars(wrong)["key_rows"] = right.key_rows
    with pytest.raises(SelfCheckError):
        completion_logprobs(model, dataclasses.replace(batch, plan=wrong))
    completion_logprobs(model, batch)  # the check is still pending, and passes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_positions_that_are_off_do_not_pass_the_self_check(dtype):
    model = tiny_model("qwen3", dtype)
    enable_shared_prefix(model)
    batch = siblings()
    off = dataclasses.replace(batch, position_ids=torch.arange(batch.num_tokens))
    with pytest.raises(SelfCheckError, match="log-probabilities of completion"):
        completion_logprobs(model, off)


def test_the_self_check_can_be_left_out_and_runs_once():
    batch = siblings()
    off = dataclasses.replace(batch, position_ids=torch.arange(batch.num_tokens))
    model = tiny_model()
    enable_shared_prefix(model, self_check=False)
    completion_logprobs(model, off)
    enable_shared_prefix(model)
    completion_logprobs(model, batch)
    completion_logprobs(model, off)  # only the first micro-batch is checked


def test_padding_on_every_rank_leaves_the_self_check_to_the_first_real_micro_batch():
    model, batch = tiny_model(), siblings()
    enable_shared_prefix(model)
    accumulate_gradients(model, [], lambda logprobs, part: logprobs.sum(), 100, at_least_one=True)
    with pytest.raises(SelfCheckError):
        completion_logprobs(model, dataclasses.replace(batch, position_ids=torch.arange(batch.num_tokens)))


def test_the_self_check_keeps_few_logits_of_a_long_completion(monkeypatch):
    """And at a low temperature it tolerates what that makes of rounding."""
    model = tiny_model("qwen3", torch.bfloat16, initializer_range=0.05)
    enable_shared_prefix(model)
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, out: shapes.append(inputs[0].shape[-2]))
    monkeypatch.setattr("raygrpo.shared_prefix.self_check._NUM_TOKENS", 8)
    completion_logprobs(model, SharedPrefixBatch.from_groups([([1, 2], [[5] * 40, [6] * 3])]), temperature=0.1)
    assert sorted(shapes[1:]) == [1, 1, 3, 8], "one call for each of four completions, padded"


def test_the_self_check_takes_a_model_that_makes_all_logits(monkeypatch):
    model = tiny_model("qwen3", torch.float64, initializer_range=0.05)
    of_class = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda *args, logits_to_keep=0, **kwargs: of_class(*args, **kwargs))
    enable_shared_prefix(model)
    completion_logprobs(model, SharedPrefixBatch.from_groups(ragged_groups()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["qwen3", "mistral", "gemma2", "qwen3_moe"])
def test_half_precision_passes_its_own_self_check(dtype, architecture):
    for seed in range(3):
        model = tiny_model(architecture, dtype, seed=seed, initializer_range=0.05)
        enable_shared_prefix(model)
        completion_logprobs(model, SharedPrefixBatch.from_groups(ragged_groups(seed)))


def test_head_counts_that_do_not_divide():
    model = tiny_model("qwen3", num_key_value_heads=8)
    enable_shared_prefix(model)
    with pytest.raises(UnsupportedModelError, match="4 query heads for 8 key heads"):
        completion_logprobs(model, SharedPrefixBatch.from_groups(ragged_groups()))


def test_adapters_on_the_head_and_virtual_tokens():
    base = tiny_model()
    enable_shared_prefix(base)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(UnsupportedModelError, match="leave adapters off it"):
        completion_logprobs(model, SharedPrefixBatch.from_groups(ragged_groups()))
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(UnsupportedModelError, match="virtual tokens"):
        enable_shared_prefix(peft.get_peft_model(tiny_model(), config))
