"""What a publish costs, from packing on the learner's side to the last generator's acknowledgement.

A model of random weights, of the size that is asked for, in real generators (vLLM's engine) behind the real controller.
Every round changes all weights in place, as an update does, publishes them as the learner does, and then compares the
generators' log-probabilities with the model's own: bytes that did not arrive would show there.

    pack     one pass over the tensors, with their digests (direct: with a copy)
    put      a copy into Ray's object store (direct: of the index only)
    ack      until every generator has verified and loaded them; load: of that, the slowest generator's own time
    CPU      seconds of all processes meanwhile: on a busy machine they say more than the clock
"""

from __future__ import annotations

import json as json_format
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raygrpo.bench.pipeline_roles import embedded_ray, prompt_set, start_actor
from raygrpo.bench.processes import cpu_seconds
from raygrpo.bench.tables import table
from raygrpo.config import GeneratorConfig, ModelConfig, SamplingConfig
from raygrpo.direct_transfer import WeightsServer
from raygrpo.roles.controller import RolloutController
from raygrpo.roles.generator import Generator

if TYPE_CHECKING:
    from torch import nn

Dtype = Literal["float32", "bfloat16"]
WeightTransfer = Literal["object_store", "direct"]

MARK_GB_PER_S = 0.7  # of a model of 500 MB, on one machine
MAX_LOGPROB_DIFF = {"float32": 1e-3, "bfloat16": 0.1}  # mean over a completion's tokens
HIDDEN, HEADS, VOCABULARY = 768, 12, 32_000  # of the model; its depth follows from its size
CHANGE = 0.3  # of every weight in a round, up and down in turn: what a lost publish would show is far above the limits
PROMPT, COMPLETION = list(range(100, 140)), list(range(200, 216))
KV_CACHE_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class PublishCost:
    """Of one round, seconds."""

    num_bytes: int
    pack_s: float
    put_s: float
    ack_s: float
    load_s: float
    cpu_s: float  # of this process and all below it
    logprob_diff: float  # mean over the tokens of COMPLETION, of the generator that is furthest away

    @property
    def total_s(self) -> float:
        return self.pack_s + self.put_s + self.ack_s

    @property
    def gb_per_s(self) -> float:
        return self.num_bytes / 1e9 / self.total_s


def main(
    json: bool = False,
    megabytes: int = 500,
    dtype: Dtype = "float32",
    num_generators: int = 1,
    rounds: int = 5,
    weight_transfer: WeightTransfer = "object_store",
) -> None:
    """Print the table, or one JSON document. Raises RuntimeError when a generator does not hold what was published."""
    with tempfile.TemporaryDirectory() as directory:
        costs = run(
            Path(directory),
            megabytes=megabytes,
            dtype=dtype,
            num_generators=num_generators,
            rounds=rounds,
            weight_transfer=weight_transfer,
        )
    if json:
        rows = [asdict(cost) | {"total_s": cost.total_s, "gb_per_s": cost.gb_per_s} for cost in costs]
        print(json_format.dumps(rows, indent=1))
        return
    print(_table(costs))
    best = max(costs, key=lambda cost: cost.gb_per_s)
    size = f"{best.num_bytes / 1e6:.0f} MB in {dtype}, {num_generators} generator" + "s" * (num_generators > 1)
    print(f"\n{best.gb_per_s:.2f} GB/s at best: {size} (mark: {MARK_GB_PER_S} for 500 MB)")


def run(
    directory: Path,
    *,
    megabytes: int,
    dtype: Dtype,
    num_generators: int = 1,
    rounds: int,
    weight_transfer: WeightTransfer = "object_store",
    hidden: int = HIDDEN,
    vocabulary: int = VOCABULARY,
) -> list[PublishCost]:
    """One cost a round. The first rounds also pay for memory that nobody had touched before."""
    import ray
    import torch
    from ray.util import get_node_ip_address

    model = random_model(directory, megabytes=megabytes, dtype=dtype, hidden=hidden, vocabulary=vocabulary)
    settings = GeneratorConfig(
        num_actors=num_generators,
        num_gpus=1 / num_generators if torch.cuda.is_available() else 0.0,  # all of them on the first GPU
        sampling=SamplingConfig(max_tokens=1),
        vllm={"kv_cache_memory_bytes": KV_CACHE_BYTES},
    )
    with embedded_ray():
        generators = {
            f"generator-{index}": start_actor(
                Generator,
                f"generator-{index}",
                ModelConfig(path=str(directory), dtype=dtype),
                settings,
                max_model_len=len(PROMPT) + len(COMPLETION) + 1,
                max_concurrency=100,
            )
            for index in range(num_generators)
        }
        controller = start_actor(
            RolloutController,
            prompt_set(),
            generators,
            max_concurrency=100,
            seed=0,
            groups_per_step=1,
            group_size=1,
            max_staleness=0,
            settings=settings,
        )
        ray.get(controller.begin_attempt.remote(0))
        ray.get([generator.status.remote() for generator in generators.values()])  # their engines have started
        server = WeightsServer(get_node_ip_address()) if weight_transfer == "direct" else None
        try:
            return [
                _publish(model, controller, list(generators.values()), version, server)
                for version in range(1, rounds + 1)
            ]
        finally:
            if server is not None:
                server.close()
            for actor in (controller, *generators.values()):
                ray.kill(actor)


def _publish(
    model: nn.Module, controller: Any, generators: list[Any], version: int, server: WeightsServer | None
) -> PublishCost:
    """server: for direct transfers."""
    import ray
    import torch

    from raygrpo.weights import pack

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + CHANGE * (-1) ** version)
    before_s = _cpu_s()
    start_s = time.perf_counter()
    tensors = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    packed = pack(tensors, copy=False) if server is None else server.publish(version, tensors)
    packed_s = time.perf_counter()
    weights = ray.put(packed)
    put_s = time.perf_counter()
    report: Any = ray.get(controller.publish.remote(version, [weights]))
    end_s = time.perf_counter()
    cpu_s = _cpu_s() - before_s
    if report.failed or report.num_bytes != packed.num_bytes:
        raise RuntimeError(f"the publish failed: {report}")
    expected = _logprobs(model)
    answers: Any = ray.get([generator.completion_logprobs.remote(PROMPT, COMPLETION) for generator in generators])
    difference = max((torch.tensor(answer) - expected).abs().mean().item() for answer in answers)
    if not difference <= MAX_LOGPROB_DIFF[str(next(model.parameters()).dtype).removeprefix("torch.")]:
        raise RuntimeError(f"a generator's log-probabilities differ by {difference:.3g} from those of what it was sent")
    return PublishCost(
        num_bytes=packed.num_bytes,
        pack_s=packed_s - start_s,
        put_s=put_s - packed_s,
        ack_s=end_s - put_s,
        load_s=report.load_s,
        cpu_s=cpu_s,
        logprob_diff=difference,
    )


def _cpu_s() -> float:
    return sum(seconds for _, seconds in cpu_seconds().values())


def _logprobs(model: Any) -> Any:
    """[C]: of COMPLETION after PROMPT."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + COMPLETION])).logits[0, len(PROMPT) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(COMPLETION)[:, None])[:, 0]


def random_model(directory: Path, *, megabytes: int, dtype: Dtype, hidden: int, vocabulary: int) -> Any:
    """A Qwen3 with tied head, of at least one layer and about this size, saved with a tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    from raygrpo.engines.sampling import hide_broken_packages

    hide_broken_packages()
    shape: dict[str, Any] = dict(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.05,
    )
    per_layer = 4 * hidden * HEADS * 64 + 9 * hidden * hidden
    num_parameters = megabytes * 1_000_000 // getattr(torch, dtype).itemsize
    num_layers = max(1, round((num_parameters - vocabulary * hidden) / per_layer))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        Qwen3Config(num_hidden_layers=num_layers, **shape), dtype=getattr(torch, dtype)
    ).eval()
    model.save_pretrained(directory)
    _tokenizer(vocabulary).save_pretrained(directory)
    return model


def _tokenizer(vocabulary: int) -> Any:
    """Every id has a name; nothing is encoded with it here."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(vocabulary)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0")


def _table(costs: list[PublishCost]) -> str:
    rows = [
        (
            str(index + 1),
            f"{cost.num_bytes / 1e6:.0f}",
            f"{cost.pack_s:.3f}",
            f"{cost.put_s:.3f}",
            f"{cost.ack_s:.3f}",
            f"{cost.load_s:.3f}",
            f"{cost.cpu_s:.2f}",
            f"{cost.gb_per_s:.2f}",
            f"{cost.logprob_diff:.1e}",
        )
        for index, cost in enumerate(costs)
    ]
    return table(["round", "MB", "pack s", "put s", "ack s", "load s", "CPU s", "GB/s", "logprob diff"], rows)
