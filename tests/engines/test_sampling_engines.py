"""What both engines promise, checked against a plain forward pass of the same weights."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raygrpo.config import GeneratorConfig, LearnerConfig, ModelConfig, SamplingConfig
from raygrpo.direct_transfer import WeightsServer
from raygrpo.engines.deepspeed import DeepSpeedEngine
from raygrpo.engines.sampling import EngineDeadError, checkpoint_shapes, make_engine
from raygrpo.eval_config import EvalSamplingConfig
from raygrpo.types import Rollout, TransferError
from tests.engines.vllm_process import KV_CACHE_BYTES, vllm_process
from tests.tiny_models import tiny_model

PROMPT = [(7 * i) % 250 for i in range(100)]  # three blocks of vLLM's prefix cache and a bit
OTHER_PROMPT = [(11 * i + 3) % 250 for i in range(45)]
TOLERANCE = 1e-4

both_engines = pytest.mark.parametrize("engine_name", ["vllm", "transformers"])
models = pytest.mark.parametrize(
    ("architecture", "tie"), [("qwen3", True), ("llama", False), ("qwen3", False), ("llama", True)]
)


def sample(engine: Any, groups: dict[str, tuple[list[int], list[int]]]) -> dict[str, list[Rollout]]:
    """Sample groups (id -> prompt ids, seeds) together; the rollouts in the order of the seeds."""
    for group_id, (prompt_ids, seeds) in groups.items():
        engine.add_group(group_id, prompt_ids, seeds)
    return collect(engine, {group_id: len(seeds) for group_id, (_, seeds) in groups.items()})


def collect(engine: Any, sizes: dict[str, int]) -> dict[str, list[Rollout]]:
    rollouts: dict[str, dict[int, Rollout]] = {group_id: {} for group_id in sizes}
    while engine.num_unfinished:
        step_start_s = time.time()
        for group_id, index, rollout in engine.step():
            assert index not in rollouts[group_id]
            assert step_start_s <= rollout.end_s <= time.time()  # complete in the step that hands it out
            rollouts[group_id][index] = rollout
    return {group_id: [rollouts[group_id][i] for i in range(size)] for group_id, size in sizes.items()}


def reference_logits(model: Any, prompt_ids: list[int], completion_ids: list[int]) -> torch.Tensor:
    """[C, V]: of one plain forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + completion_ids])).logits[0].float()
    return logits[len(prompt_ids) - 1 : -1]


def logprob_error(model: Any, prompt_ids: list[int], rollout: Rollout, temperature: float = 1.0) -> float:
    logprobs = (reference_logits(model, prompt_ids, rollout.completion_ids) / temperature).log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(rollout.completion_ids)[:, None])[:, 0]
    return (expected - torch.tensor(rollout.behaviour_logprobs)).abs().max().item()


def load(path: str, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


def named_tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@both_engines
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_behaviour_logprobs_are_those_of_a_plain_forward(start_engine, engine_name, temperature):
    engine, path = start_engine(engine_name, temperature=temperature)
    model = load(path)
    groups = {"a": (PROMPT, [1, 2, 3, 4]), "b": (OTHER_PROMPT, [1, 2]), "c": (PROMPT[:1], [9])}
    for group_id, rollouts in sample(engine, groups).items():
        for rollout in rollouts:
            assert logprob_error(model, groups[group_id][0], rollout, temperature) < TOLERANCE


@both_engines
def test_top_k_top_p_and_min_p_shape_the_distribution_and_its_logprobs(start_engine, engine_name):
    cuts = {"temperature": 0.9, "top_p": 0.8, "top_k": 12, "min_p": 0.05}
    engine, path = start_engine(engine_name, **cuts)
    model = load(path)
    num_cut = 0
    for rollout in sample(engine, {"a": (PROMPT, list(range(8)))})["a"]:
        for logits, token_id, logprob in zip(
            reference_logits(model, PROMPT, rollout.completion_ids),
            rollout.completion_ids,
            rollout.behaviour_logprobs,
            strict=True,
        ):
            expected = truncated(logits, **cuts)
            num_cut += len(logits) - len(expected)
            assert token_id in expected
            assert abs(math.log(expected[token_id]) - logprob) < TOLERANCE
    assert num_cut > 0


@both_engines
def test_a_group_may_have_sampling_of_its_own_beside_others(start_engine, engine_name):
    """As evaluations have. Temperature 0: each token is the most likely one, whatever the seed."""
    engine, path = start_engine(engine_name)
    model = load(path)
    alone = sample(engine, {"plain": (PROMPT, [1, 2, 3])})["plain"]
    engine.add_group("plain", PROMPT, [1, 2, 3])
    engine.add_group("greedy", OTHER_PROMPT, [4, 5], EvalSamplingConfig(max_tokens=9))
    cut = EvalSamplingConfig(max_tokens=40, temperature=0.9, top_p=0.8, top_k=12, min_p=0.05)
    engine.add_group("cut", PROMPT, [6, 7], cut)
    groups = collect(engine, {"plain": 3, "greedy": 2, "cut": 2})
    assert [r.completion_ids for r in groups["plain"]] == [r.completion_ids for r in alone]
    for rollout in groups["greedy"]:
        logits = reference_logits(model, OTHER_PROMPT, rollout.completion_ids)
        assert rollout.completion_ids == logits.argmax(-1).tolist() and len(rollout.completion_ids) <= 9
        assert logprob_error(model, OTHER_PROMPT, rollout) < TOLERANCE
    for rollout in groups["cut"]:
        for logits, token_id in zip(
            reference_logits(model, PROMPT, rollout.completion_ids), rollout.completion_ids, strict=True
        ):
            assert token_id in truncated(logits, temperature=0.9, top_p=0.8, top_k=12, min_p=0.05)
    assert max(len(r.completion_ids) for r in groups["plain"]) <= 24
    with pytest.raises(ValueError, match="do not fit into 256 tokens"):
        engine.add_group("long", PROMPT, [1], EvalSamplingConfig(max_tokens=200))


def truncated(logits: torch.Tensor, *, temperature: float, top_p: float, top_k: int, min_p: float) -> dict[int, float]:
    """Token -> probability after all cuts, told step by step in plain Python."""
    probs = dict(enumerate((logits.double() / temperature).softmax(-1).tolist()))
    best = max(probs.values())
    ranked = sorted((token for token, p in probs.items() if p >= min_p * best), key=lambda t: -probs[t])[:top_k]
    total = sum(probs[token] for token in ranked)
    kept, mass = [], 0.0
    for token in ranked:
        if mass >= top_p:
            break
        kept.append(token)
        mass += probs[token] / total
    total = sum(probs[token] for token in kept)
    return {token: probs[token] / total for token in kept}


@both_engines
def test_samples_follow_the_distribution(start_engine, engine_name):
    """First tokens of 2000 samples against the model's probabilities: chi-squared over the tokens expected 20 times or
    more.
    """
    engine, path = start_engine(engine_name, temperature=0.7, max_tokens=1)
    rollouts = sample(engine, {str(i): (PROMPT, list(range(200 * i, 200 * i + 200))) for i in range(10)})
    counts = torch.zeros(300)
    for rollout in (rollout for group in rollouts.values() for rollout in group):
        counts[rollout.completion_ids[0]] += 1
    expected = 2000 * (reference_logits(load(path), PROMPT, [0])[0] / 0.7).softmax(-1)
    often = expected >= 20
    assert often.sum() >= 5
    chi_squared = ((counts - expected) ** 2 / expected)[often].sum().item()
    degrees = int(often.sum())
    assert chi_squared < degrees + 5 * math.sqrt(2 * degrees)


@both_engines
def test_a_sample_depends_on_its_seed_and_on_nothing_beside_it(start_engine, engine_name):
    engine, _ = start_engine(engine_name)
    alone = sample(engine, {"a": (PROMPT, [5])})["a"][0]
    together = sample(engine, {"x": (OTHER_PROMPT, [5, 6, 7]), "a": (PROMPT, [4, 5, 6, 5])})["a"]
    assert together[1].completion_ids == together[3].completion_ids == alone.completion_ids
    assert len({tuple(rollout.completion_ids) for rollout in together}) == 3
    for a, b in zip(alone.behaviour_logprobs, together[1].behaviour_logprobs, strict=True):
        assert abs(a - b) < TOLERANCE


@both_engines
def test_neighbouring_and_very_large_seeds_give_different_samples(start_engine, engine_name):
    engine, _ = start_engine(engine_name)
    seeds = [0, 1, 2, 3, 2**31, 2**32 - 1, 2**40 + 7, 2**63 - 2]
    assert len({tuple(r.completion_ids) for r in sample(engine, {"a": (PROMPT, seeds)})["a"]}) == len(seeds)


@both_engines
@models
def test_after_new_weights_logprobs_are_those_of_the_new_weights(
    start_engine, engine_name, architecture, tie, tmp_path
):
    """The prompt was sampled from before the update and is in the prefix cache: nothing of it may survive."""
    engine, old_path = start_engine(engine_name, architecture, tie=tie)
    old, new = load(old_path), load(tiny_model(tmp_path, architecture, tie=tie, vocab_size=300, seed=1))
    before = sample(engine, {"a": (PROMPT, [1, 2, 3])})["a"]
    cached = engine.num_cached_tokens
    sample(engine, {"a": (PROMPT, [4])})
    assert engine.num_cached_tokens - cached == (96 if engine_name == "vllm" else 0)

    engine.load_weights(named_tensors(new))
    cached = engine.num_cached_tokens
    assert sample(engine, {"a": (PROMPT, [1])})["a"][0].completion_ids != before[0].completion_ids
    assert engine.num_cached_tokens == cached
    for prompt_ids in (PROMPT, OTHER_PROMPT):
        for rollout in sample(engine, {"a": (prompt_ids, [1, 2, 3])})["a"]:
            assert logprob_error(new, prompt_ids, rollout) < TOLERANCE
            assert logprob_error(old, prompt_ids, rollout) > 0.1
    score = engine.score(PROMPT, OTHER_PROMPT)
    expected = reference_logits(new, PROMPT, OTHER_PROMPT).log_softmax(-1)
    assert (expected.gather(1, torch.tensor(OTHER_PROMPT)[:, None])[:, 0] - torch.tensor(score)).abs().max() < TOLERANCE

    engine.load_weights(named_tensors(old))
    after = sample(engine, {"a": (PROMPT, [1, 2, 3])})["a"]
    assert [r.completion_ids for r in after] == [r.completion_ids for r in before]


@both_engines
@models
def test_weights_that_are_pulled_are_those_of_load_weights(start_engine, engine_name, architecture, tie, tmp_path):
    """Bucket by bucket, from another process; the prompt is in the prefix cache, of which nothing may survive."""
    engine, old_path = start_engine(engine_name, architecture, tie=tie)
    old, new = load(old_path), load(tiny_model(tmp_path, architecture, tie=tie, vocab_size=300, seed=2))
    engine.load_weights(named_tensors(new))
    expected = sample(engine, {"a": (PROMPT, [1])})["a"][0]
    engine.load_weights(named_tensors(old))
    sample(engine, {"a": (PROMPT, [4])})
    server = WeightsServer("127.0.0.1", timeout_s=10.0)
    try:
        for version in (1, 2):  # the second on the connection of the first
            engine.pull_weights(server.publish(version, named_tensors(new).items(), bucket_bytes=50_000))
            cached = engine.num_cached_tokens
            pulled = sample(engine, {"a": (PROMPT, [1])})["a"][0]
            assert engine.num_cached_tokens == cached
            assert pulled.completion_ids == expected.completion_ids
            assert pulled.behaviour_logprobs == expected.behaviour_logprobs
            for rollout in sample(engine, {"a": (PROMPT, [1, 2, 3])})["a"]:
                assert logprob_error(new, PROMPT, rollout) < TOLERANCE
                assert logprob_error(old, PROMPT, rollout) > 0.1
    finally:
        server.close()
        engine.load_weights(named_tensors(old))


@both_engines
def test_a_pull_that_does_not_begin_leaves_the_engine_as_it_was(start_engine, engine_name, tmp_path):
    engine, path = start_engine(engine_name)
    other = named_tensors(load(tiny_model(tmp_path, vocab_size=300, seed=1)))
    server = WeightsServer("127.0.0.1", timeout_s=5.0)
    try:
        foreign = server.publish(1, list(other.items())[1:])
        with pytest.raises(ValueError, match=r"1 missing \(model.embed_tokens.weight\)"):
            engine.pull_weights(foreign)
        gone = server.publish(2, other.items())
        damaged = server.publish(3, other.items())
        with pytest.raises(TransferError, match="does not keep version 2 any more"):
            engine.pull_weights(gone)
        server._snapshots[3].buckets[0][5] ^= 1
        with pytest.raises(ValueError, match=r"digest of 'model.embed_tokens.weight'"):
            engine.pull_weights(damaged)
    finally:
        server.close()
    with pytest.raises(TransferError, match="does not answer"):
        engine.pull_weights(damaged)
    assert logprob_error(load(path), PROMPT, sample(engine, {"a": (PROMPT, [1])})["a"][0]) < TOLERANCE


@both_engines
def test_a_pull_that_ends_in_the_middle_declares_the_engine_dead(start_engine, engine_name, tmp_path):
    engine, _ = start_engine(engine_name, max_tokens=5)
    other = named_tensors(load(tiny_model(tmp_path, vocab_size=300, seed=1)))
    server = WeightsServer("127.0.0.1", timeout_s=5.0)
    try:
        offer = server.publish(1, other.items(), bucket_bytes=50_000)
        server._snapshots[1].buckets[-1][0] ^= 1
        with pytest.raises(EngineDeadError, match=r"digest of '.*' does not match its bytes"):
            engine.pull_weights(offer)
    finally:
        server.close()


@both_engines
def test_a_state_dict_that_repeats_a_tied_head_is_accepted(start_engine, engine_name):
    engine, path = start_engine(engine_name)
    model = load(path)
    assert "lm_head.weight" in model.state_dict() and "lm_head.weight" not in named_tensors(model)
    engine.load_weights(dict(model.state_dict()))
    assert logprob_error(model, PROMPT, sample(engine, {"a": (PROMPT, [1])})["a"][0]) < TOLERANCE


@both_engines
def test_bfloat16_weights(start_engine, engine_name, tmp_path):
    """Published in bfloat16, loaded exactly: log-probabilities differ from a forward pass in bfloat16 by its rounding
    only.
    """
    engine, _ = start_engine(engine_name, tie=False, dtype="bfloat16")
    path = tiny_model(tmp_path, tie=False, vocab_size=300, seed=1, dtype="bfloat16")
    new = load(path, dtype=torch.bfloat16)
    engine.load_weights(named_tensors(new))
    rollouts = sample(engine, {"a": (PROMPT, [1, 2, 3, 4])})["a"]
    exact = new.float()
    rounding = max(logprob_error(exact, PROMPT, rollout) for rollout in rollouts)
    assert rounding < 0.1
    other = load(tiny_model(tmp_path / "other", tie=False, vocab_size=300, seed=2))
    assert min(logprob_error(other, PROMPT, rollout) for rollout in rollouts) > 1.0


@both_engines
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"1 missing \(model.layers.1.mlp.up_proj.weight\)"),
        (lambda t: t.update({"model.layers.7.bias": torch.zeros(3)}), r"1 unknown \(model.layers.7.bias\)"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(63)}),
            r"'model.norm.weight' has shape \(63,\), the model has \(64,\)",
        ),
    ],
)
def test_foreign_weights_are_refused_and_the_engine_goes_on(start_engine, engine_name, change, message):
    engine, path = start_engine(engine_name)
    tensors = named_tensors(load(tiny_model(path + "-other", vocab_size=300, seed=1)))
    change(tensors)
    with pytest.raises(ValueError, match=message):
        engine.load_weights(tensors)
    assert logprob_error(load(path), PROMPT, sample(engine, {"a": (PROMPT, [1])})["a"][0]) < TOLERANCE


@both_engines
def test_weights_do_not_change_under_a_running_group(start_engine, engine_name):
    engine, path = start_engine(engine_name)
    engine.add_group("a", PROMPT, [1, 2])
    engine.step()
    with pytest.raises(RuntimeError, match="2 completions are unfinished"):
        engine.load_weights(named_tensors(load(path)))
    assert logprob_error(load(path), PROMPT, collect(engine, {"a": 2})["a"][0]) < TOLERANCE


@both_engines
def test_completions_stop_at_the_end_token_or_at_the_length(start_engine, engine_name):
    engine, path = start_engine(engine_name, max_tokens=100)
    tokenizer = AutoTokenizer.from_pretrained(path)
    rollouts = sample(engine, {"a": (PROMPT, list(range(40)))})["a"]
    for rollout in rollouts:
        assert len(rollout.behaviour_logprobs) == len(rollout.completion_ids)
        stopped = rollout.completion_ids[-1] == tokenizer.eos_token_id
        assert rollout.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(rollout.completion_ids) == 100
        assert tokenizer.eos_token_id not in rollout.completion_ids[:-1]
        assert "<|" not in rollout.text
        assert rollout.text == tokenizer.decode(rollout.completion_ids, skip_special_tokens=True)
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}


@both_engines
def test_a_group_is_added_while_another_is_sampled_and_overtakes_it(start_engine, engine_name):
    engine, path = start_engine(engine_name, max_tokens=100)
    model = load(path)
    lengths = {
        seed: len(r.completion_ids) for seed, r in enumerate(sample(engine, {"a": (PROMPT, list(range(40)))})["a"])
    }
    long, short = max(lengths, key=lengths.__getitem__), min(lengths, key=lengths.__getitem__)
    engine.add_group("long", PROMPT, [long])
    for _ in range(3):
        assert engine.step() == []
    engine.add_group("short", PROMPT, [short])
    order = []
    while engine.num_unfinished:
        for group_id, _, rollout in engine.step():
            order.append(group_id)
            assert logprob_error(model, PROMPT, rollout) < TOLERANCE
    assert order == ["short", "long"]


@both_engines
def test_an_aborted_group_is_gone_and_others_are_not_disturbed(start_engine, engine_name):
    engine, _ = start_engine(engine_name)
    expected = sample(engine, {"a": (PROMPT, [1, 2])})["a"]
    engine.add_group("a", PROMPT, [1, 2])
    engine.add_group("b", OTHER_PROMPT, [3, 4])
    engine.step()
    engine.abort_group("b")
    engine.abort_group("unknown")
    assert engine.num_unfinished == 2
    assert [r.completion_ids for r in collect(engine, {"a": 2})["a"]] == [r.completion_ids for r in expected]
    again = sample(engine, {"b": (PROMPT, [1])})["b"]  # the name is free again
    assert again[0].completion_ids == expected[0].completion_ids


@both_engines
def test_scoring_between_steps_disturbs_nothing_and_loses_nothing(start_engine, engine_name):
    engine, path = start_engine(engine_name)
    model = load(path)
    expected = sample(engine, {"a": (PROMPT, [1, 2, 3])})["a"]
    engine.add_group("a", PROMPT, [1, 2, 3])
    rollouts: dict[int, Rollout] = {}
    while engine.num_unfinished:
        completion_ids = list(range(5 + len(rollouts)))
        logprobs = reference_logits(model, OTHER_PROMPT, completion_ids).log_softmax(-1)
        expected_score = logprobs.gather(1, torch.tensor(completion_ids)[:, None])[:, 0]
        assert (torch.tensor(engine.score(OTHER_PROMPT, completion_ids)) - expected_score).abs().max() < TOLERANCE
        rollouts |= {index: rollout for _, index, rollout in engine.step()}
    assert [rollouts[i].completion_ids for i in range(3)] == [r.completion_ids for r in expected]


@both_engines
@pytest.mark.parametrize(
    ("prompt_ids", "seeds", "message"),
    [
        ([], [1], "prompt is empty"),
        (PROMPT * 3, [1], r"a prompt of 300 tokens and a completion of up to 24 .* do not fit into 256"),
        ([5, 300], [1], r"token ids outside 0\.\.299"),
        ([5], [1, -1], "a sample seed lies in"),
        ([5], [2**63], "a sample seed lies in"),
    ],
)
def test_requests_that_cannot_be_served_as_they_are_are_refused(start_engine, engine_name, prompt_ids, seeds, message):
    engine, _ = start_engine(engine_name)
    with pytest.raises(ValueError, match=message):
        engine.add_group("a", prompt_ids, seeds)
    assert engine.num_unfinished == 0
    assert len(sample(engine, {"a": (PROMPT, [1])})["a"]) == 1


@both_engines
def test_a_group_id_in_use_is_refused(start_engine, engine_name):
    engine, _ = start_engine(engine_name)
    engine.add_group("a", PROMPT, [1])
    with pytest.raises(ValueError, match="sampled already"):
        engine.add_group("a", PROMPT, [2])
    assert len(collect(engine, {"a": 1})["a"]) == 1


@both_engines
def test_scoring_nothing_or_too_much_is_refused(start_engine, engine_name):
    engine, _ = start_engine(engine_name)
    for prompt_ids, completion_ids in (([], [1]), ([1], []), (PROMPT, PROMPT + OTHER_PROMPT * 2)):
        with pytest.raises(ValueError, match="cannot score"):
            engine.score(prompt_ids, completion_ids)


def test_transformers_samples_on_the_cpu_unless_a_gpu_was_reserved(tmp_path, monkeypatch):
    path = str(tiny_model(tmp_path, vocab_size=300))
    model, cpu = ModelConfig(path=path), GeneratorConfig(engine="transformers")
    with pytest.raises(ValueError, match=r"generator.num_gpus is 1, and torch sees no GPU"):
        make_engine(model, cpu.model_copy(update={"num_gpus": 1.0}), max_model_len=64, num_threads=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a GPU that others use
    engine = make_engine(model, cpu, max_model_len=64, num_threads=1)
    assert len(engine.score([1, 2], [3])) == 1


@pytest.fixture(scope="module")
def make_expert_engine(request):
    """Like make_engine, of a name. vLLM makes a group for experts only where the first engine of a process has some."""

    def make(engine: str, model: ModelConfig) -> Any:
        settings = GeneratorConfig(
            engine=engine,
            sampling=SamplingConfig(max_tokens=5),
            vllm={"kv_cache_memory_bytes": KV_CACHE_BYTES} if engine == "vllm" else {},
        )
        make = request.getfixturevalue("expert_manager").make_engine if engine == "vllm" else make_engine
        return make(model, settings, max_model_len=128, num_threads=1)

    return make


@pytest.fixture(scope="module")
def expert_manager():
    with vllm_process() as manager:
        yield manager


@both_engines
@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_weights_of_a_mixture_of_experts_are_published_under_the_names_of_its_checkpoint(
    architecture, engine_name, make_expert_engine, process_group, tmp_path
):
    """The learner's model holds the experts of a layer as one parameter, its checkpoint and the engines do not."""
    sizes = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    first, other = (
        tiny_model(tmp_path / str(seed), architecture, tie=False, seed=seed, vocab_size=300, **sizes) for seed in (0, 1)
    )
    engine = make_expert_engine(engine_name, ModelConfig(path=str(first)))
    learner = DeepSpeedEngine(load(other), LearnerConfig(), dtype="float32", num_updates=1)
    names = {name for name, _ in learner.published_weights()}
    assert names == set(checkpoint_shapes(str(other), tied_head=False)) != {name for name, _ in learner.named_weights()}
    engine.load_weights(dict(learner.published_weights()))
    for rollout in sample(engine, {"a": (PROMPT, [1, 2])})["a"]:
        assert logprob_error(load(other), PROMPT, rollout) < TOLERANCE
