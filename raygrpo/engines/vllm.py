"""vLLM as a sampling engine, inside the process of its generator.

The only file that imports vllm. It owns how vLLM is started (settings that the exactness of behaviour log-probabilities
and of weight updates depends on), how requests are phrased, and how weights are replaced. `generator.vllm` adds any
option of vLLM's; the few that correctness depends on are refused there.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import secrets
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raygrpo.config import GeneratorConfig, ModelConfig, SamplingConfig
from raygrpo.engines.sampling import (
    EngineDeadError,
    WeightsOffer,
    WeightsReceiver,
    check_request,
    check_score,
    check_weights,
    checkpoint_shapes,
    stop_token_ids,
)
from raygrpo.types import Rollout, TransferError

if TYPE_CHECKING:
    from torch import Tensor

# Read by vLLM and torch when they are imported.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}  # the engine's core runs in this process
CPU_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several processes share the cores
    "TORCH_COMPILE_DISABLE": "1",  # start in seconds, not minutes
}
OWN_OPTIONS = {  # vLLM option -> where it is set instead, or why it is fixed
    "model": "model.path",
    "tokenizer": "model.path",
    "dtype": "model.dtype",
    "trust_remote_code": "model.trust_remote_code",
    "logprobs_mode": "always processed_logprobs: of the distribution that was sampled from",
    "worker_extension_cls": "raygrpo's own, which loads published weights",
    "quantization": "published weights are not quantised",
    "enable_lora": "model.lora; adapters are merged into the weights",
    "data_parallel_size": "generator.num_actors",
    "pipeline_parallel_size": "not supported; use tensor_parallel_size",
}
TIED_HEAD = "lm_head.weight"  # what a head is called that shares the embedding's weight
CPU_KV_CACHE_BYTES = (
    2**30
)  # unless generator.vllm.kv_cache_memory_bytes says otherwise; touched only as far as it is used


class VllmEngine:
    """See `SamplingEngine`."""

    def __init__(self, model: ModelConfig, generator: GeneratorConfig, *, max_model_len: int, num_threads: int):
        refused = [f"{name} ({OWN_OPTIONS[name]})" for name in generator.vllm if name in OWN_OPTIONS]
        if refused:
            raise ValueError(f"generator.vllm cannot set {', '.join(refused)}")
        import torch

        on_cpu = runs_on_cpu(generator, is_for_cpus=_is_for_cpus(), sees_gpu=torch.cuda.is_available())
        _prepare_environment(on_cpu=on_cpu)

        if on_cpu:
            torch.set_num_threads(num_threads)  # of this thread; vLLM makes later calls do nothing
            torch._dynamo.config.disable = (
                True  # as TORCH_COMPILE_DISABLE, which comes too late where transformers was imported
            )
        from transformers import AutoTokenizer
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        options = engine_options(model, generator, max_model_len=max_model_len, on_cpu=on_cpu)
        if on_cpu:
            _register_architecture(model)
        self._engine = LLMEngine.from_engine_args(EngineArgs(**options))
        self._tokenizer = AutoTokenizer.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
        self._sampling = generator.sampling
        self._max_model_len = self._engine.model_config.max_model_len
        self._vocab_size = self._engine.model_config.get_vocab_size()
        tied = getattr(self._engine.model_config.hf_text_config, "tie_word_embeddings", False)
        self._tied_head = bool(tied)
        self._shapes = checkpoint_shapes(model.path, tied_head=self._tied_head)
        self._stop_token_ids = stop_token_ids(model.path, trust_remote_code=model.trust_remote_code)
        self._groups: dict[str, list[str]] = {}  # group id -> vLLM's request ids, unfinished ones only
        self._samples: dict[str, tuple[str, int]] = {}  # request id -> (group id, index)
        self._finished: list[Any] = []  # by a step that `score` made
        self._num_scores = 0
        self.num_cached_tokens = 0

    @property
    def num_unfinished(self) -> int:
        return len(self._samples)

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    def add_group(
        self, group_id: str, prompt_ids: list[int], seeds: Sequence[int], sampling: SamplingConfig | None = None
    ) -> None:
        """One request per sample, each with its own seed: with vLLM's `n`, neighbouring seeds share all samples but
        one.
        """
        if group_id in self._groups:
            raise ValueError(f"group {group_id!r} is being sampled already")
        sampling = sampling or self._sampling
        check_request(prompt_ids, seeds, sampling, max_model_len=self._max_model_len, vocab_size=self._vocab_size)
        self._groups[group_id] = []
        for index, seed in enumerate(seeds):
            request_id = f"{group_id}/{index}"
            self._add(request_id, prompt_ids, self._params(sampling, seed))
            self._groups[group_id].append(request_id)
            self._samples[request_id] = (group_id, index)

    def step(self) -> list[tuple[str, int, Rollout]]:
        outputs, self._finished = self._finished, []
        if self._engine.has_unfinished_requests():
            outputs += self._step()
        finished = []
        for output in outputs:
            if output.request_id not in self._samples:  # aborted meanwhile
                continue
            group_id, index = self._samples.pop(output.request_id)
            self._groups[group_id].remove(output.request_id)
            self.num_cached_tokens += output.num_cached_tokens or 0
            if not self._groups[group_id]:
                del self._groups[group_id]
            finished.append((group_id, index, self._rollout(output)))
        if self._samples and not self._finished and not self._engine.has_unfinished_requests():
            raise EngineDeadError(
                f"vLLM lost the requests {', '.join(list(self._samples)[:3])}: it has none unfinished"
            )
        return finished

    def abort_group(self, group_id: str) -> None:
        request_ids = self._groups.pop(group_id, [])
        for request_id in request_ids:
            del self._samples[request_id]
        self._engine.abort_request(request_ids)

    def score(self, prompt_ids: list[int], completion_ids: list[int]) -> list[float]:
        from vllm import SamplingParams

        check_score(prompt_ids, completion_ids, max_model_len=self._max_model_len)
        ids = prompt_ids + completion_ids
        self._num_scores += 1
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        request_id = f"score-{self._num_scores}"
        self._add(request_id, ids, params)
        while True:
            outputs = self._step()
            self._finished += [output for output in outputs if output.request_id != request_id]
            for output in outputs:
                if output.request_id == request_id:
                    rows = output.prompt_logprobs[len(prompt_ids) :]
                    return [row[token].logprob for row, token in zip(rows, completion_ids, strict=True)]

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        self._check_idle()
        if self._tied_head:
            tensors = {name: tensor for name, tensor in tensors.items() if name != TIED_HEAD}
        check_weights(self._shapes, tensors)
        self._replace_weights("load_published_weights", list(tensors.items()))

    def pull_weights(self, offer: WeightsOffer) -> None:
        """Every rank of the engine receives every tensor, in the process in which it lives, and loads its share."""
        self._check_idle()
        skipped = (TIED_HEAD,) if self._tied_head else ()
        check_weights(self._shapes, {entry.name: entry for entry in offer.index if entry.name not in skipped})
        size = 1 + self._engine.vllm_config.parallel_config.tensor_parallel_size
        failures = self._engine.collective_rpc("begin_pull", args=(offer, secrets.token_hex(8), size))
        if failure := next((failure for failure in failures if failure is not None), None):
            self._engine.collective_rpc("end_pull")
            raise failure
        self._replace_weights("load_pulled_weights", skipped)

    def _check_idle(self) -> None:
        if self.num_unfinished:
            raise RuntimeError(f"{self.num_unfinished} completions are unfinished: weights change between groups only")

    def _replace_weights(self, method: str, argument: Any) -> None:
        """By a method of WeightsExtension."""
        try:
            self._engine.collective_rpc(method, args=(argument,))
        except Exception as error:  # vLLM leaves a half-loaded model without storage behind
            raise EngineDeadError(
                f"vLLM failed while it loaded new weights: {type(error).__name__}: {error}"
            ) from error
        self.reset_prefix_cache()  # vLLM keeps the old weights' keys and values otherwise

    def reset_prefix_cache(self) -> None:
        if self.num_unfinished:
            raise RuntimeError(
                f"{self.num_unfinished} completions are unfinished: the cache changes between groups only"
            )
        if not self._engine.reset_prefix_cache():  # it refuses while blocks are in use
            raise EngineDeadError("vLLM did not reset its prefix cache: it would mix old and new keys and values")

    def _params(self, sampling: SamplingConfig, seed: int) -> Any:
        """Stop tokens are all given by id, and vLLM's own idea of them (tokenizer and generation config) is switched
        off, so that both engines stop at the same tokens."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=seed,
            stop_token_ids=self._stop_token_ids,
            ignore_eos=True,
            logprobs=0,  # of the sampled token only
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _add(self, request_id: str, prompt_ids: list[int], params: Any) -> None:
        from vllm.inputs.engine import tokens_input

        self._engine.add_request(request_id, tokens_input(prompt_ids), params)

    def _step(self) -> list[Any]:
        """The RequestOutputs that finished. (Requests are phrased to be reported once, when they are done.)"""
        try:
            outputs = self._engine.step()
        except Exception as error:
            raise EngineDeadError(f"vLLM failed in a step: {type(error).__name__}: {error}") from error
        return [output for output in outputs if output.finished]

    def _rollout(self, output: Any) -> Rollout:
        completion = output.outputs[0]
        completion_ids = list(completion.token_ids)
        logprobs = list(completion.logprobs.logprobs)
        sound = len(logprobs) == len(completion_ids) > 0 and math.isfinite(sum(logprobs))
        if not sound or completion.finish_reason not in ("stop", "length"):
            raise EngineDeadError(
                f"vLLM returned garbage for a completion: finish reason {completion.finish_reason!r}, tokens "
                f"{completion_ids[:9]}, log-probabilities {logprobs[:9]} (of {len(completion_ids)} and {len(logprobs)})"
            )
        return Rollout(
            completion_ids=completion_ids,
            behaviour_logprobs=logprobs,
            finish_reason=completion.finish_reason,
            text=self._tokenizer.decode(completion_ids, skip_special_tokens=True),
            end_s=time.time(),
        )


def engine_options(
    model: ModelConfig, generator: GeneratorConfig, *, max_model_len: int, on_cpu: bool
) -> dict[str, Any]:
    """What vLLM is told: our defaults, over them `generator.vllm`, over that what correctness depends on."""
    options: dict[str, Any] = {
        "max_model_len": max_model_len,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "distributed_executor_backend": "uni" if generator.vllm.get("tensor_parallel_size", 1) == 1 else "mp",
    }
    if on_cpu:
        options |= {
            "enforce_eager": True,
            "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES,
            # What prefix caching shares are whole blocks; CPU kernels take multiples of 32 tokens (vLLM's default
            # is 128).
            "block_size": 32,
            # Half a prompt computed means a sampled token to take back, and with it the sample's random state: vLLM
            # can do that on GPUs only ("CPU Generator does not use offset").
            "enable_chunked_prefill": False,
        }
        if generator.vllm.get("enable_chunked_prefill"):
            raise ValueError(
                "generator.vllm.enable_chunked_prefill fails on CPUs when samples have seeds: leave it out"
            )
    if 0 < generator.num_gpus < 1:
        options["gpu_memory_utilization"] = generator.gpu_memory_share
    return (
        options
        | generator.vllm
        | {
            "model": model.path,
            "dtype": model.dtype,
            "trust_remote_code": model.trust_remote_code,
            "logprobs_mode": "processed_logprobs",
            "worker_extension_cls": f"{__name__}.{WeightsExtension.__name__}",
        }
    )


class WeightsExtension:
    """Methods that vLLM adds to its worker class."""

    model_runner: Any  # the worker's
    vllm_config: Any
    rank: int  # of the worker, from 0
    weights_receiver: WeightsReceiver | None = None
    pulled_weights: Iterator[tuple[str, Tensor]]

    def begin_pull(self, offer: WeightsOffer, party: str, size: int) -> Exception | None:
        """Nothing of the model changes yet. Returns what went wrong: an error that is raised in another process loses
        its type."""
        try:
            receiver = offer.receiver(self.weights_receiver, party=party, rank=1 + self.rank, size=size)
            self.weights_receiver, self.pulled_weights = receiver, receiver.begin(offer)
        except (TransferError, ValueError) as error:
            return error
        return None

    def end_pull(self) -> None:
        """One rank could not begin: none goes on."""
        if self.weights_receiver is not None:
            self.weights_receiver.close()

    def load_pulled_weights(self, skipped: Sequence[str]) -> None:
        self.load_published_weights((name, tensor) for name, tensor in self.pulled_weights if name not in skipped)

    def load_published_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the model's weights in place. `model.load_weights` would fail: CPU layers have packed their weights
        away.
        """
        on_cpu = self.vllm_config.device_config.device_type == "cpu"
        if on_cpu:
            _forget_packed_experts(self.model_runner.get_model())
        self.model_runner.reload_weights(weights_iterator=iter(tensors))
        if on_cpu:
            _repack_tied_head(self.model_runner.get_model())


def _forget_packed_experts(model: Any) -> None:
    """Have the kernels of experts made anew: where there is one, vLLM 0.32 takes new weights for packed ones already,
    which on CPUs they are not, and goes on with wrong numbers."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _repack_tied_head(model: Any) -> None:
    """Rebuild the packed copy of a head that shares the embedding's weight: reloading skips it, so it would stay that
    of the old weights.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    found = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    heads: list[Any] = [module for module in found if isinstance(module, ParallelLMHead)]
    embeddings: list[Any] = [module for module in found if not isinstance(module, ParallelLMHead)]
    of_embeddings = {module.weight.data_ptr() for module in embeddings}
    for head in heads:
        if head.weight.data_ptr() in of_embeddings:
            dispatch_cpu_unquantized_gemm(head, remove_weight=False)


def _register_architecture(model: ModelConfig) -> None:
    """Show vLLM the model's class. It would start another Python to look at it (10 s of CPU on a fresh machine), so as
    not to initialise CUDA in this one.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry

    config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    for architecture in config.architectures or []:
        if architecture in ModelRegistry.models:
            ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())


def runs_on_cpu(generator: GeneratorConfig, *, is_for_cpus: bool, sees_gpu: bool) -> bool:
    """Whether this process samples on the CPU, which `generator.num_gpus` says: Ray leaves all GPUs visible to a
    process that reserved none. Raises ValueError where the vLLM installed here (is_for_cpus) cannot do that.
    """
    if not generator.num_gpus and not is_for_cpus:
        raise ValueError(
            "generator.num_gpus is 0, and the vLLM installed here runs on GPUs only: set generator.num_gpus=1, or a "
            "share of a GPU such as 0.5; on CPUs install vllm-cpu in its place"
        )
    if generator.num_gpus and (is_for_cpus or not sees_gpu):
        lacking = "the vLLM installed here is for CPUs" if is_for_cpus else "torch sees no GPU here"
        raise ValueError(f"generator.num_gpus is {generator.num_gpus:g}, and {lacking}")
    return not generator.num_gpus


def _is_for_cpus() -> bool:
    """Whether the vLLM that is installed has no GPU kernels, as vLLM itself finds out."""
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        return True
    try:
        return "cpu" in importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return True  # vllm-cpu, under a name of its own


def _prepare_environment(*, on_cpu: bool) -> None:
    """Set the variables that vLLM reads when it is imported."""
    wanted = ENVIRONMENT | (CPU_ENVIRONMENT if on_cpu else {})
    late = [f"{name}={value}" for name, value in wanted.items() if os.environ.get(name) != value]
    if late and "vllm" in sys.modules:
        raise RuntimeError(f"vllm was imported before its environment was set: {' '.join(late)}")
    os.environ.update(wanted)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
