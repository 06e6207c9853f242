"""Real model shapes on one CUDA device: tokens per second, peak memory, the largest group that fits, and MFU.

Qwen3 shapes with random weights in bfloat16, gradient checkpointing on. Tokens are logical ones (every completion with
its prompt), the same for all methods, so that methods compare; MFU counts the operations a method really needs
(cost.py) against the device's dense bfloat16 peak.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from statistics import median

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from raygrpo.bench.forward_methods import METHODS
from raygrpo.bench.tables import table
from raygrpo.shared_prefix import enable_shared_prefix
from raygrpo.shared_prefix.cost import ModelShape, training_flops

SHAPES = {
    "Qwen3-0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "Qwen3-1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "Qwen3-4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
}
LENGTHS = [(1024, 1024, 8), (4096, 1024, 8), (8192, 512, 16)]  # prompt, completion, group size
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12}
_LARGEST_GROUP = 256


def run(*, quick: bool = False, device: str = "cuda", shapes: dict | None = None) -> list[dict]:
    """One row per shape, lengths and method, as plain data."""
    rows = []
    for name, shape in list((shapes or SHAPES).items())[: 1 if quick else None]:
        model = _model(shape, device)
        for prompt, completion, group_size in LENGTHS if device == "cuda" else [(24, 6, 4)]:
            for method in ("shared", "packed"):
                row = {"model": name, "prompt": prompt, "completion": completion, "group_size": group_size}
                rows.append(row | {"method": method} | _measure(model, method, prompt, completion, group_size))
                print(rows[-1], file=sys.stderr, flush=True)
        del model
        _free()
    return rows


def _model(shape: dict, device: str) -> PreTrainedModel:
    config = Qwen3Config(
        **{"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True, **shape}
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    enable_shared_prefix(model)
    return model


def _measure(model: PreTrainedModel, method: str, prompt: int, completion: int, group_size: int) -> dict:
    """Speed and memory at the given group size, and how large a group could be; None where even that does not fit."""
    seconds = []
    for _ in range(4):  # the first warms up
        result = _try(model, method, prompt, completion, group_size)
        if result is None:
            return dict.fromkeys(("tokens_per_second", "peak_bytes", "mfu", "largest_group"))
        seconds.append(result[0])
    shape = ModelShape.from_config(model.config)
    lengths = [(prompt, [completion] * group_size)]
    flops = training_flops(shape, lengths, shared=method == "shared", checkpointing=True)
    device_peak = _peak_flops(model.device)
    return {
        "tokens_per_second": group_size * (prompt + completion) / median(seconds[1:]),
        "peak_bytes": result[1],
        "mfu": None if device_peak is None else flops / median(seconds[1:]) / device_peak,
        "largest_group": _largest_group(model, method, prompt, completion, group_size),
    }


def _largest_group(model: PreTrainedModel, method: str, prompt: int, completion: int, fits: int) -> int:
    """By doubling, then bisection; at most 256."""
    limit = _LARGEST_GROUP if model.device.type == "cuda" else 8
    fails = None
    while fits < limit and fails is None:
        doubled = min(2 * fits, limit)
        if _try(model, method, prompt, completion, doubled) is None:
            fails = doubled
        else:
            fits = doubled
    while fails is not None and fails - fits > 1:
        middle = (fits + fails) // 2
        if _try(model, method, prompt, completion, middle) is None:
            fails = middle
        else:
            fits = middle
    return fits


def _try(
    model: PreTrainedModel, method: str, prompt: int, completion: int, group_size: int
) -> tuple[float, int] | None:
    """Seconds and peak bytes of a forward and backward; None if memory runs out."""
    cuda = model.device.type == "cuda"
    model.zero_grad(set_to_none=True)
    _free()
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (prompt + group_size * completion,)).tolist()
    members = [ids[prompt + i * completion :][:completion] for i in range(group_size)]
    try:
        forward = METHODS[method].prepare(model, [(ids[:prompt], members)])
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        (-forward().mean()).backward()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start, torch.cuda.max_memory_allocated() if cuda else 0
    except torch.cuda.OutOfMemoryError:
        return None


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _peak_flops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)


def ladder_table(rows: Sequence[dict]) -> str:
    header = ["model", "Lp", "Lr", "G", "method", "tokens/s", "peak GB", "MFU", "largest G"]
    cells = []
    for row in rows:
        fits = row["tokens_per_second"] is not None
        cells.append([
            row["model"], str(row["prompt"]), str(row["completion"]), str(row["group_size"]), row["method"],
            f"{row['tokens_per_second']:.0f}" if fits else "does not fit",
            f"{row['peak_bytes'] / 1e9:.1f}" if fits else "",
            "" if row["mfu"] is None else f"{row['mfu']:.2f}",
            str(row["largest_group"] or ""),
        ])  # fmt: skip
    return table(header, cells)
