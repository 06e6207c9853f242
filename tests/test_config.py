"""Reading a run's YAML: overrides, paths, refusals, and what a message says."""

import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from raygrpo.algorithm_config import AlgorithmConfig
from raygrpo.config import LearnerConfig, RunConfig
from raygrpo.config_file import load_config
from raygrpo.presets import PRESETS
from raygrpo.section import Section, merge
from tests.conftest import TINY_RUN, run_config


@pytest.fixture
def load(tmp_path, monkeypatch):
    """load(*overrides, **settings) writes the settings to conf/run.yaml and loads them from another directory."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def load(*overrides: str, **settings: Any) -> RunConfig:
        tree = merge({key: value for key, value in TINY_RUN.items() if key != "name"}, settings)
        path = tmp_path / "conf" / "run.yaml"
        path.write_text(yaml.safe_dump(tree))
        return load_config(path, list(overrides))

    return load


def refusal(load, *overrides: str, **settings: Any) -> str:
    with pytest.raises(ValueError) as refused:
        load(*overrides, **settings)
    assert not isinstance(refused.value, ValidationError), "pydantic's own report is not for users"
    return str(refused.value)


def section_classes() -> list[type[Section]]:
    """All classes of the tree."""
    found: list[type[Section]] = []

    def walk(section: type[Section]) -> None:
        found.append(section)
        for field in section.model_fields.values():
            for kind in (field.annotation, *typing.get_args(field.annotation)):
                if isinstance(kind, type) and issubclass(kind, Section):
                    walk(kind)

    walk(RunConfig)
    return found


def section_at(tree: dict[str, Any], path: str) -> dict[str, Any]:
    for part in path.split(".") if path else []:
        tree = tree.setdefault(part, {})
    return tree


# Unknown keys.


@pytest.mark.parametrize(
    ("section", "typo", "nearest"),
    [
        ("", "grop_size", "group_size"),
        ("", "modell", "model"),
        ("data", "soruce", "source"),
        ("generator", "num_actor", "num_actors"),
        ("generator.sampling", "temprature", "temperature"),
        ("learner.optimizer", "learning_rate_warmup_steps", "warmup_steps"),
        ("algorithm.kl", "coeff", "coef"),
        ("algorithm.overlong", "buffers", "buffer"),
        ("tracking", "sample_every", "samples_every"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(load, section, typo, nearest):
    settings: dict[str, Any] = {}
    section_at(settings, section)[typo] = 1
    place = f"{section}.{typo}" if section else typo
    assert f"unknown key {place!r}: did you mean {nearest!r}?" in refusal(load, **settings)
    assert f"unknown key {place!r}: did you mean {nearest!r}?" in refusal(load, f"{place}=1")


def test_an_unknown_key_in_a_list_says_which_element(load):
    functions = [{"use": "exact_match"}, {"use": "format", "wieght": 2}]
    message = refusal(load, reward={"functions": functions})
    assert "unknown key 'reward.functions.1.wieght': did you mean 'weight'?" in message


def test_where_nothing_is_near_all_known_keys_are_listed(load):
    message = refusal(load, **{"generator": {"sampling": {"zzz": 1}}})
    assert "known here: max_tokens, temperature, top_p, top_k, min_p" in message


def test_every_problem_gets_a_line(load):
    message = refusal(load, seed=-1, learner={"num_worker": 2}, data={"sourc": "x"})
    assert message.count("\n") == 3
    assert "'learner.num_worker'" in message and "'data.sourc'" in message
    assert "seed: Input should be greater than or equal to 0 (got -1)" in message


def test_a_missing_key_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: x}\ndata: {}\nnum_steps: 1\n")
    message = refusal(load_config, path)
    for key in ("data.source", "groups_per_step", "reward"):
        assert f"missing key {key!r}" in message


# Files.


@pytest.mark.parametrize(
    ("text", "said"), [("a: [1", "is not valid YAML"), ("- 1", "must hold a mapping"), ("", "must hold a mapping")]
)
def test_a_file_that_is_no_configuration(tmp_path, text, said):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert said in refusal(load_config, path) and str(path) in refusal(load_config, path)


def test_a_file_that_is_not_there(tmp_path):
    message = refusal(load_config, tmp_path / "no.yaml")
    assert "no.yaml" in message and "No such file" in message


def test_a_directory_or_a_binary_file_is_refused(tmp_path):
    assert "cannot read" in refusal(load_config, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x00\xff\xfe")
    assert str(path) in refusal(load_config, path)


# Overrides.


def test_an_override_replaces_one_setting_and_leaves_its_neighbours(load):
    config = load(
        "seed=3",
        "learner.optimizer.lr=1e-5",
        "generator.sampling={top_k: 5}",
        "data.answer=null",
        generator={"sampling": {"temperature": 0.5}, "num_actors": 2},
        learner={"optimizer": {"lr": 1e-3, "weight_decay": 0.1}},
    )
    assert config.seed == 3
    assert (config.learner.optimizer.lr, config.learner.optimizer.weight_decay) == (1e-5, 0.1)
    assert config.data.answer is None
    sampling = config.generator.sampling
    assert (config.generator.num_actors, sampling.temperature, sampling.top_k) == (2, 0.5, 5)


def test_a_list_is_replaced_whole(load):
    config = load("reward.functions=[{use: format}]", reward={"functions": [{"use": "exact_match", "weight": 3}]})
    assert [(f.use, f.weight) for f in config.reward.functions] == [("format", 1.0)]


@pytest.mark.parametrize(("override", "said"), [("seed", "key=value"), ("=3", "key=value"), ("a=[1", "valid YAML")])
def test_an_override_that_is_none(load, override, said):
    message = refusal(load, override)
    assert said in message and repr(override) in message


def test_overrides_that_contradict_each_other(load):
    assert "'learner=3'" not in refusal(load, "learner=3", "learner.num_workers=2")
    assert "learner" in refusal(load, "learner=3", "learner.num_workers=2")


def test_of_two_overrides_of_one_key_the_last_wins(load):
    assert load("seed=1", "seed=2").seed == 2


@pytest.mark.parametrize("text", ["5e8", "5E+8", "500000000.0", "5.0e8", "5.e8", "+5e8"])
def test_a_number_in_pass_through_options_is_a_number_however_it_is_written(load, text):
    """YAML 1.1 takes 5e8 for a text; DeepSpeed, vLLM and reward functions must get the number."""
    config = load(f"learner.deepspeed.zero_optimization.reduce_bucket_size={text}", f"generator.vllm.x=[{text}]")
    bucket, listed = config.learner.deepspeed["zero_optimization"]["reduce_bucket_size"], config.generator.vllm["x"]
    assert isinstance(bucket, float) and bucket == 5e8
    assert listed == [5e8] and isinstance(listed[0], float)


def test_a_number_in_the_yaml_is_a_number_too(tmp_path):
    path = tmp_path / "run.yaml"
    functions = '{functions: [{use: "m:f", args: {tolerance: 1e-5, name: "1e-5", version: e5}}]}'
    path.write_text(
        f"{{num_steps: 1, groups_per_step: 1, model: {{path: x}}, data: {{source: y}}, reward: {functions}}}"
    )
    args = load_config(path).reward.functions[0].args
    assert args == {"tolerance": 1e-5, "name": "1e-5", "version": "e5"}


# Paths.


def test_paths_in_the_yaml_are_meant_from_its_directory(load, tmp_path):
    config = load(model={"path": "../models/a"}, data={"source": "rows.jsonl"})
    assert config.model.path == str(tmp_path / "models" / "a")
    assert config.data.source == str(tmp_path / "conf" / "rows.jsonl")


def test_paths_in_an_override_are_meant_from_the_current_directory(load, tmp_path):
    config = load("model.path=./a", "data.source=../b/*.parquet")
    assert config.model.path == str(tmp_path / "elsewhere" / "a")
    assert config.data.source == str(tmp_path / "b" / "*.parquet")


def test_a_directory_that_exists_is_a_path_and_a_hub_name_is_not(load, tmp_path):
    assert load(model={"path": "org/name"}).model.path == "org/name"
    (tmp_path / "conf" / "org" / "name").mkdir(parents=True)
    assert load(model={"path": "org/name"}).model.path == str(tmp_path / "conf" / "org" / "name")


def test_a_home_directory_is_expanded(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load(model={"path": "~/a"}).model.path == "/home/somebody/a"


def test_a_function_stays_a_function(load):
    assert load(data={"source": "task:rows", "args": {"n": 3}}).data.source == "task:rows"


# Combinations that cannot be meant.


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        ({"groups_per_step": 6, "learner": {"num_workers": 4}}, ["groups_per_step (6)", "learner.num_workers (4)"]),
        (
            {"groups_per_step": 6, "learner": {"num_workers": 2}, "algorithm": {"mini_batches": 2}},
            ["groups_per_step 6", "algorithm.mini_batches (2)", "3 "],
        ),
        ({"data": {"args": {"n": 3}}}, ["{'n': 3}", "rows.jsonl"]),
        ({"data": {"subset": "main"}}, ["main", "rows.jsonl"]),
        ({"reward": {"functions": [{"use": "m:f"}, {"use": "other:f"}]}}, ["f, f", "name"]),
        ({"reward": {"functions": [{"use": "m:std"}]}}, ["reward/std", "name"]),
        (
            {"generator": {"sampling": {"top_k": 5}}, "algorithm": {"correction": {"level": "none"}}},
            ["top_k=5", "correction.level is none"],
        ),
        ({"algorithm": {"correction": {"floor": 3.0}}}, ["(3.0)", "(2.0)"]),
        ({"algorithm": {"loss": "sapo", "dual_clip": 3}}, ["(3.0)", "sapo"]),
        ({"algorithm": {"clip_high": 2.5, "dual_clip": 3}}, ["(3.0)", "(2.5)"]),
        ({"algorithm": {"kl": {"target": 0.1}}}, ["(0.1)", "kl.coef"]),
        ({"algorithm": {"preset": "dappo"}}, ["'dappo'", "did you mean 'dapo'?"]),
        ({"learner": {"deepspeed": {"zero_optimization": {"stage": 0}}}}, ["stage is 0", "1, 2 and 3"]),
        (
            {"generator": {"weight_transfer": "direct"}, "learner": {"num_gpus": 1}},
            ["generator.weight_transfer is direct", "learner.num_gpus 1", "generator.num_gpus is 0"],
        ),
        (
            {"generator": {"weight_transfer": "direct", "num_gpus": 0.5}, "learner": {"num_gpus": 1}},
            ["generator.weight_transfer is direct", "learner.num_gpus 1", "generator.num_gpus 0.5"],
        ),
        ({"learner": {"num_gpus": 2}}, ["learner.num_gpus is 2", "learner.num_workers"]),
        (
            {"groups_per_step": 2, "learner": {"num_gpus": 0.5, "num_workers": 2}},
            ["learner.num_gpus is 0.5", "learner.num_workers 2"],
        ),
        (
            {"generator": {"num_gpus": 1, "vllm": {"tensor_parallel_size": 2}}},
            ["generator.num_gpus is 1", "uses 2", "tensor_parallel_size"],
        ),
        ({"generator": {"num_gpus": 2}}, ["generator.num_gpus is 2", "uses 1", "tensor_parallel_size"]),
        ({"generator": {"engine": "transformers", "num_gpus": 2}}, ["generator.num_gpus is 2", "uses 1"]),
        ({"group_size": 1}, ["group_size is 1", "algorithm.advantage.baseline group"]),
        ({"group_size": 1, "algorithm": "rloo"}, ["group_size is 1", "algorithm.advantage.baseline leave_one_out"]),
        (
            {"groups_per_step": 4, "group_size": 5, "algorithm": {"kl": {"coef": 0.1, "target": 0.1, "horizon": 4}}},
            ["algorithm.kl.horizon (4)", "20 completions"],
        ),
    ],
)
def test_a_bad_combination_is_refused_with_both_values(load, settings, values):
    message = refusal(load, **settings)
    for value in values:
        assert value in message


@pytest.mark.parametrize(
    "settings",
    [
        {"learner": {"num_gpus": 0.5}},
        {"groups_per_step": 2, "learner": {"num_gpus": 1, "num_workers": 2}},
        {"generator": {"num_gpus": 0.5}},
        {"generator": {"num_gpus": 2, "vllm": {"tensor_parallel_size": 2}}},
        {"generator": {"vllm": {"tensor_parallel_size": 2}}},  # among CPUs
        {"group_size": 1, "algorithm": {"advantage": {"baseline": "none", "scale": "none", "whiten": "rollouts"}}},
        {"groups_per_step": 4, "group_size": 5, "algorithm": {"kl": {"coef": 0.1, "target": 0.1, "horizon": 5}}},
        {"groups_per_step": 4, "group_size": 5, "algorithm": {"kl": {"coef": 0.1, "horizon": 4}}},  # not steered
    ],
)
def test_what_only_looks_like_such_a_combination_is_accepted(load, settings):
    load(**settings)


@pytest.mark.parametrize("value", [3, None, "stage3", [3]])
def test_zero_options_that_are_no_mapping_are_refused(load, value):
    message = refusal(load, learner={"deepspeed": {"zero_optimization": value}})
    assert "learner.deepspeed.zero_optimization" in message and repr(value) in message


# DeepSpeed's options.


@pytest.mark.parametrize(
    ("key", "setting"),
    [
        ("train_batch_size", "groups_per_step"),
        ("train_micro_batch_size_per_gpu", "learner.max_tokens"),
        ("gradient_accumulation_steps", "learner.max_tokens"),
        ("managed_gradient_accumulation", "learner.max_tokens"),
        ("optimizer", "learner.optimizer"),
        ("scheduler", "learner.optimizer.schedule"),
        ("gradient_clipping", "learner.optimizer.max_grad_norm"),
        ("bf16", "model.dtype"),
        ("fp16", "model.dtype"),
        ("checkpoint", "follows from checkpoint"),
        ("datastates_ckpt", "follows from checkpoint"),
    ],
)
def test_what_follows_from_other_settings_cannot_be_told_to_deepspeed(load, key, setting):
    message = refusal(load, f"learner.deepspeed.{key}=1")
    assert f"learner.deepspeed.{key}" in message and setting in message


def test_options_for_deepspeed_keep_zero_stage_1_unless_they_name_another():
    assert LearnerConfig().zero_stage == 1
    assert LearnerConfig(deepspeed={"wall_clock_breakdown": True}).zero_stage == 1
    overlapped = LearnerConfig(deepspeed={"zero_optimization": {"overlap_comm": False}})
    assert overlapped.deepspeed == {"zero_optimization": {"stage": 1, "overlap_comm": False}}
    assert LearnerConfig(deepspeed={"zero_optimization": {"stage": 3}}).zero_stage == 3


# Presets.


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_its_fields_and_a_field_beside_it_wins(load, name):
    def fields(algorithm: AlgorithmConfig, values: dict[str, Any]) -> dict[str, Any]:
        dumped = algorithm.model_dump()
        return {k: fields_of(dumped[k], v) for k, v in values.items()}

    def fields_of(held: Any, value: Any) -> Any:
        return {k: fields_of(held[k], v) for k, v in value.items()} if isinstance(value, dict) else held

    plain = load(algorithm=name).algorithm
    assert plain.preset == name
    assert fields(plain, PRESETS[name]) == PRESETS[name]
    changed = load("algorithm.correction.cap=3.5", algorithm=name).algorithm
    assert changed == plain.model_copy(update={"correction": plain.correction.model_copy(update={"cap": 3.5})})
    assert load(f"algorithm={name}", "algorithm.correction.cap=3.5").algorithm == changed
    assert load(f"algorithm.preset={name}").algorithm == plain


def test_a_preset_by_override_replaces_that_of_the_yaml_and_keeps_its_fields(load):
    config = load("algorithm=dapo", algorithm={"preset": "gspo", "clip_low": 0.1})
    assert (config.algorithm.preset, config.algorithm.clip_low, config.algorithm.clip_high) == ("dapo", 0.1, 0.28)


def test_dr_grpo_divides_by_the_longest_completion(load):
    config = load("algorithm=dr_grpo", generator={"sampling": {"max_tokens": 77}})
    assert config.algorithm.aggregation_length == 77
    assert load("algorithm=dr_grpo", "algorithm.aggregation_length=9").algorithm.aggregation_length == 9


# The whole tree.


@pytest.mark.parametrize("algorithm", [None, *PRESETS])
def test_a_configuration_is_the_same_after_a_round_trip(algorithm):
    config = run_config(
        seed=5,
        algorithm={"preset": algorithm, "entropy_coef": 0.25},
        data={"chat_template_kwargs": {"enable_thinking": False}},
        generator={"vllm": {"max_model_len": 64}},
        learner={"deepspeed": {"zero_optimization": {"stage": 2}}, "optimizer": {"betas": [0.8, 0.95]}},
        reward={"functions": [{"use": "numeric_match", "args": {"tolerance": 0.1}}, {"use": "format", "name": "f"}]},
    )
    assert RunConfig.model_validate(config.model_dump()) == config
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    assert RunConfig.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_the_name_is_the_file_name_unless_it_is_set(load):
    assert load().name == "run"
    assert load(name="other").name == "other"
    assert load("name=third").name == "third"


def test_every_section_refuses_unknown_keys_and_changes():
    config = run_config()
    for section in section_classes():
        assert section.model_config["extra"] == "forbid"
        assert section.model_config["frozen"] is True
    with pytest.raises(ValidationError):
        config.learner.num_workers = 2  # type: ignore[misc]


def test_every_setting_that_its_name_does_not_explain_is_explained():
    unexplained = {
        f"{section.__name__}.{name}"
        for section in section_classes()
        for name, field in section.model_fields.items()
        if not field.description and not (isinstance(field.annotation, type) and issubclass(field.annotation, Section))
    }
    assert unexplained <= {
        "OptimizerConfig.betas", "OptimizerConfig.eps", "OptimizerConfig.weight_decay", "RewardConfig.functions",
        "CorrectionConfig.floor", "CorrectionConfig.cap",
    }  # fmt: skip


def test_the_yaml_files_of_the_repository_are_valid():
    repository = Path(__file__).parents[1]
    for path in (*repository.glob("pipelines/*.yaml"), *repository.glob("cluster/runs/*.yaml")):
        assert load_config(path).num_steps > 0


def test_deterministic_pins_threads_and_refuses_staleness() -> None:
    config = run_config(deterministic=True, learner={"num_threads": 3})
    assert (config.generator.num_threads, config.learner.num_threads) == (1, 3)
    assert run_config().generator.num_threads is None
    with pytest.raises(ValueError, match="deterministic needs max_staleness 0, not 1"):
        run_config(deterministic=True, max_staleness=1)


def test_a_pool_that_cannot_grow_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_actors \(1\) is less than generator.num_actors \(2\)"):
        run_config(generator={"num_actors": 2, "max_actors": 1})
    with pytest.raises(ValueError, match=r"target_groups \(4\) sizes a pool that grows"):
        run_config(generator={"target_groups": 4})
