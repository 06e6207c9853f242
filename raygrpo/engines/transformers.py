"""Sampling with a transformers model, for machines without vLLM: slower, and short enough to check by reading.

Each group is a batch of its own. Its prompt is computed once and the keys and values are repeated for the G
completions, which then advance in lockstep; as they start from the same prompt there is no padding. A finished
completion leaves the batch. So what a group yields does not depend on the other groups at all, and a step costs one
forward pass for each running group.

Sampling: temperature, then min_p, top_k and top_p, in vLLM's order; the log-probabilities are those of what is left,
normalised. One uniform number a token, from the sample's own generator, picks the token by the inverse of the
cumulative distribution.

G: completions of a group still unfinished; V: vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from raygrpo.config import GeneratorConfig, ModelConfig, SamplingConfig
from raygrpo.engines.checkpoint_names import CheckpointNames
from raygrpo.engines.sampling import (
    EngineDeadError,
    WeightsOffer,
    check_request,
    check_score,
    check_weights,
    stop_token_ids,
)
from raygrpo.types import Rollout


@dataclass(slots=True, kw_only=True)
class _Sample:
    index: int  # in its group
    generator: torch.Generator
    completion_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class _RunningGroup:
    prompt_ids: list[int]
    sampling: SamplingConfig
    samples: list[_Sample]  # the unfinished ones: sample i is row i of the cache
    cache: DynamicCache | None = None  # None: the prompt was not computed yet


class TransformersEngine:
    """See `SamplingEngine`."""

    def __init__(self, model: ModelConfig, generator: GeneratorConfig, *, max_model_len: int, num_threads: int):
        torch.set_num_threads(num_threads)
        if generator.num_gpus and not torch.cuda.is_available():
            raise ValueError(f"generator.num_gpus is {generator.num_gpus:g}, and torch sees no GPU here")
        # Ray leaves all GPUs visible to a process that reserved none.
        self._device = torch.device("cuda" if generator.num_gpus else "cpu")
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            model.path, dtype=getattr(torch, model.dtype), trust_remote_code=model.trust_remote_code
        )
        self._model.to(self._device).eval().requires_grad_(False)
        self._tokenizer = AutoTokenizer.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
        self._sampling = generator.sampling
        self._stop_token_ids = set(stop_token_ids(model.path, trust_remote_code=model.trust_remote_code))
        self._max_model_len = max_model_len
        config = self._model.config.get_text_config()
        self._vocab_size = config.vocab_size
        self._tied_head = bool(config.tie_word_embeddings)
        names = CheckpointNames(self._model)
        self._weights: dict[str, Tensor] = {}  # under the names of the checkpoint, to be written to
        for name, parameter in self._model.named_parameters():
            self._weights |= names.views(name, parameter.data)
        self._groups: dict[str, _RunningGroup] = {}
        self._receiver: Any = None  # of weights that are pulled
        self.num_cached_tokens = 0

    @property
    def num_unfinished(self) -> int:
        return sum(len(group.samples) for group in self._groups.values())

    def add_group(
        self, group_id: str, prompt_ids: list[int], seeds: Sequence[int], sampling: SamplingConfig | None = None
    ) -> None:
        if group_id in self._groups:
            raise ValueError(f"group {group_id!r} is being sampled already")
        sampling = sampling or self._sampling
        check_request(prompt_ids, seeds, sampling, max_model_len=self._max_model_len, vocab_size=self._vocab_size)
        samples = [_Sample(index=i, generator=torch.Generator().manual_seed(seed)) for i, seed in enumerate(seeds)]
        self._groups[group_id] = _RunningGroup(prompt_ids=prompt_ids, sampling=sampling, samples=samples)

    def step(self) -> list[tuple[str, int, Rollout]]:
        finished = []
        for group_id, group in list(self._groups.items()):
            finished += [(group_id, index, rollout) for index, rollout in self._advance(group)]
            if not group.samples:
                del self._groups[group_id]
        return finished

    def abort_group(self, group_id: str) -> None:
        self._groups.pop(group_id, None)

    def score(self, prompt_ids: list[int], completion_ids: list[int]) -> list[float]:
        check_score(prompt_ids, completion_ids, max_model_len=self._max_model_len)
        ids = torch.tensor([prompt_ids + completion_ids], device=self._device)
        with torch.no_grad():
            logits = self._model(ids, use_cache=False, logits_to_keep=len(completion_ids) + 1).logits[0, :-1]
        logprobs = logits.float().log_softmax(-1)  # [C, V]
        return logprobs.gather(1, ids[0, len(prompt_ids) :, None])[:, 0].tolist()

    def reset_prefix_cache(self) -> None:
        if self.num_unfinished:
            raise RuntimeError(
                f"{self.num_unfinished} completions are unfinished: the cache changes between groups only"
            )
        # Nothing to forget: a group's cache ends with the group.

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        if self._groups:
            raise RuntimeError(f"{self.num_unfinished} completions are unfinished: weights change between groups only")
        if self._tied_head:
            tensors = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
        check_weights({name: weight.shape for name, weight in self._weights.items()}, tensors)
        for name, weight in self._weights.items():
            weight.copy_(tensors[name])

    def pull_weights(self, offer: WeightsOffer) -> None:
        if self._groups:
            raise RuntimeError(f"{self.num_unfinished} completions are unfinished: weights change between groups only")
        skipped = {"lm_head.weight"} if self._tied_head else set()
        offered = {entry.name: entry for entry in offer.index if entry.name not in skipped}
        check_weights({name: weight.shape for name, weight in self._weights.items()}, offered)
        self._receiver = offer.receiver(self._receiver)
        tensors = self._receiver.begin(offer)
        try:
            for name, tensor in tensors:
                if name not in skipped:
                    self._weights[name].copy_(tensor)
        except Exception as error:
            raise EngineDeadError(f"new weights came in part only: {error}") from error

    @torch.no_grad()
    def _advance(self, group: _RunningGroup) -> list[tuple[int, Rollout]]:
        """One token more for every sample of the group; (index, rollout) of those that are now finished."""
        if group.cache is None:
            group.cache = DynamicCache(config=self._model.config)
            logits = self._forward([group.prompt_ids], group.cache).expand(len(group.samples), -1)
            group.cache.batch_repeat_interleave(len(group.samples))
            self.num_cached_tokens += len(group.prompt_ids) * (len(group.samples) - 1)
        else:
            logits = self._forward([sample.completion_ids[-1:] for sample in group.samples], group.cache)
        logprobs = sampling_logprobs(logits.float().cpu(), group.sampling)
        if group.sampling.temperature == 0:
            token_ids = most_likely_tokens(logprobs)
        else:
            token_ids = sample_tokens(logprobs, [sample.generator for sample in group.samples])
        finished = []
        kept = []
        for row, (sample, token_id) in enumerate(zip(group.samples, token_ids, strict=True)):
            sample.completion_ids.append(token_id)
            sample.logprobs.append(logprobs[row, token_id].item())
            stopped = token_id in self._stop_token_ids
            if stopped or len(sample.completion_ids) == group.sampling.max_tokens:
                finished.append((sample.index, self._rollout(sample, stopped)))
            else:
                kept.append(row)
        if finished and kept:
            group.cache.batch_select_indices(torch.tensor(kept, device=self._device))
        group.samples = [group.samples[row] for row in kept]
        return finished

    def _forward(self, ids: list[list[int]], cache: DynamicCache) -> Tensor:
        """[rows, V]: logits after the last of the given tokens, which follow those in the cache."""
        inputs = torch.tensor(ids, device=self._device)
        return self._model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def _rollout(self, sample: _Sample, stopped: bool) -> Rollout:
        return Rollout(
            completion_ids=sample.completion_ids,
            behaviour_logprobs=sample.logprobs,
            finish_reason="stop" if stopped else "length",
            text=self._tokenizer.decode(sample.completion_ids, skip_special_tokens=True),
            end_s=time.time(),
        )


def sampling_logprobs(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Log-probabilities of the distribution that is sampled from; -inf for what the settings cut off. At temperature 0
    those of temperature 1, as vLLM gives them.

    logits and result: [G, V], float32.
    """
    logits = logits / (sampling.temperature or 1.0)
    if sampling.min_p > 0:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < sampling.min_p * probs.amax(-1, keepdim=True), -torch.inf)
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p < 1:
        # A token stays while the more likely ones do not reach top_p together; so the most likely one always stays.
        probs, order = logits.softmax(-1).sort(-1, descending=True)
        cut = probs.cumsum(-1) - probs >= sampling.top_p
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(-1, order, cut), -torch.inf)
    return logits.log_softmax(-1)


def sample_tokens(logprobs: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
    """One token for each row, drawn with the row's own generator. logprobs: [G, V], on the CPU."""
    _check_finite(logprobs)
    cumulative = logprobs.double().exp().cumsum(-1)  # [G, V]
    uniform = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])  # [G, 1]
    # Of the total, which is 1 up to rounding; strictly below it, so that the token found has a probability.
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0].tolist()


def most_likely_tokens(logprobs: Tensor) -> list[int]:
    """One token for each row. logprobs: [G, V]."""
    _check_finite(logprobs)
    return logprobs.argmax(-1).tolist()


def _check_finite(logprobs: Tensor) -> None:
    if not torch.isfinite(logprobs.amax(-1)).all():
        raise EngineDeadError("the model's logits are not finite: its weights are broken")
