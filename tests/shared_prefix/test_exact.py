"""Shared-prefix log-probabilities, entropies and all parameter gradients equal one forward per completion."""

import copy

import peft
import pytest
import torch

from raygrpo.shared_prefix import SharedPrefixBatch, completion_logprobs, enable_shared_prefix, score_completions
from tests.shared_prefix.tiny import (
    ARCHITECTURES,
    OTHER_ARCHITECTURES,
    VOCABULARY,
    float64_norms,
    gradients,
    largest_difference,
    ragged_groups,
    random_ids,
    reference,
    tiny_model,
    weighted,
)


def compare(model, groups, temperature=1.0, batch=None):
    """Largest absolute error of values and largest relative error of gradients against the reference."""
    batch = batch or SharedPrefixBatch.from_groups(groups)
    ours = score_completions(model, batch, temperature=temperature, entropy=True)
    ours_gradients = gradients(model, weighted(ours))
    expected = reference(model, groups, temperature)
    expected_gradients = gradients(model, weighted(expected))
    error = max((a - b).abs().max().item() for a, b in zip(ours, expected, strict=True))
    return error, largest_difference(ours_gradients, expected_gradients)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_one_forward_per_completion_to_1e_10_in_float64(architecture, checkpointing):
    model = tiny_model(architecture)
    if checkpointing:
        model.gradient_checkpointing_enable()
    enable_shared_prefix(model)
    with float64_norms(model):
        value_error, gradient_error = compare(model, ragged_groups(), temperature=0.7)
    assert value_error < 1e-10
    assert gradient_error < 1e-10


@pytest.mark.parametrize("architecture", OTHER_ARCHITECTURES)
def test_other_architectures_to_1e_10_in_float64(architecture):
    model = tiny_model(architecture)
    enable_shared_prefix(model)
    with float64_norms(model):
        value_error, gradient_error = compare(model, ragged_groups(8))
    assert value_error < 1e-10
    assert gradient_error < 1e-10


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_one_forward_per_completion_as_shipped(architecture):
    """Hugging Face computes norms and rotary embeddings in float32 even in a float64 model: 1e-6."""
    model = tiny_model(architecture)
    enable_shared_prefix(model)
    value_error, gradient_error = compare(model, ragged_groups(1))
    assert value_error < 1e-5
    assert gradient_error < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float32_gradients_are_within_1e_5_of_the_largest_entry(architecture):
    """Against the same model in float64: float32's own reference is no better than what it judges."""
    model = tiny_model(architecture, torch.float32, initializer_range=0.05)
    exact = tiny_model(architecture, torch.float64, initializer_range=0.05)
    exact.load_state_dict(model.state_dict())
    enable_shared_prefix(model)
    groups = ragged_groups(2)
    ours = score_completions(model, SharedPrefixBatch.from_groups(groups), entropy=True)
    assert ours.logprobs.dtype == torch.float32
    ours_gradients = {name: g.double() for name, g in gradients(model, weighted(ours)).items()}
    with float64_norms(exact):
        expected = reference(exact, groups)
        expected_gradients = gradients(exact, weighted(expected))
    assert (ours.logprobs - expected[0]).abs().max() < 1e-5
    assert largest_difference(ours_gradients, expected_gradients) < 1e-5


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_all_head_groupings_and_tied_heads(kv_heads, tied):
    model = tiny_model("llama", num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    enable_shared_prefix(model)
    with float64_norms(model):
        value_error, gradient_error = compare(model, ragged_groups(3))
    assert max(value_error, gradient_error) < 1e-10


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_adapters(checkpointing):
    base = tiny_model("qwen3")
    if checkpointing:
        base.gradient_checkpointing_enable()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).double()
    enable_shared_prefix(model)
    with float64_norms(base):
        value_error, gradient_error = compare(model, ragged_groups(4))
    assert value_error < 1e-10
    assert gradient_error < 1e-10
    with model.disable_adapter():  # the reference policy of LoRA training
        batch = SharedPrefixBatch.from_groups(ragged_groups(4))
        error = (completion_logprobs(model, batch) - reference(model, ragged_groups(4))[0]).abs().max()
    assert error < 1e-6


def test_adapters_may_come_after_enabling():
    base = tiny_model("qwen3")
    enable_shared_prefix(base)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).double()
    value_error, gradient_error = compare(model, ragged_groups(5))
    assert max(value_error, gradient_error) < 1e-5


def test_sliding_window_shorter_and_longer_than_everything():
    """Window 1 sees only itself; 5 cuts inside prefixes and completions; 150 is more than one block of queries."""
    g = torch.Generator().manual_seed(0)
    groups = [(random_ids(180, g), [random_ids(170, g), random_ids(3, g)]), (random_ids(2, g), [random_ids(4, g)] * 2)]
    for window in (1, 5, 150, 1000):
        model = tiny_model("mistral", sliding_window=window, max_position_embeddings=512)
        enable_shared_prefix(model)
        with float64_norms(model):
            value_error, gradient_error = compare(model, groups)
        assert max(value_error, gradient_error) < 1e-10, window


def test_half_precision_is_as_close_to_float64_as_the_ordinary_forward_is():
    groups = ragged_groups(6)
    exact_model = tiny_model("qwen3", torch.float64, initializer_range=0.05)
    exact = reference(exact_model, groups)[0]
    model = copy.deepcopy(exact_model).bfloat16()
    enable_shared_prefix(model)
    ours = completion_logprobs(model, SharedPrefixBatch.from_groups(groups))
    ordinary = reference(model, groups)[0]
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().mean() < 1.2 * (ordinary - exact).abs().mean() + 1e-4


def test_ordinary_forward_and_generate_are_unchanged():
    for architecture in ("qwen3", "mistral", "gemma3_text"):
        model = tiny_model(architecture).eval()
        ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [0, 0, 0, 4, 3, 9, 8, 7]])
        mask = (ids != 0).long()

        def run(model=model, ids=ids, mask=mask):
            logits = model(input_ids=ids, attention_mask=mask, labels=ids).logits
            return logits, model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)

        before, implementation = run(), model.config._attn_implementation
        enable_shared_prefix(model)
        completion_logprobs(model, SharedPrefixBatch.from_groups(ragged_groups()))
        after = run()
        assert model.config._attn_implementation == implementation
        assert torch.equal(before[0], after[0])
        assert torch.equal(before[1], after[1])


def test_a_copied_model_runs_its_own_weights():
    model = tiny_model()
    enable_shared_prefix(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(2.0)
    batch = SharedPrefixBatch.from_groups(ragged_groups())
    expected = reference(twin, ragged_groups())[0]
    assert (completion_logprobs(twin, batch) - expected).abs().max() < 1e-5
    assert (completion_logprobs(model, batch) - expected).abs().max() > 0.1


def test_a_vocabulary_resized_after_enabling():
    model = tiny_model()
    enable_shared_prefix(model)
    model.resize_token_embeddings(VOCABULARY + 7)
    value_error, gradient_error = compare(model, ragged_groups())
    assert max(value_error, gradient_error) < 1e-5


def test_state_dict_names_do_not_change():
    model = tiny_model()
    names = list(model.state_dict())
    enable_shared_prefix(model)
    assert list(model.state_dict()) == names


def test_temperature_scales_logits():
    model = tiny_model()
    enable_shared_prefix(model)
    batch = SharedPrefixBatch.from_groups(ragged_groups())
    cold, warm = completion_logprobs(model, batch, temperature=0.3), completion_logprobs(model, batch, 2.0)
    assert (cold - reference(model, ragged_groups(), 0.3)[0]).abs().max() < 1e-5
    assert (warm - reference(model, ragged_groups(), 2.0)[0]).abs().max() < 1e-5


def test_backward_twice_through_one_graph():
    model = tiny_model()
    enable_shared_prefix(model)
    scores = score_completions(model, SharedPrefixBatch.from_groups(ragged_groups()), entropy=True)
    loss = weighted(scores)
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters()}
    loss.backward()
    assert all(torch.allclose(p.grad, 2 * once[name], rtol=1e-12) for name, p in model.named_parameters())


def test_many_groups_whose_prompts_repeat_and_continue_each_other():
    """200 groups in one stream: prompts that are the beginning of others, equal ones, one token over and over."""
    g = torch.Generator().manual_seed(0)
    long = random_ids(12, g)
    groups = [(long[: 1 + i % 12], [random_ids(1 + i % 3, g) for _ in range(i % 4)]) for i in range(150)]
    groups += [([7] * (1 + i % 9), [[7] * (i % 5), [7] * 3]) for i in range(50)]
    model = tiny_model("qwen3")
    enable_shared_prefix(model)
    with float64_norms(model):
        for min_shared_head in (None, 1, 4):
            batch = SharedPrefixBatch.from_groups(groups, min_shared_head=min_shared_head)
            value_error, gradient_error = compare(model, groups, batch=batch)
            assert max(value_error, gradient_error) < 1e-10, min_shared_head


@pytest.mark.parametrize("temperature", [1e-2, 50.0])
def test_extreme_temperatures(temperature):
    model = tiny_model("cohere2")
    enable_shared_prefix(model)
    with float64_norms(model):
        value_error, gradient_error = compare(model, ragged_groups(9), temperature)
    assert value_error < 1e-10 / min(temperature, 1.0)
    assert gradient_error < 1e-9


def test_evaluation_without_gradients_and_training_agree():
    model = tiny_model("qwen3")
    enable_shared_prefix(model)
    batch = SharedPrefixBatch.from_groups(ragged_groups())
    training = completion_logprobs(model, batch)
    model.eval()
    with torch.no_grad():
        evaluation = completion_logprobs(model, batch)
    assert training.requires_grad and not evaluation.requires_grad
    assert torch.equal(training.detach(), evaluation)


def test_enabling_again_changes_the_backend_and_nothing_else():
    model = tiny_model("qwen3")
    enable_shared_prefix(model)
    batch = SharedPrefixBatch.from_groups(ragged_groups())
    before = completion_logprobs(model, batch)
    enable_shared_prefix(model, attention="dense")
    assert (completion_logprobs(model, batch) - before).abs().max() < 1e-12


@pytest.mark.parametrize("target", ["embed_tokens", "o_proj", "all-linear"])
def test_adapters_on_other_modules(target):
    base = tiny_model("qwen3")
    config = peft.LoraConfig(r=4, target_modules=target if "-" in target else [target], init_lora_weights=False)
    model = peft.get_peft_model(base, config).double()
    enable_shared_prefix(model)
    with float64_norms(base):
        value_error, gradient_error = compare(model, ragged_groups(4))
    assert max(value_error, gradient_error) < 1e-10


def test_autocast_is_as_close_to_float64_as_the_ordinary_forward_is():
    groups = ragged_groups(7)
    exact_model = tiny_model("qwen3", torch.float64, initializer_range=0.05)
    exact = reference(exact_model, groups)[0]
    exact_gradients = gradients(exact_model, exact.sum())
    model = copy.deepcopy(exact_model).float()
    enable_shared_prefix(model, self_check=False)
    errors = []
    for forward in (
        lambda: completion_logprobs(model, SharedPrefixBatch.from_groups(groups)),
        lambda: reference(model, groups)[0],
    ):
        with torch.autocast("cpu", torch.bfloat16):
            logprobs = forward()
        found = gradients(model, logprobs.sum())
        errors.append(((logprobs - exact).abs().mean().item(), largest_difference(found, exact_gradients)))
    assert errors[0][0] < 1.2 * errors[1][0] + 1e-3
    assert errors[0][1] < 1.5 * errors[1][1] + 1e-2
