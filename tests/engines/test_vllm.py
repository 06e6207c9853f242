"""What is particular to vLLM: how it is started, and the traps around that."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from raygrpo.config import VLLM_GPU_MEMORY_SHARE, GeneratorConfig, ModelConfig
from raygrpo.engines import vllm as vllm_engine
from tests.engines.test_sampling_engines import PROMPT, TOLERANCE, load, logprob_error, sample


def test_more_prompts_at_once_than_a_step_computes(start_engine):
    """Half-computed prompts would make vLLM take back random states, which fails on CPUs."""
    engine, path = start_engine("vllm", vllm={"max_num_batched_tokens": 256, "enable_prefix_caching": False})
    prompts = {str(i): ([i, *PROMPT], [i, i + 1]) for i in range(7)}
    model = load(path)
    rollouts = sample(engine, prompts)
    alone = sample(engine, {"6": prompts["6"]})["6"]
    assert [r.completion_ids for r in rollouts["6"]] == [r.completion_ids for r in alone]
    for group_id, (prompt_ids, _) in prompts.items():
        assert max(logprob_error(model, prompt_ids, rollout) for rollout in rollouts[group_id]) < TOLERANCE


def test_preempted_completions_are_the_same_as_others(start_engine):
    """A KV cache for about two of ten completions: vLLM drops and recomputes some, with their random states kept."""
    roomy, path = start_engine("vllm", max_tokens=100)
    block = 2 * 2 * 2 * 32 * 4 * 32  # bytes: layers, keys and values, heads, head_dim, float32, tokens
    engine, _ = start_engine("vllm", max_tokens=100, vllm={"kv_cache_memory_bytes": 17 * block})
    seeds = list(range(10))
    expected = sample(roomy, {"a": (PROMPT, seeds)})["a"]
    actual = sample(engine, {"a": (PROMPT, seeds)})["a"]
    assert [r.completion_ids for r in actual] == [r.completion_ids for r in expected]
    model = load(path)
    assert max(logprob_error(model, PROMPT, rollout) for rollout in actual) < TOLERANCE


def test_options_are_passed_through_and_seen(start_engine):
    """Without prefix caching no prompt token comes from the cache, with it all whole blocks do."""
    cached = {}
    for enabled in (True, False):
        engine, _ = start_engine("vllm", vllm={"enable_prefix_caching": enabled}, max_tokens=2)
        sample(engine, {"a": (PROMPT, [1])})
        before = engine.num_cached_tokens
        sample(engine, {"a": (PROMPT, [1, 2])})
        cached[enabled] = engine.num_cached_tokens - before
    assert cached == {True: 2 * 96, False: 0}


def test_a_failed_load_declares_the_engine_dead(start_engine, monkeypatch):
    """A tensor whose type no parameter can take passes the check of names and shapes and fails inside vLLM."""
    from raygrpo.engines.sampling import EngineDeadError

    engine, path = start_engine("vllm", max_tokens=3)
    tensors = {name: p.detach() for name, p in load(path).named_parameters()}
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"].to_sparse()
    with pytest.raises(EngineDeadError, match="vLLM failed while it loaded new weights"):
        engine.load_weights(tensors)


@pytest.mark.parametrize("option", ["model", "dtype", "logprobs_mode", "worker_extension_cls", "enable_lora"])
def test_options_that_correctness_depends_on_are_refused(option):
    with pytest.raises(ValueError, match=rf"generator.vllm cannot set {option} \(.+\)"):
        vllm_engine.VllmEngine(
            ModelConfig(path="nowhere"), GeneratorConfig(vllm={option: "x"}), max_model_len=8, num_threads=1
        )


def test_vllm_imported_too_early_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", sys)
    monkeypatch.delitem(os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    with pytest.raises(RuntimeError, match="imported before its environment was set: VLLM_ENABLE_V1_MULTIPROCESSING=0"):
        vllm_engine._prepare_environment(on_cpu=True)


# GPUs: what is decided before one is touched.


@pytest.mark.parametrize(
    ("num_gpus", "is_for_cpus", "sees_gpu", "on_cpu"),
    [(0, True, False, True), (0, True, True, True), (0.5, False, True, False), (1, False, True, False)],
)
def test_num_gpus_says_what_samples_whatever_is_there(num_gpus, is_for_cpus, sees_gpu, on_cpu):
    generator = GeneratorConfig(num_gpus=num_gpus)
    assert vllm_engine.runs_on_cpu(generator, is_for_cpus=is_for_cpus, sees_gpu=sees_gpu) == on_cpu


@pytest.mark.parametrize(
    ("num_gpus", "is_for_cpus", "sees_gpu", "said"),
    [
        (0, False, True, "generator.num_gpus is 0, .* set generator.num_gpus=1"),
        (1, True, True, "generator.num_gpus is 1, and the vLLM installed here is for CPUs"),
        (0.5, False, False, "generator.num_gpus is 0.5, and torch sees no GPU"),
    ],
)
def test_a_vllm_that_cannot_do_what_num_gpus_says_is_refused(num_gpus, is_for_cpus, sees_gpu, said):
    with pytest.raises(ValueError, match=said):
        vllm_engine.runs_on_cpu(GeneratorConfig(num_gpus=num_gpus), is_for_cpus=is_for_cpus, sees_gpu=sees_gpu)


def test_the_kind_of_the_installed_vllm_is_that_of_torch(monkeypatch):
    assert vllm_engine._is_for_cpus() == (torch.version.cuda is None)
    monkeypatch.setattr("importlib.metadata.version", {"vllm": "0.32.0"}.__getitem__)
    assert not vllm_engine._is_for_cpus()
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    assert vllm_engine._is_for_cpus()


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({"num_gpus": 0.5}, 0.46),
        ({"num_gpus": 0.25}, 0.23),
        ({"num_gpus": 0.5, "vllm": {"gpu_memory_utilization": 0.3}}, 0.3),
        ({"num_gpus": 1}, None),  # vLLM's own default
        ({"num_gpus": 2, "vllm": {"tensor_parallel_size": 2}}, None),
    ],
)
def test_an_engine_on_a_share_of_a_gpu_fills_that_share_of_its_memory(settings, share):
    generator = GeneratorConfig(**settings)
    options = vllm_engine.engine_options(ModelConfig(path="m"), generator, max_model_len=8, on_cpu=False)
    assert options.get("gpu_memory_utilization") == (None if share is None else pytest.approx(share))
    assert generator.gpu_memory_share == pytest.approx(share or VLLM_GPU_MEMORY_SHARE)


def test_vllms_own_share_of_a_gpu_is_the_one_that_is_reckoned_with():
    installed = find_spec("vllm")  # which is not imported in this process
    assert installed is not None and installed.origin is not None
    source = Path(installed.origin).with_name("config").joinpath("cache.py").read_text()
    assert f"gpu_memory_utilization: float = Field(default={VLLM_GPU_MEMORY_SHARE}," in source
