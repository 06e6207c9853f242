"""The last layer runs the rows that are read, and everything stays as it was."""

import pytest
import torch

from raygrpo.shared_prefix import (
    SharedPrefixBatch,
    UnsupportedModelError,
    accumulate_gradients,
    completion_logprobs,
    enable_shared_prefix,
    last_layer,
)
from tests.shared_prefix.test_exact import compare
from tests.shared_prefix.tiny import float64_norms, ragged_groups, random_ids, tiny_model


def rows_by_module(model):
    """Rows that each layer's query projection and MLP are called with, in order, by (layer, module)."""
    rows = {}
    for index, layer in enumerate(model.model.layers):
        for name, module in (("q_proj", layer.self_attn.q_proj), ("mlp", layer.mlp)):
            counts = rows[index, name] = []
            module.register_forward_pre_hook(lambda _, args, counts=counts: counts.append(args[0].shape[1]))
    return rows


def groups_of(*lengths):
    g = torch.Generator().manual_seed(0)
    return [(random_ids(p, g), [random_ids(n, g) for n in completions]) for p, completions in lengths]


def test_a_prompt_runs_one_row_of_the_last_mlp():
    model = tiny_model("qwen3")
    enable_shared_prefix(model, self_check=False)
    rows = rows_by_module(model)
    groups = groups_of((20, (4, 6)), (30, (5, 5, 5)))
    compare(model, groups, batch=SharedPrefixBatch.from_groups(groups))
    assert rows[0, "mlp"][0] == rows[0, "q_proj"][0] == 75
    assert rows[1, "mlp"][0] == 2 + 25
    assert rows[1, "q_proj"][:2] == [19 + 29, 2 + 25]


def test_a_lone_completion_runs_as_a_packed_sequence(monkeypatch):
    monkeypatch.setattr(last_layer, "_ranks_call_alike", lambda: False)  # other tests leave a process group behind
    model = tiny_model("qwen3")
    enable_shared_prefix(model, self_check=False)
    rows = rows_by_module(model)
    groups = groups_of((20, (4,)), (3, (5,)))
    compare(model, groups)
    assert rows[1, "mlp"][0] == rows[1, "q_proj"][0] == 32


def test_a_prompt_that_is_encoded_ahead_runs_one_row_too():
    model = tiny_model("qwen3")
    enable_shared_prefix(model, self_check=False)
    rows = rows_by_module(model)
    accumulate_gradients(model, groups_of((20, (4, 6))), lambda logprobs, part: logprobs.sum(), 26)
    assert rows[0, "mlp"] == [20, 6, 4]
    assert rows[1, "mlp"] == [1, 6, 4]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["qwen3", "mistral", "gemma2", "cohere2"])
def test_ranks_call_every_module_alike_whatever_they_hold(architecture, checkpointing, monkeypatch):
    """Where others may gather parameters in step, also a stream that has no unread row makes both calls."""
    monkeypatch.setattr(last_layer, "_ranks_call_alike", lambda: True)
    calls = []
    for groups in (groups_of((9, (4,)), (3, (5,))), ragged_groups(3)):
        model = tiny_model(architecture)
        if checkpointing:
            model.gradient_checkpointing_enable()
        enable_shared_prefix(model, self_check=False)
        with float64_norms(model):
            value_error, gradient_error = compare(model, groups)
        assert max(value_error, gradient_error) < 1e-10
        rows = rows_by_module(model)
        accumulate_gradients(model, groups, lambda logprobs, part: logprobs.sum(), 1000)
        calls.append({name: len(counts) for name, counts in rows.items()})
    assert calls[0] == calls[1]


def test_a_layer_that_someone_else_has_changed_runs_on_all_rows():
    model = tiny_model("qwen3")
    layer = model.model.layers[-1]
    ordinary = layer.forward
    layer.forward = lambda *args, **kwargs: ordinary(*args, **kwargs)
    enable_shared_prefix(model)
    rows = rows_by_module(model)
    with float64_norms(model):
        value_error, gradient_error = compare(model, ragged_groups())
    assert max(value_error, gradient_error) < 1e-10
    assert rows[1, "mlp"][0] == rows[0, "mlp"][0]


def test_a_layer_that_is_used_twice_runs_on_all_rows():
    model = tiny_model("qwen3")
    model.model.layers[0] = model.model.layers[1]
    enable_shared_prefix(model, self_check=False)
    with float64_norms(model):
        value_error, gradient_error = compare(model, ragged_groups())
    assert max(value_error, gradient_error) < 1e-10


def test_a_model_that_loops_over_its_layers_is_refused():
    model = tiny_model("qwen3")
    layers = model.model.layers
    layers[0].register_forward_hook(
        lambda _, args, kwargs, out: layers[1](out, **kwargs), with_kwargs=True
    )  # the last layer runs twice
    enable_shared_prefix(model)
    with pytest.raises(UnsupportedModelError, match="called more than once"):
        completion_logprobs(model, SharedPrefixBatch.from_groups(ragged_groups()))


def test_a_layer_that_is_given_other_tensors_runs_on_all_rows():
    """They might hold something for each row."""
    model = tiny_model("qwen3")
    layer = model.model.layers[-1]
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "extra": (torch.zeros(3),)}), with_kwargs=True
    )
    enable_shared_prefix(model, self_check=False)
    rows = rows_by_module(model)
    compare(model, ragged_groups())
    assert rows[1, "mlp"][0] == rows[0, "mlp"][0]
