"""Adapters: what is merged for the generators is the model that the learner trains."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from raygrpo.config import LoraConfig, ModelConfig
from raygrpo.engines.sampling import checkpoint_tensors
from raygrpo.lora import AdapterMerger, add_adapters, merge, split_adapters
from tests.tiny_models import tiny_model

IDS = torch.tensor([[5, 9, 200, 31, 77, 4]])


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def adapted(path: Path, **settings) -> peft.PeftModel:
    """With adapters that do something."""
    model = add_adapters(AutoModelForCausalLM.from_pretrained(path), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.1, generator=generator)
    return model


def trained(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "down_proj"]])
def test_merged_weights_are_those_that_peft_merges_and_compute_the_same(path, target_modules):
    model = adapted(path, rank=3, alpha=7.0, target_modules=target_modules)
    settings = ModelConfig(path=str(path), lora=LoraConfig(rank=3, alpha=7.0, target_modules=target_modules))
    merged = AdapterMerger(settings)(trained(model))
    plain = AutoModelForCausalLM.from_pretrained(path)
    before = plain(IDS).logits
    plain.load_state_dict(merged, strict=False)
    with torch.no_grad():
        logits, expected = plain(IDS).logits, model(IDS).logits
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (logits - before).abs().max() > 0.1, "the adapters do something"
    by_peft = model.merge_and_unload().state_dict()
    changed = [name for name, tensor in checkpoint_tensors(str(path)).items() if not torch.equal(tensor, merged[name])]
    assert changed and all("proj" in name for name in changed)
    assert len(changed) == len(trained(adapted(path, rank=3, target_modules=target_modules))) // 2
    for name in changed:
        torch.testing.assert_close(merged[name], by_peft[name], atol=1e-6, rtol=1e-6)


def test_only_adapters_are_trained_and_they_are_small(path):
    model = adapted(path, rank=2)
    names = trained(model).keys()
    assert all("lora_" in name for name in names)
    assert sum(t.numel() for t in trained(model).values()) < 0.2 * sum(p.numel() for p in model.parameters())


def test_a_model_with_adapters_is_taken_apart_again(path):
    model = adapted(path, rank=2)
    frozen, adapters = split_adapters((name, p.detach()) for name, p in model.named_parameters())
    base = checkpoint_tensors(str(path))
    assert frozen.keys() == base.keys()
    assert all(torch.equal(frozen[name], base[name]) for name in base)
    assert adapters.keys() == trained(model).keys()


def test_adapters_of_other_models_are_refused(path):
    base = checkpoint_tensors(str(path))
    adapters = trained(adapted(path, rank=2))
    name = next(iter(adapters))
    with pytest.raises(ValueError, match="no adapter of a weight of the model"):
        merge(base, adapters | {name.replace("layers.0", "layers.9"): adapters[name]}, 1.0, "float32")
    with pytest.raises(ValueError, match="lacks a matrix"):
        merge(base, {name: adapters[name]}, 1.0, "float32")
    wide = {key: torch.cat([tensor, tensor], dim=1) if "lora_A" in key else tensor for key, tensor in adapters.items()}
    with pytest.raises(ValueError, match="has shape"):
        merge(base, wide, 1.0, "float32")


def test_frozen_weights_are_rounded_as_the_learner_rounds_them(path):
    """A float32 checkpoint trained in bfloat16: the generator must not add the adapters to more digits."""
    base = checkpoint_tensors(str(path))
    model = adapted(path, rank=2)
    merged = merge(base, trained(model), model.peft_config["default"].lora_alpha / 2, "bfloat16")
    name = next(name for name in merged if "q_proj" in name)
    lora = dict(model.named_parameters())
    prefix = f"base_model.model.{name.removesuffix('.weight')}"
    delta = 16.0 * lora[f"{prefix}.lora_B.default.weight"] @ lora[f"{prefix}.lora_A.default.weight"]
    expected = (base[name].bfloat16().float() + delta).bfloat16()
    assert merged[name].dtype == torch.bfloat16 and torch.equal(merged[name], expected.detach())
