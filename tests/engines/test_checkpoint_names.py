"""What a model's parameters are in its checkpoint, for every kind of conversion that transformers makes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from raygrpo.engines.checkpoint_names import CheckpointNames
from tests.tiny_models import tiny_model

EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe", "mixtral"])
def test_parameters_one_by_one_are_the_checkpoint(architecture, tmp_path):
    tiny_model(tmp_path, architecture, tie=False, **(EXPERTS if architecture != "qwen3" else {}))
    checkpoint = load_file(tmp_path / "model.safetensors")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    names, found = CheckpointNames(model), {}
    for name, parameter in model.named_parameters():
        parts = {key: part.clone() for key, part in names(name, parameter.detach()).items()}
        views = names.views(name, parameter.data)
        assert views.keys() == parts.keys() and all(torch.equal(views[key], parts[key]) for key in parts)
        found |= parts
        for view in views.values():
            view.fill_(2.0)
        assert (parameter == 2.0).all(), "what is written to the views reaches the whole parameter"
    assert found.keys() == checkpoint.keys()
    assert all(torch.equal(found[name], checkpoint[name]) for name in found)


def test_a_tensor_that_is_several_parameters_is_refused():
    model = nn.Linear(2, 2)
    conversion = SimpleNamespace(source_patterns=["qkv"], target_patterns=["q", "k", "v"])
    vars(model)["_weight_conversions"] = [conversion]
    with pytest.raises(ValueError, match=r"Linear makes several parameters \(q, k, v\) of one .* \(qkv\)"):
        CheckpointNames(model)


def test_a_part_in_another_order_cannot_be_written_in_place(monkeypatch):
    model = nn.Linear(2, 3, bias=False)
    vars(model)["_weight_conversions"] = [SimpleNamespace(source_patterns=["t"], target_patterns=["weight"])]
    monkeypatch.setattr(CheckpointNames, "__call__", lambda _, name, parameter: {"t": parameter.T})
    with pytest.raises(ValueError, match="weight holds t of the checkpoint in another order"):
        CheckpointNames(model).views("weight", model.weight.data)
