"""The algorithm's part of a run's configuration: presets, overrides, refusals, and that every setting has an effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from raygrpo.algorithm import (
    adapt_kl_coef,
    compute_advantages,
    kl_reward,
    overlong_penalty,
    policy_loss,
    rollout_loss_mask,
)
from raygrpo.config import AlgorithmConfig, RunConfig
from raygrpo.config_file import load_config
from raygrpo.presets import PRESETS, preset_fields
from tests.algorithm.batches import random_batch

RUN = {
    "num_steps": 1,
    "groups_per_step": 8,
    "model": {"path": "some/model"},
    "data": {"source": "some/dataset"},
    "reward": {"functions": [{"use": "exact_match"}]},
}


def load(tmp_path: Path, algorithm: Any = None, *overrides: str, **sections: Any) -> RunConfig:
    tree = RUN | sections | ({} if algorithm is None else {"algorithm": algorithm})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_config(path, list(overrides))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_loads_and_says_what_it_set(name: str, tmp_path: Path) -> None:
    algorithm = load(tmp_path, name).algorithm
    fields = preset_fields(algorithm)
    assert fields and all(field.value == field.preset_value for field in fields)
    assert {"algorithm.loss", "algorithm.advantage.baseline", "algorithm.aggregation"} <= {
        field.key for field in fields
    }
    assert str(fields[0]) == "algorithm.advantage.baseline = " + algorithm.advantage.baseline


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_of_presets_in_the_docs_says_the_same(name: str) -> None:
    docs = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()
    (row,) = [line.split("|") for line in docs.splitlines() if line.startswith(f"| `{name}` ")]
    algorithm = AlgorithmConfig(preset=name)
    advantage = algorithm.advantage
    scale = {"group": "group std", "none": "none"}[advantage.scale]
    words = [advantage.baseline, scale, "per reward" if advantage.per_reward else "", "then whitened"]
    words = [word for word in words[: 3 + (advantage.whiten != "none")] if word]
    assert row[2].strip() == ", ".join(words)
    assert row[3].strip() == f"{algorithm.loss}, {algorithm.ratio}"
    if algorithm.loss == "ppo_clip":
        assert [float(bound) for bound in row[4].split("/")] == [algorithm.clip_low, algorithm.clip_high]
    assert row[5].strip() == algorithm.aggregation
    assert (str(algorithm.kl.coef) in row[6]) == (algorithm.kl.coef > 0)
    assert (f"dynamic sampling {algorithm.dynamic_sampling}" in row[6]) == (algorithm.dynamic_sampling > 0)


def test_no_preset_is_the_documented_default(tmp_path: Path) -> None:
    algorithm = load(tmp_path).algorithm
    assert (algorithm.advantage.baseline, algorithm.advantage.scale, algorithm.advantage.eps) == (
        "group",
        "group",
        1e-6,
    )
    assert (algorithm.clip_low, algorithm.clip_high, algorithm.aggregation) == (0.2, 0.2, "token_mean")
    assert (algorithm.kl.coef, algorithm.correction.level, preset_fields(algorithm)) == (0.0, "token", [])


@pytest.mark.parametrize(
    "algorithm, overrides",
    [
        ({"preset": "grpo", "kl": {"coef": 0.5}}, []),
        ("grpo", ["algorithm.kl.coef=0.5"]),
        (None, ["algorithm=grpo", "algorithm.kl.coef=0.5"]),
        ({"preset": "dapo", "kl": {"coef": 0.5}}, ["algorithm=grpo"]),
        ({"preset": "grpo", "kl": {"coef": 9.0}}, ["algorithm.kl.coef=0.5"]),
    ],
)
def test_any_field_of_a_preset_can_be_overridden(algorithm: Any, overrides: list[str], tmp_path: Path) -> None:
    resolved = load(tmp_path, algorithm, *overrides).algorithm
    assert (resolved.kl.coef, resolved.kl.estimator, resolved.aggregation) == (0.5, "k3", "sequence_mean")
    printed = {str(field) for field in preset_fields(resolved)}
    assert "algorithm.kl.coef = 0.5 (the preset's 0.04 is overridden)" in printed


def test_a_resolved_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    config = load(tmp_path, {"preset": "dr_grpo", "clip_high": 0.3})
    assert RunConfig.model_validate(config.model_dump()) == config
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


def test_sequence_sum_divides_by_the_longest_completion_unless_told_otherwise(tmp_path: Path) -> None:
    sampling = {"sampling": {"max_tokens": 77}}
    assert load(tmp_path, "dr_grpo", generator=sampling).algorithm.aggregation_length == 77
    told = load(tmp_path, "dr_grpo", "algorithm.aggregation_length=10", generator=sampling)
    assert told.algorithm.aggregation_length == 10
    assert load(tmp_path, "grpo", generator=sampling).algorithm.aggregation_length is None


@pytest.mark.parametrize(
    "algorithm, message",
    [
        ("gropo", r"unknown algorithm\.preset 'gropo': did you mean 'grpo'\?"),
        ("zzz", r"unknown algorithm\.preset 'zzz': known are grpo, dr_grpo, dapo"),
        ({"clip_hihg": 0.3}, r"unknown key 'algorithm\.clip_hihg': did you mean 'clip_high'\?"),
        ({"preset": "grpo", "kl": {"coeff": 1}}, r"unknown key 'algorithm\.kl\.coeff': did you mean 'coef'\?"),
        ({"kl": {"target": 0.1}}, r"kl\.target \(0\.1\) multiplies kl\.coef, which is 0"),
        ({"kl": {"placement": "reward", "gradient": "k2"}}, r"kl\.gradient \(k2\) is for kl\.placement loss"),
        ({"correction": {"floor": 3.0}}, r"correction\.floor \(3\.0\) is above correction\.cap \(2\.0\)"),
        ({"advantage": {"baseline": "none"}}, r"advantage\.scale group needs a baseline"),
        ({"dual_clip": 3.0, "loss": "sapo"}, r"dual_clip \(3\.0\) belongs to loss ppo_clip, not to sapo"),
        ({"dual_clip": 1.1}, r"dual_clip \(1\.1\) must be above 1 \+ clip_high \(0\.2\)"),
        ({"clip_low": 1.5}, r"clip_low \(1\.5\) is above 1"),
        ({"mini_batches": 3}, r"a learner's groups \(8 of .* do not divide into algorithm\.mini_batches \(3\)"),
    ],
)
def test_bad_settings_are_refused_with_both_values(algorithm: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, algorithm)


@pytest.mark.parametrize("cut", ["top_p: 0.9", "top_k: 20", "min_p: 0.05"])
def test_biased_sampling_needs_the_correction(cut: str, tmp_path: Path) -> None:
    sampling = {"sampling": yaml.safe_load(cut)}
    with pytest.raises(ValueError, match=f"{cut.replace(': ', '=')} but algorithm.correction.level is none"):
        load(tmp_path, {"correction": {"level": "none"}}, generator=sampling)
    assert load(tmp_path, generator=sampling).algorithm.correction.level == "token"


def test_mini_batches_count_a_learners_own_groups(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"groups \(2 of .*mini_batches \(4\)"):
        load(tmp_path, {"mini_batches": 4}, learner={"num_workers": 4})
    assert load(tmp_path, {"mini_batches": 4, "epochs": 3}).algorithm.updates_per_step == 12


def everything(settings: AlgorithmConfig) -> list[torch.Tensor]:
    """All that this package computes of one fixed batch."""
    batch = random_batch(3, spread=0.7)
    rewards = torch.tensor([[i % 3, i % 4 - 1] for i in range(batch.num_rollouts)], dtype=torch.float64)
    advantages = compute_advantages(rewards, batch.group_index, settings, num_tokens=batch.lengths)
    if settings.kl.placement == "reward":
        advantages = advantages + kl_reward(
            batch.old_logprobs,
            batch.ref_logprobs,
            batch.loss_mask,
            batch.rollout_index,
            settings,
            num_rollouts=batch.num_rollouts,
        )
    long = batch.lengths > 8
    mask = rollout_loss_mask(batch.rollout_index, settings, failed=long & False, truncated=long, tokens=batch.loss_mask)
    loss, _ = policy_loss(
        batch.logprobs,
        batch.old_logprobs,
        advantages + overlong_penalty(batch.lengths, 12, settings),
        mask,
        batch.rollout_index,
        settings,
        behaviour_logprobs=batch.behaviour_logprobs,
        ref_logprobs=batch.ref_logprobs,
        entropy=batch.entropy,
    )
    steered = torch.tensor(adapt_kl_coef(settings.kl.coef, 0.7, 64, settings))
    return [loss, *torch.autograd.grad(loss, [batch.logprobs, batch.entropy], materialize_grads=True), steered]


EFFECTS = [  # a field and two values that must differ, with what else the field needs
    ("preset", None, "rloo", {}),
    ("advantage.baseline", "group", "leave_one_out", {}),
    ("advantage.scale", "group", "batch", {}),
    ("advantage.scale", "group", "none", {}),
    ("advantage.per_reward", False, True, {}),
    ("advantage.whiten", "none", "rollouts", {}),
    ("advantage.whiten", "rollouts", "tokens", {}),
    ("advantage.eps", 1e-6, 1e-1, {}),
    ("loss", "ppo_clip", "cispo", {}),
    ("loss", "ppo_clip", "sapo", {}),
    ("ratio", "token", "sequence", {}),
    ("ratio", "sequence", "sequence_mean", {}),
    ("clip_low", 0.2, 0.1, {}),
    ("clip_high", 0.2, 0.3, {}),
    ("dual_clip", None, 1.3, {}),
    ("sapo_temperature_positive", 1.0, 2.0, {"loss": "sapo"}),
    ("sapo_temperature_negative", 1.05, 2.0, {"loss": "sapo"}),
    ("aggregation", "token_mean", "sequence_mean", {}),
    ("aggregation", "token_mean", "sequence_sum", {"aggregation_length": 7}),
    ("aggregation_length", 7, 8, {"aggregation": "sequence_sum"}),
    ("kl.coef", 0.0, 0.1, {}),
    ("kl.estimator", "k1", "k2", {"kl": {"coef": 0.1}}),
    ("kl.estimator", "k2", "k3", {"kl": {"coef": 0.1}}),
    ("kl.placement", "loss", "reward", {"kl": {"coef": 0.1}}),
    ("kl.gradient", "estimator", "k2", {"kl": {"coef": 0.1}}),
    ("kl.gradient", "estimator", "ratio", {"kl": {"coef": 0.1}}),
    ("kl.target", None, 0.1, {"kl": {"coef": 0.1}}),
    ("kl.horizon", 100, 1000, {"kl": {"coef": 0.1, "target": 0.1}}),
    ("correction.level", "none", "token", {}),
    ("correction.level", "token", "sequence", {}),
    ("correction.level", "sequence", "sequence_mean", {}),
    ("correction.action", "truncate", "mask", {}),
    ("correction.floor", 0.0, 0.8, {}),
    ("correction.cap", 2.0, 1.2, {}),
    ("entropy_coef", 0.0, 0.1, {}),
    ("overlong.mask", False, True, {}),
    ("overlong.buffer", 0.0, 0.5, {}),
    ("overlong.penalty", 1.0, 0.5, {"overlong": {"buffer": 0.5}}),
]
ELSEWHERE = {"dynamic_sampling", "epochs", "mini_batches"}  # the stream's and the learner's to obey, and to test


@pytest.mark.parametrize("field, value, other, rest", EFFECTS)
def test_every_setting_has_an_effect(field: str, value: Any, other: Any, rest: dict) -> None:
    def with_value(chosen: Any) -> AlgorithmConfig:
        section, _, leaf = field.rpartition(".")
        changed = {section: rest.get(section, {}) | {leaf: chosen}} if section else {leaf: chosen}
        return AlgorithmConfig(**rest | changed)

    pairs = zip(everything(with_value(value)), everything(with_value(other)), strict=True)
    assert any((a - b).abs().max() > 1e-6 for a, b in pairs)


def test_no_setting_is_missing_from_the_effects() -> None:
    def leaves(section: Any, prefix: str = "") -> set[str]:
        found = set()
        for name, field in section.model_fields.items():
            nested = hasattr(field.annotation, "model_fields")
            found |= leaves(field.annotation, f"{prefix}{name}.") if nested else {prefix + name}
        return found

    assert leaves(AlgorithmConfig) - ELSEWHERE == {field for field, *_ in EFFECTS}
