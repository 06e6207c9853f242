"""What engines read from a model's directory, and the packages hidden before they do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raygrpo.engines.sampling import checkpoint_shapes, hide_broken_packages, stop_token_ids
from tests.tiny_models import tiny_model


def edit(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_stop_tokens_come_from_generation_config_then_model_then_tokenizer(tmp_path):
    path = tiny_model(tmp_path)
    edit(path / "generation_config.json", eos_token_id=[258, 256])
    edit(path / "config.json", eos_token_id=7)
    assert stop_token_ids(str(path), trust_remote_code=False) == [258, 256]
    edit(path / "generation_config.json", eos_token_id=None)
    assert stop_token_ids(str(path), trust_remote_code=False) == [7]
    (path / "generation_config.json").unlink()
    assert stop_token_ids(str(path), trust_remote_code=False) == [7]
    edit(path / "config.json", eos_token_id=None)
    assert stop_token_ids(str(path), trust_remote_code=False) == [258]
    edit(path / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ValueError, match="names no end-of-sequence token"):
        stop_token_ids(str(path), trust_remote_code=False)


@pytest.mark.parametrize("tie", [True, False])
def test_checkpoint_shapes_are_those_of_the_models_parameters(tmp_path, tie):
    path = tiny_model(tmp_path / "whole", tie=tie)
    model = AutoModelForCausalLM.from_pretrained(path)
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert checkpoint_shapes(str(path), tied_head=tie) == parameters
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert checkpoint_shapes(str(tmp_path / "sharded"), tied_head=tie) == parameters


def test_a_repeated_tied_head_and_rotary_frequencies_are_left_out(tmp_path):
    path = tiny_model(tmp_path)
    expected = checkpoint_shapes(str(path), tied_head=True)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert checkpoint_shapes(str(path), tied_head=True) == expected
    assert set(checkpoint_shapes(str(path), tied_head=False)) == {*expected, "lm_head.weight"}


def test_a_directory_without_safetensors_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no \.safetensors files"):
        checkpoint_shapes(str(tmp_path), tied_head=False)


@pytest.mark.parametrize(("version", "hidden"), [("0.28.0", True), ("0.28.0+cu128", True), ("0.28.0+cpu", False)])
def test_packages_built_for_cuda_are_hidden_from_a_cpu_torch(monkeypatch, version, hidden):
    if torch.version.cuda is not None:
        pytest.skip("torch was built for CUDA: nothing to hide")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    for name in ("torchvision", "torchaudio", "torchcodec"):
        monkeypatch.setitem(sys.modules, name, None)  # so that whatever happens here is undone
        del sys.modules[name]
    hide_broken_packages()
    for name in ("torchvision", "torchaudio", "torchcodec"):
        assert (name in sys.modules) == hidden
        if hidden:
            assert importlib.util.find_spec(name) is None
