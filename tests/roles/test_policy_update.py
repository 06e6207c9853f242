"""PolicyUpdater: an update equals the formulas, however groups are cut into micro-batches and spread over ranks."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM

from raygrpo.config import AlgorithmConfig
from raygrpo.roles.policy import build_policy
from raygrpo.types import Reward, RunStopped
from tests.roles.update_cases import (
    ADAPTER_CASES,
    CASES,
    FAILED,
    GROUPS_PER_STEP,
    SYSTEM_PROMPT,
    case_config,
    make_step,
    plain_scores,
    reference_updates,
    run_on_ranks,
    run_updates,
)
from tests.tiny_models import tiny_model

NUM_STEPS = 2
pytestmark = pytest.mark.usefixtures("process_group")

# What runs on 2 and on 3 ranks: every kind of collective, under the stages that differ in it.
GANG_RUNS = [
    ("plain", 1),
    ("plain", 2),
    ("plain", 3),
    ("small_micro_batches", 3),
    ("shared_heads", 3),
    ("truncated_masked", 2),
    ("kl_in_loss", 1),
    ("four_updates", 3),
    ("four_updates_kl_in_reward_in_parts", 2),
    ("four_updates_kl_in_reward_in_parts", 3),
    ("adapters_kl_in_loss", 3),
    ("adapters_four_updates_kl_in_reward_in_parts", 1),
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), hidden_size=32, num_heads=2, num_kv_heads=1, max_positions=64)


@pytest.fixture(scope="module")
def load(model_dir):
    return lambda: AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


@pytest.fixture(scope="module")
def steps_at(load):
    """Temperature -> the groups of two steps."""
    return cache(lambda temperature: [make_step(load(), step, temperature) for step in range(NUM_STEPS)])


@pytest.fixture(scope="module")
def steps_of(steps_at, model_dir):
    return lambda case: steps_at(case_config(model_dir, case).generator.sampling.temperature)


@pytest.fixture(scope="module")
def alone(steps_of, model_dir):
    """alone(case, stage): what one rank makes of the case."""
    return cache(lambda case, stage=1: run_updates(0, 1, case_config(model_dir, case, stage), steps_of(case)))


@pytest.fixture(scope="module")
def gang(steps_at, model_dir, tmp_path_factory):
    """gang(world, case, stage): what each rank of a gang makes of the case. One gang runs all of GANG_RUNS."""

    @cache
    def run(world: int) -> Path:
        directory = tmp_path_factory.mktemp(f"gang{world}")
        runs = [(f"{case}-{stage}", case_config(model_dir, case, stage)) for case, stage in GANG_RUNS]
        runs = [(name, config.model_copy(update={"groups_per_step": GROUPS_PER_STEP})) for name, config in runs]
        mp.spawn(run_on_ranks, (world, str(directory), runs, {1.0: steps_at(1.0)}), nprocs=world)
        return directory

    def results(world: int, case: str, stage: int) -> list[dict[str, Any]]:
        return [torch.load(run(world) / f"{case}-{stage}-{world}-{rank}.pt") for rank in range(world)]

    return results


def largest_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max((found[name] - expected[name]).abs().max().item() for name in expected)


def assert_same_metrics(found: list[dict[str, float]], expected: list[dict[str, float]], but: str = "") -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {but}:
            assert one[name] == pytest.approx(other[name], rel=2e-5, abs=1e-6), name


# One rank.


@pytest.mark.parametrize("case", [*CASES, *ADAPTER_CASES])
def test_an_update_equals_the_formulas_on_one_completion_at_a_time(case, alone, load, model_dir, steps_of):
    expected = reference_updates(load, case_config(model_dir, case), steps_of(case))
    found = alone(case)
    for of_step, expected_of_step in zip(found["advantages"], expected["advantages"], strict=True):
        for of_group, expected_of_group in zip(of_step, expected_of_step, strict=True):
            # A KL in the reward carries the weights' last digits into the second step's advantages.
            assert of_group == pytest.approx(expected_of_group, abs=5e-5)
    assert largest_difference(found["weights"], expected["weights"]) < 1e-5
    assert largest_difference(expected["weights"], expected["start"]) > 5e-3, "the updates must be worth comparing"


@pytest.mark.parametrize("case", set(CASES) - {"plain"})
def test_every_setting_but_the_exact_ones_changes_the_weights(case, alone):
    micro_batches = {"small_micro_batches", "middling_micro_batches"}
    exact = {*micro_batches, "nothing_skipped", "shared_heads", "checkpointed_activations"}
    difference = largest_difference(alone(case)["weights"], alone("plain")["weights"])
    assert difference < 1e-6 if case in exact else difference > 1e-4


@pytest.mark.parametrize("case", [case for case in ADAPTER_CASES if case != "adapters"])
def test_a_penalty_holds_adapters_back_without_a_second_model(case, alone, model_dir):
    assert largest_difference(alone(case)["weights"], alone("adapters")["weights"]) > 1e-4
    _, _, updater, _ = build_policy(case_config(model_dir, case))
    assert updater._reference is None


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    "case", ["plain", "small_micro_batches", "four_updates_kl_in_reward_in_parts", "adapters_kl_in_loss"]
)
def test_zero_stages_train_identically(case, stage, alone):
    assert largest_difference(alone(case, stage)["weights"], alone(case)["weights"]) < 2e-6
    assert_same_metrics(alone(case, stage)["metrics"], alone(case)["metrics"])


@pytest.mark.parametrize("case", ["small_micro_batches", "middling_micro_batches"])
def test_metrics_do_not_depend_on_micro_batches(case, alone):
    assert_same_metrics(alone(case)["metrics"], alone("plain")["metrics"])


def test_a_head_that_prompts_share_is_run_once(alone):
    plain, shared = alone("plain"), alone("shared_heads")
    for without, having, advantages in zip(plain["metrics"], shared["metrics"], plain["advantages"], strict=True):
        trained = sum(any(of_group) and place % 3 > 0 for place, of_group in enumerate(advantages))
        assert trained > 2
        saved = without["prefix/tokens_run"] - having["prefix/tokens_run"]
        assert saved == len(SYSTEM_PROMPT) * (trained - 1)


# Several ranks.


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(("case", "stage"), GANG_RUNS)
def test_ranks_together_do_what_one_does_alone(world, case, stage, gang, alone):
    expected = alone(case)
    for rank, found in enumerate(gang(world, case, stage)):
        assert largest_difference(found["weights"], expected["weights"]) < 5e-6
        # Each rank runs a head that its prompts share once.
        assert_same_metrics(found["metrics"], expected["metrics"], but="prefix/tokens_run" * case.startswith("shared"))
        for of_step, expected_of_step in zip(found["advantages"], expected["advantages"], strict=True):
            for of_group, expected_of_group in zip(of_step, expected_of_step[rank::world], strict=True):
                assert of_group == pytest.approx(expected_of_group, abs=5e-5)  # likewise


# Metrics.


def test_metrics_are_those_of_the_groups(alone, load, steps_of):
    """Of the first step, where policy and model on disk are the same."""
    groups, metrics, model = steps_of("plain")[0], alone("nothing_skipped")["metrics"][0], load()
    rewards = [reward for group in groups for reward in group.rewards]
    rollouts = [rollout for group in groups for rollout in group.group.rollouts]
    valid = [reward for reward in rewards if not reward.error]
    mean = sum(r.components[0] + 0.5 * r.components[1] for r in valid) / len(valid)
    assert metrics["reward/mean"] == pytest.approx(mean)
    assert metrics["reward/exact_match"] == pytest.approx(sum(r.components[0] for r in valid) / len(valid))
    assert metrics["reward/format"] == pytest.approx(sum(r.components[1] for r in valid) / len(valid))
    totals = [[r.components[0] + 0.5 * r.components[1] for r in group.rewards if not r.error] for group in groups]
    flat = [value for group in totals for value in group]
    spread = math.sqrt(sum((value - mean) ** 2 for value in flat) / (len(flat) - 1))
    assert metrics["reward/std"] == pytest.approx(spread)
    sampled = [group for group, s in zip(totals, groups, strict=True) if s.group.rollouts]
    without = sum(len(set(group)) <= 1 for group in sampled)
    assert without >= 3, "two groups without spread, one of which all failed"
    assert metrics["reward/frac_zero_std"] == pytest.approx(without / 11)
    assert metrics["reward/num_failed"] == metrics["faults/reward_failed"] == 2 + 4
    assert metrics["completions/num"] == 44
    lengths = [len(rollout.completion_ids) for rollout in rollouts]
    assert metrics["completions/mean_length"] == pytest.approx(sum(lengths) / 44)
    assert metrics["completions/max_length"] == max(lengths)
    assert metrics["completions/clipped_ratio"] == pytest.approx(sum(n == 9 for n in lengths) / 44)
    assert metrics["policy/skipped_token_fraction"] == 0.0

    differences, entropies = [], []
    for group in groups:
        for rollout, reward in zip(group.group.rollouts, group.rewards, strict=True):
            if reward.error:
                continue
            logprobs, entropy = plain_scores(model, group.group.prompt.prompt_ids, rollout.completion_ids, 1.0)
            differences.append(logprobs.detach() - torch.tensor(rollout.behaviour_logprobs))
            entropies.append(entropy.detach())
    difference = torch.cat(differences).double()
    assert metrics["sampling/logprob_diff"] == pytest.approx(difference.abs().mean().item(), rel=1e-4)
    assert metrics["sampling/logprob_diff_max"] == pytest.approx(difference.abs().max().item(), rel=1e-4)
    assert metrics["sampling/is_ratio_mean"] == pytest.approx(difference.exp().mean().item(), rel=1e-4)
    assert metrics["sampling/is_clipped_fraction"] == pytest.approx((difference.exp() > 2).double().mean().item())
    assert metrics["policy/entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-4)
    assert metrics["policy/clip_fraction"] == 0.0  # one update: the policy is its own snapshot
    assert metrics["policy/lr"] == 5e-3


def test_gradient_norms_are_those_of_the_formulas(alone, load, model_dir, steps_of):
    expected = reference_updates(load, case_config(model_dir, "plain"), steps_of("plain"))
    assert [m["policy/grad_norm"] for m in alone("plain")["metrics"]] == pytest.approx(expected["norms"], rel=1e-4)


def test_the_skipped_share_counts_the_tokens_of_groups_without_advantage(alone, steps_of):
    for step, metrics in enumerate(alone("plain")["metrics"]):
        counted = skipped = 0
        for group in steps_of("plain")[step]:
            tokens = sum(
                len(rollout.completion_ids)
                for rollout, reward in zip(group.group.rollouts, group.rewards, strict=True)
                if not reward.error
            )
            counted += tokens
            values = {r.components[0] + 0.5 * r.components[1] for r in group.rewards if not r.error}
            skipped += tokens if len(values) <= 1 else 0
        assert skipped > 0
        assert metrics["policy/skipped_token_fraction"] == pytest.approx(skipped / counted)


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mean"])
def test_means_are_over_the_tokens_that_were_looked_at(level, load, model_dir, steps_of):
    """A sampler that agrees with the learner has a ratio of 1 and full effective sample size, whatever was skipped."""
    groups = []
    model = load()
    for scored in steps_of("plain")[0]:
        rollouts = []
        for rollout in scored.group.rollouts:
            with torch.no_grad():
                logprobs, _ = plain_scores(model, scored.group.prompt.prompt_ids, rollout.completion_ids, 1.0)
            rollouts.append(replace(rollout, behaviour_logprobs=logprobs.tolist()))
        groups.append(replace(scored, group=replace(scored.group, rollouts=rollouts)))
    config = case_config(model_dir, "plain")
    correction = config.algorithm.correction.model_copy(update={"level": level})
    config = config.model_copy(update={"algorithm": config.algorithm.model_copy(update={"correction": correction})})
    (metrics,) = run_updates(0, 1, config, [groups])["metrics"]
    assert metrics["policy/skipped_token_fraction"] > 0.1
    assert metrics["sampling/is_ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["sampling/effective_sample_size"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["sampling/logprob_diff"] < 1e-5


def test_kl_of_the_reward_is_over_all_tokens_skipped_or_not(alone, model_dir, steps_of):
    config = case_config(model_dir, "kl_in_reward")
    learner = config.learner.model_copy(update={"skip_zero_advantages": False})
    unskipped = run_updates(0, 1, config.model_copy(update={"learner": learner}), steps_of("plain"))["metrics"]
    kl = [metrics["policy/kl"] for metrics in alone("kl_in_reward")["metrics"]]
    assert kl[0] == pytest.approx(0.0, abs=1e-6)  # the policy is the reference
    assert abs(kl[1]) > 1e-3
    assert kl == pytest.approx([metrics["policy/kl"] for metrics in unskipped], abs=1e-6)


def test_a_steered_coefficient_moves_with_the_kl_and_is_reported(model_dir, steps_of):
    config = case_config(model_dir, "kl_in_loss")
    kl = config.algorithm.kl.model_copy(update={"target": 1e-4, "horizon": 44})
    config = config.model_copy(update={"algorithm": config.algorithm.model_copy(update={"kl": kl})})
    metrics = run_updates(0, 1, config, steps_of("plain"))["metrics"]
    # KL 0 in the first step: error -1 is clipped to -0.2, and 44 rollouts of a horizon of 44 apply it whole.
    assert [m["policy/kl_coef"] for m in metrics] == pytest.approx([0.4, 0.4 * 0.8])


@pytest.mark.parametrize("placement", ["loss", "reward"])
def test_a_step_in_which_no_token_counts_does_not_steer(placement, model_dir, steps_of):
    cut = [
        replace(g, group=replace(g.group, rollouts=[replace(r, finish_reason="length") for r in g.group.rollouts]))
        for g in steps_of("plain")[0]
    ]
    kl = {"coef": 0.4, "target": 1e-4, "horizon": 44, "placement": placement}
    algorithm = AlgorithmConfig.model_validate({"kl": kl, "overlong": {"mask": True}})
    config = case_config(model_dir, "plain").model_copy(update={"algorithm": algorithm})
    metrics = run_updates(0, 1, config, [cut, steps_of("plain")[1]])["metrics"]
    assert [m["policy/kl_coef"] for m in metrics] == [0.4, 0.4]
    assert ["policy/kl" in m for m in metrics] == [False, True]


def test_the_steered_coefficient_is_the_one_that_trains(model_dir, steps_of):
    """A second step with the coefficient moved equals one that was configured so."""
    config = case_config(model_dir, "kl_in_loss")

    def run(**kl: float) -> dict[str, Any]:
        settings = config.algorithm.kl.model_copy(update=kl)
        algorithm = config.algorithm.model_copy(update={"kl": settings})
        return run_updates(0, 1, config.model_copy(update={"algorithm": algorithm}), steps_of("plain"))

    # The first step's KL is 0 whatever the coefficient (the policy is the reference), and its error is clipped to -0.2.
    steered = run(target=1e-4, horizon=44)["weights"]
    assert largest_difference(steered, run(coef=0.4 * 0.8)["weights"]) < 1e-6
    assert largest_difference(steered, run(coef=0.4)["weights"]) > 1e-5


# What a step costs.


def passes_of(config, groups) -> tuple[int, int, int]:
    """Passes of one step (the second: the first also checks itself): with gradient, without, and of the reference."""
    _, engine, updater, _ = build_policy(config)
    updater.update(groups, 0)
    trained, scored, referred = [], [], []
    decoder = engine.module.module.get_decoder()
    decoder.register_forward_hook(lambda *_: (trained if torch.is_grad_enabled() else scored).append(1))
    if updater._reference is not None:
        updater._reference.get_decoder().register_forward_hook(lambda *_: referred.append(1))
    updater.update(groups, 1)
    return len(trained), len(scored), len(referred)


@pytest.mark.parametrize(
    ("algorithm", "scored", "referred"),
    [
        ({}, 0, 0),  # the only update is its own snapshot
        ({"epochs": 3}, 1, 0),  # once, not for each epoch
        ({"mini_batches": 2}, 1, 0),
        ({"epochs": 2, "mini_batches": 2}, 1, 0),
        ({"kl": {"coef": 0.1}}, 0, 1),
        ({"kl": {"coef": 0.1}, "epochs": 2}, 1, 1),
        ({"kl": {"coef": 0.1, "placement": "reward"}}, 1, 1),  # the estimate needs the learner's own log-probabilities
    ],
    ids=str,
)
def test_with_one_update_no_extra_pass_is_made(algorithm, scored, referred, model_dir, steps_of):
    base = case_config(model_dir, "nothing_skipped")
    config = base.model_copy(update={"algorithm": AlgorithmConfig(**algorithm)})
    updates = config.algorithm.updates_per_step
    assert passes_of(config, steps_of("plain")[0]) == (updates, scored, referred)  # a pass holds all the groups


# What stops a run.


def with_failures(groups: list, share: float) -> list:
    """The groups, with the first rewards failed so that they are `share` of all."""
    left = round(share * sum(len(group.rewards) for group in groups))
    changed = []
    for group in groups:
        num = min(left, len(group.rewards))
        good = [Reward(total=float(i), components=[float(i), 0.0]) for i in range(len(group.rewards) - num)]
        changed.append(replace(group, rewards=[FAILED] * num + good))
        left -= num
    return changed


@pytest.mark.parametrize(("share", "stops"), [(0.25, False), (0.5, False), (24 / 44, True), (1.0, True)])
def test_too_many_failed_rewards_stop_the_run(share, stops, model_dir, steps_of):
    config = case_config(model_dir, "plain")
    config = config.model_copy(update={"reward": config.reward.model_copy(update={"max_error_share": 0.5})})
    steps = [with_failures(steps_of("plain")[0], share)]
    if not stops:
        assert run_updates(0, 1, config, steps)["metrics"][0]["faults/reward_failed"] == 44 * share
        return
    percent = f"{share:.0%}"
    with pytest.raises(RuntimeError, match=rf"{percent} of the step's 44 rollouts .*max_error_share \(50%\)"):
        run_updates(0, 1, config, steps)


def test_a_step_whose_groups_all_failed_says_so(model_dir, steps_of):
    failed = [g for g in steps_of("plain")[0] if not g.group.rollouts]
    with pytest.raises(RuntimeError, match="no engine could serve it"):
        run_updates(0, 1, case_config(model_dir, "plain"), [failed * GROUPS_PER_STEP])


def test_a_step_in_which_nothing_can_be_learnt_leaves_a_fresh_policy_as_it_is(model_dir, steps_of, load):
    same = Reward(total=1.0, components=[1.0, 0.0])
    alike = [replace(g, rewards=[same] * len(g.rewards)) for g in steps_of("plain")[0]]
    config = case_config(model_dir, "plain")
    optimizer = config.learner.optimizer.model_copy(update={"weight_decay": 0.0})
    config = config.model_copy(update={"learner": config.learner.model_copy(update={"optimizer": optimizer})})
    result = run_updates(0, 1, config, [alike])
    assert largest_difference(result["weights"], dict(load().named_parameters())) == 0.0
    metrics = result["metrics"][0]
    assert (metrics["policy/grad_norm"], metrics["policy/loss"], metrics["reward/frac_zero_std"]) == (0.0, 0.0, 1.0)
    assert metrics["policy/skipped_token_fraction"] == 1.0
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize(
    "algorithm", [{}, {"kl": {"coef": 0.1}, "entropy_coef": 0.01}, {"preset": "gspo", "epochs": 2}]
)
@pytest.mark.parametrize("what", ["empty", "truncated"])
def test_a_step_of_empty_or_cut_off_completions_only(what, algorithm, model_dir, steps_of, load):
    """Nothing counts: loss 0, no gradient, weights as they were; and the next step trains."""

    def spoil(rollout):
        if what == "empty":
            return replace(rollout, completion_ids=[], behaviour_logprobs=[])
        return replace(rollout, finish_reason="length")

    first, second = steps_of("plain")
    spoilt = [
        replace(g, group=replace(g.group, rollouts=[spoil(rollout) for rollout in g.group.rollouts])) for g in first
    ]
    config = case_config(model_dir, "plain")
    optimizer = config.learner.optimizer.model_copy(update={"weight_decay": 0.0})
    learner = config.learner.model_copy(update={"optimizer": optimizer})
    settings = AlgorithmConfig(**algorithm, overlong={"mask": True})
    config = config.model_copy(update={"learner": learner, "algorithm": settings})
    start = dict(load().named_parameters())
    result = run_updates(0, 1, config, [spoilt])
    assert largest_difference(result["weights"], start) == 0.0
    (metrics,) = result["metrics"]
    assert (metrics["policy/loss"], metrics["policy/grad_norm"]) == (0.0, 0.0)
    assert metrics["completions/clipped_ratio"] == (1.0 if what == "truncated" else pytest.approx(0.2, abs=0.2))
    assert metrics["completions/mean_length"] == 0.0 or what == "truncated"
    assert metrics["reward/frac_zero_std"] < 1.0, "the rewards do differ"
    assert all(math.isfinite(value) for value in metrics.values())
    assert largest_difference(run_updates(0, 1, config, [spoilt, second])["weights"], start) > 1e-4


def test_an_update_without_gradient_beside_one_with(model_dir, steps_of):
    """The first mini-batch has no spread: its tokens are unknown to the metrics, the second's are what they tell."""
    groups = [
        replace(g, rewards=[Reward(total=1.0, components=[1.0, 0.0])] * len(g.rewards)) if place < 6 else g
        for place, g in enumerate(steps_of("plain")[0])
    ]
    config = case_config(model_dir, "plain")
    algorithm = config.algorithm.model_copy(update={"mini_batches": 2})
    for order in (groups, [*groups[6:], *groups[:6]]):
        (metrics,) = run_updates(0, 1, config.model_copy(update={"algorithm": algorithm}), [order])["metrics"]
        assert 0.5 < metrics["policy/skipped_token_fraction"] < 1.0
        assert metrics["policy/entropy"] > 0.1 and metrics["sampling/is_ratio_mean"] > 0.5


def test_a_loss_that_is_not_finite_stops_the_run(model_dir, steps_of):
    config = case_config(model_dir, "plain")
    groups = steps_of("plain")[0]
    first = groups[0].group.rollouts[0]
    broken = replace(first, behaviour_logprobs=[math.nan] * len(first.completion_ids))
    rollouts = [broken, *groups[0].group.rollouts[1:]]
    groups = [replace(groups[0], group=replace(groups[0].group, rollouts=rollouts)), *groups[1:]]
    with pytest.raises(RunStopped, match="loss of update 0 is nan"):
        run_updates(0, 1, config, [groups])
