"""What is particular to vLLM: how it is started, and the traps around that."""

from __future__ import annotations

import os
import sys

import pytest

from raygrpo.config import GeneratorConfig, ModelConfig
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
        vllm_engine._prepare_environment()
