"""The commands as a user meets them: help, `check`, and what is said about bad input."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray.exceptions
import yaml
from typer.testing import CliRunner

from raygrpo.check import batch_algebra
from raygrpo.cli import app
from raygrpo.config_file import load_config
from raygrpo.prepare import prepare
from tests.tiny_models import tiny_model, tiny_tokenizer

ROWS = [{"prompt": "x" * length, "answer": "yes" if length % 2 else "no"} for length in (10, 20, 30, 41)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), max_positions=128)


@pytest.fixture
def invoke(tmp_path, model, monkeypatch):
    """invoke(*arguments, rows=[...], **settings) runs `raygrpo check` on a small valid run with these changes."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*overrides: str, command: str = "check", rows: list[Any] = ROWS, **settings: Any):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
        tree = {
            "num_steps": 10,
            "groups_per_step": 4,
            "group_size": 3,
            "model": {"path": str(model)},
            "data": {"source": "rows.jsonl"},
            "reward": {"functions": [{"use": "exact_match"}]},
            "generator": {"sampling": {"max_tokens": 20}},
        } | settings
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
        return CliRunner().invoke(app, [command, str(tmp_path / "run.yaml"), *overrides])

    return invoke


def refusal(invoke, *overrides: str, **changes: Any) -> str:
    """What is printed on stderr; the exit code is 1 and there is no traceback, from `check` and from `train` alike."""
    messages = []
    for command in ("check", "train"):
        result = invoke(*overrides, command=command, **changes)
        assert result.exit_code == 1, result.output
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert "Traceback" not in result.output
        messages.append(result.stderr)
    assert messages[0] == messages[1]
    assert messages[0].startswith("raygrpo: ")
    return messages[0]


# Help and import.


def test_help_names_the_commands_and_each_command_teaches():
    runner = CliRunner()
    top = runner.invoke(app, ["--help"], env={"COLUMNS": "200"})
    assert top.exit_code == 0
    for command in ("train", "check", "bench", "submit", "status", "logs", "stop"):
        assert command in top.output
        own = runner.invoke(app, [command, "-h"], env={"COLUMNS": "200"})
        assert own.exit_code == 0
    for command in ("train", "check"):
        text = runner.invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
        assert "KEY=VALUE" in text and f"Example: raygrpo {command} pipelines/quickstart.yaml" in text


def test_no_arguments_show_the_help():
    result = CliRunner().invoke(app, [])
    assert "Usage" in result.output and "train" in result.output


@pytest.mark.parametrize("module", ["raygrpo", "raygrpo.cli", "raygrpo.config", "raygrpo.jobs"])
def test_import_is_light(module):
    heavy = {
        "torch",
        "ray",
        "vllm",
        "transformers",
        "deepspeed",
        "mlflow",
        "datasets",
        "pyarrow",
        "numpy",
        "matplotlib",
    }
    code = f"import sys, {module}; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.split() == []


# What `check` says of a good run.


def test_the_batch_algebra_is_right(invoke, tmp_path):
    assert invoke().exit_code == 0
    rows = {name.strip(): (value, because) for name, value, because in algebra(tmp_path)}
    # Prompts of 10, 20, 30 and 41 bytes, one token each; mean 25.25. A step: 4 groups of 3 completions of 20.
    assert rows["prompts in the data"] == ("4", "seen 10.00 times in the run")
    assert rows["steps"][0] == "10"
    assert rows["groups a step"][0] == "4"
    assert rows["completions a step"][0] == "12"
    assert rows["completions in all"][0] == "120"
    assert rows["prompt tokens"] == ("25", "mean; longest 41")
    assert rows["tokens encoded a step"][0] == "341"  # 4 * (25.25 + 3 * 20)
    assert rows["were prompts repeated"][0] == "543"  # 12 * (25.25 + 20)
    assert rows["were prompts repeated"][1].startswith("1.6 times")  # 543 / 341 = 1.592
    assert rows["micro-batches"][0] == "<= 1"
    assert rows["updates a step"][0] == "1"
    assert rows["updates in all"][0] == "10"
    assert rows["staleness"][0] == "<= 0"
    assert rows["groups in flight"][0] == "4"


def test_the_batch_algebra_follows_the_settings(invoke, tmp_path):
    overrides = ["max_staleness=2", "algorithm.epochs=3", "algorithm.mini_batches=2", "learner.num_workers=2"]
    assert invoke(*overrides).exit_code == 0
    rows = {name.strip(): value for name, value, _ in algebra(tmp_path, *overrides)}
    assert rows["staleness"] == "<= 2"
    assert rows["groups in flight"] == "12"  # (2 + 1) * 4
    assert rows["updates a step"] == "6"
    assert rows["updates in all"] == "60"
    assert rows["micro-batches"] == "<= 1"  # one group of an update on each learner


@pytest.mark.parametrize(
    ("max_tokens", "at_most"),
    [
        (1000, 1),  # groups of at most 41 + 3 * 20 = 101 tokens
        (202, 2),  # two a stream
        (201, 4),  # one a stream
        (101, 4),
        (100, 8),  # two completions beside the longest prompt: each group in two parts
        (80, 12),  # one completion
        (61, 12),
    ],
)
def test_micro_batches_are_as_many_as_the_learner_may_need(invoke, tmp_path, max_tokens, at_most):
    from raygrpo.shared_prefix import plan_passes

    override = f"learner.max_tokens={max_tokens}"
    assert invoke(override).exit_code == 0
    rows = {name.strip(): value for name, value, _ in algebra(tmp_path, override)}
    assert rows["micro-batches"] == f"<= {at_most}"
    worst = plan_passes([([1] * 41, [[1] * 20] * 3)] * 4, max_tokens)
    assert len(worst.streams) + sum(len(parts) for _, parts in worst.splits) == at_most


def algebra(tmp_path: Path, *overrides: str) -> list[tuple[str, str, str]]:
    config = load_config(tmp_path / "run.yaml", list(overrides))
    return batch_algebra(prepare(config, tmp_path))


def test_check_shows_prompts_as_the_model_sees_them_rewards_and_resources(invoke, tmp_path):
    (tmp_path / "mine.py").write_text("def half(completion, answer):\n    return 0.5 * (completion == answer)\n")
    functions = [{"use": "exact_match"}, {"use": "mine:half", "weight": 2}]
    result = invoke(
        "learner.num_workers=2",
        "generator.num_actors=2",
        rows=[{"prompt": [{"role": "user", "content": "[red]Say[/red] yes"}], "answer": "yes"}],
        reward={"functions": functions},
    )
    assert result.exit_code == 0, result.output
    assert "<|im_start|>user" in result.output and "[red]Say[/red] yes<|im_end|>" in result.output
    table = {line.split("│")[1].strip(): line.split("│")[2:4] for line in result.output.splitlines() if "│" in line}
    assert [float(value) for value in table["exact_match"]] == [1.0, 0.0]
    assert [float(value) for value in table["half"]] == [0.5, 0.0]
    asked = next(line for line in result.output.splitlines() if "asked for" in line)
    assert "2.11" in asked  # 2 * 0.5 + 2 * 0.5 + 0.1 + 0.01
    assert "nothing speaks against this run" in result.output


def test_check_lists_what_a_preset_set(invoke):
    result = invoke("algorithm=dapo", "algorithm.clip_high=0.3")
    assert "preset dapo: algorithm.clip_high = 0.3 (the preset's 0.28 is overridden)" in result.output


def test_train_says_what_a_preset_set_before_it_starts(invoke, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no Ray in this test")

    monkeypatch.setattr("raygrpo.train.train", refuse)
    result = invoke("algorithm=gspo", "algorithm.clip_low=0.001", command="train")
    assert "preset gspo: algorithm.ratio = sequence_mean" in result.output
    assert "preset gspo: algorithm.clip_low = 0.001 (the preset's 0.0003 is overridden)" in result.output
    assert "no Ray in this test" in result.output
    assert "preset" not in invoke(command="train").output


def test_more_gpus_than_there_are_is_a_problem(invoke, monkeypatch):
    monkeypatch.setattr("raygrpo.check.available_gpus", lambda: 1)
    result = invoke("learner.num_gpus=1", "generator.num_gpus=0.5")
    assert result.exit_code == 1
    assert "asks for 1.5 GPUs, this machine has 1" in result.output
    assert invoke("learner.num_gpus=0.5", "generator.num_gpus=0.5").exit_code == 0


def cluster_of(monkeypatch, *nodes: dict[str, Any]) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr("raygrpo.check.cluster_nodes", lambda: [{"Alive": True, **node} for node in nodes])


def test_a_cluster_may_have_more_gpus_than_this_machine(invoke, monkeypatch):
    cluster_of(monkeypatch, {"Labels": {}, "Resources": {"CPU": 8, "GPU": 8}})
    assert invoke("generator.num_gpus=1", "generator.num_actors=8").exit_code == 0
    result = invoke("generator.num_gpus=1", "generator.num_actors=9")
    assert result.exit_code == 1 and "hold 8 of 9 generator processes" in result.output


def test_a_selector_that_no_node_of_the_cluster_satisfies_is_a_problem(invoke, monkeypatch):
    cluster_of(monkeypatch, {"Labels": {"raygrpo-role": "head"}, "Resources": {"CPU": 8}})
    result = invoke("generator.label_selector={raygrpo-role: generator}")
    assert result.exit_code == 1
    assert "problem: no node satisfies generator.label_selector {'raygrpo-role': 'generator'}" in result.output
    assert invoke("generator.label_selector={raygrpo-role: head}").exit_code == 0


def test_a_selector_without_a_cluster_is_a_problem(invoke):
    result = invoke("learner.label_selector={raygrpo-role: learner}")
    assert result.exit_code == 1
    assert "problem: learner.label_selector is {'raygrpo-role': 'learner'}, and the Ray that" in result.output
    assert invoke("learner.label_selector=null").exit_code == 0


def test_a_dashboards_address_is_no_address_of_a_cluster(invoke, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    result = invoke()
    assert result.exit_code == 1 and "is a dashboard's; a run takes that of the cluster" in result.stderr


def test_the_memory_of_every_role_is_shown_and_what_does_not_fit_is_a_warning(invoke, monkeypatch):
    result = invoke()
    assert result.exit_code == 0 and "warning" not in result.output
    assert "Memory of a process, estimated" in result.output
    for role in ("1 x learner", "1 x generator", "1 x reward"):
        assert role in result.output
    monkeypatch.setattr("raygrpo.check.available_gpus", lambda: 1)
    monkeypatch.setattr("raygrpo.check.gpu_memory", lambda: 2**20)
    result = invoke("learner.num_gpus=1")
    assert result.exit_code == 0, "an estimate is no verdict"
    assert "warning: a learner needs about 2.2 GiB of each GPU, of which it has 0.0 GiB" in result.output


def test_a_reward_that_raises_is_a_problem_before_the_run(invoke, tmp_path):
    (tmp_path / "bad.py").write_text("def reward(completion):\n    raise KeyError('gold')\n")
    result = invoke(reward={"functions": [{"use": "bad:reward"}]})
    assert result.exit_code == 1
    assert "problem: reward reward: reward function 'reward' raised KeyError: 'gold'" in result.output


# Bad input: each says what is wrong and what to do.


def test_an_unknown_key(invoke):
    assert "unknown key 'learner.num_worker': did you mean 'num_workers'?" in refusal(invoke, "learner.num_worker=2")


def test_no_configuration_file():
    result = CliRunner().invoke(app, ["check", "nowhere.yaml"])
    assert result.exit_code == 1
    assert "cannot read the configuration nowhere.yaml" in result.stderr


def test_groups_that_the_learners_cannot_share(invoke):
    message = refusal(invoke, "learner.num_workers=3")
    assert "groups_per_step (4) is not divisible by learner.num_workers (3)" in message


def test_no_model_at_the_path(invoke, tmp_path):
    message = refusal(invoke, model={"path": "./no/model"})
    assert f"model.path: there is no model at {tmp_path}/no/model (no config.json)" in message


def test_a_model_without_a_tokenizer(invoke, tmp_path, model):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((model / "config.json").read_bytes())
    message = refusal(invoke, model={"path": "./bare"})
    assert "tokenizer" in message and f"{tmp_path}/bare" in message


def test_messages_for_a_tokenizer_without_a_template(invoke, tmp_path, model):
    tokenizer = tiny_tokenizer(320)
    tokenizer.chat_template = None
    (tmp_path / "untemplated").mkdir()
    tokenizer.save_pretrained(tmp_path / "untemplated")
    (tmp_path / "untemplated" / "config.json").write_bytes((model / "config.json").read_bytes())
    chat = [{"prompt": [{"role": "user", "content": "hello"}], "answer": "x"}]
    message = refusal(invoke, rows=chat, model={"path": "./untemplated"})
    assert "chat template" in message
    assert invoke(model={"path": "./untemplated"}).exit_code == 0, "texts need no template"


def test_an_empty_prompt(invoke, tmp_path):
    rows = [ROWS[0], {"prompt": "", "answer": "x"}, ROWS[1]]
    message = refusal(invoke, rows=rows)
    assert f"{tmp_path}/rows.jsonl:2" in message and "empty" in message and "data.invalid_rows=drop" in message
    dropped = invoke("data.invalid_rows=drop", rows=rows)
    assert dropped.exit_code == 0 and "2 prompts from 3 rows" in dropped.output
    assert "1 invalid rows dropped" in dropped.output


def test_a_prompt_longer_than_the_context_leaves_room_for(invoke, tmp_path):
    rows = [ROWS[0], {"prompt": "y" * 109, "answer": "x"}]  # the context is 128, completions have 20
    message = refusal(invoke, rows=rows)
    assert f"{tmp_path}/rows.jsonl:2" in message and "109 tokens" in message and "at most 108" in message
    assert "data.overlong_prompts=drop" in message
    dropped = invoke("data.overlong_prompts=drop", rows=rows)
    assert dropped.exit_code == 0 and "1 overlong rows dropped" in dropped.output
    assert invoke(rows=[{"prompt": "y" * 108, "answer": "x"}]).exit_code == 0
    assert "at most 9 " in refusal(invoke, "data.max_prompt_tokens=9")


def test_lengths_that_do_not_fit_together(invoke):
    message = refusal(invoke, "generator.sampling.max_tokens=128")
    assert "max_tokens (128)" in message and "(128 tokens)" in message
    message = refusal(invoke, "data.max_prompt_tokens=120")
    assert "data.max_prompt_tokens (120)" in message and "(20)" in message and "128 tokens" in message
    message = refusal(invoke, "learner.max_tokens=60")
    assert "learner.max_tokens (60)" in message and "41 + 20" in message and "set 61" in message


@pytest.mark.parametrize("line", ['{"prompt": "a", ', "[1, 2]", '{"prompt": 3, "answer": 4}', "nonsense"])
def test_a_malformed_row_names_file_and_line(invoke, tmp_path, line):
    message = refusal(invoke, rows=[*ROWS, line])
    assert f"{tmp_path}/rows.jsonl:5" in message and "data.invalid_rows=drop" in message


def test_a_row_without_the_column(invoke):
    message = refusal(invoke, rows=[{"promt": "hello", "answer": "x"}])
    assert "no column 'prompt'" in message and "did you mean data.prompt=promt?" in message


def test_no_data(invoke):
    assert "there is no file" in refusal(invoke, data={"source": "none.jsonl"})
    assert "no prompt is left" in refusal(invoke, rows=[])


def test_a_reward_that_is_not_there(invoke):
    message = refusal(invoke, reward={"functions": [{"use": "exact_mach"}]})
    assert "unknown reward 'exact_mach': did you mean 'exact_match'?" in message
    message = refusal(invoke, reward={"functions": [{"use": "nowhere:f"}]})
    assert "there is no module 'nowhere'" in message


def test_an_output_directory_that_cannot_be_written(invoke, tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke("--local", f"output_dir={tmp_path / 'file'}", command="train")
    assert "Traceback" not in result.output and isinstance(result.exception, SystemExit)
    assert f"training failed: output_dir ({tmp_path / 'file'}) cannot be written: Not a directory" in result.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "log"), "training failed: [Errno 28] No space left on device: 'log'"),
        (ray.exceptions.RaySystemError("gone\nthe node died"), "training failed: RaySystemError: the node died"),
    ],
)
def test_what_the_machine_does_to_a_run_is_a_line(error, said, invoke, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("raygrpo.train.train", fail)
    result = invoke(command="train")
    assert isinstance(result.exception, SystemExit) and said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_mistake_of_ours_keeps_its_traceback(invoke, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("raygrpo.train.train", fail)
    assert isinstance(invoke(command="train").exception, KeyError)
