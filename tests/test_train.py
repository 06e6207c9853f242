"""Whole runs: vLLM or transformers, Ray Data, Ray Train with DeepSpeed, MLflow, on a tiny model."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from raygrpo.config import RunConfig
from raygrpo.config_file import load_config
from raygrpo.data import prompt_index
from raygrpo.prepare import prepare
from raygrpo.run_directory import RunResult
from raygrpo.train import train
from tests.chaos import TASK as LETTERS
from tests.conftest import NUM_LOGICAL_CPUS
from tests.engines.vllm_process import vllm_logprobs
from tests.tiny_models import tiny_model
from tests.tracking.conftest import Store

pytestmark = pytest.mark.timeout(500)
GROUPS_PER_STEP, GROUP_SIZE, NUM_PROMPTS = 4, 4, 10

TASK = (
    "import time\nfrom pathlib import Path\n"
    + LETTERS
    + """

def moody(completion, answer):
    if len(completion) % 5 == 0:
        raise ValueError("a length I do not like")
    return share(completion, answer)


def broken(completion):
    raise KeyError("gold")


def sleepy(completion, answer):
    with open(Path(__file__).with_name("calls"), "a+") as calls:
        calls.write(".")
        number = calls.tell()
    if number == 50:
        time.sleep(1e9)
    return share(completion, answer)
"""
)


class Recorder:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.links: dict[str, str] = {}
        self.steps: list[int] = []
        self.evaluations: dict[int, dict[str, float]] = {}
        self.warnings: list[str] = []

    def on_phase(self, text: str) -> None:
        self.phases.append(text)

    def on_link(self, title: str, address: str) -> None:
        self.links[title] = address

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        self.steps.append(step)

    def on_evaluation(self, version: int, metrics: dict[str, float]) -> None:
        assert version not in self.evaluations, "told once"
        self.evaluations[version] = metrics

    def on_warning(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), max_positions=256)


@pytest.fixture
def run(ray_session, tmp_path, model, monkeypatch):
    """run(*overrides) -> (configuration, what the run left, what the watcher was told)."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "task.py").write_text(TASK)
    settings = {
        "num_steps": 3,
        "groups_per_step": GROUPS_PER_STEP,
        "group_size": GROUP_SIZE,
        "output_dir": str(tmp_path / "runs"),
        "model": {"path": str(model)},
        "data": {"source": "task:rows"},
        "reward": {"functions": [{"use": "task:share"}]},
        "generator": {
            "sampling": {"max_tokens": 16},
            "num_threads": 1,
            "vllm": {"kv_cache_memory_bytes": 32 * 2**20},
        },
        "learner": {"optimizer": {"lr": 1e-2}, "max_restarts": 0, "num_threads": 1},
        "tracking": {"samples_every": 1, "num_samples": 100, "system_metrics": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))

    def run(*overrides: str) -> tuple[RunConfig, RunResult, Recorder]:
        config = load_config(tmp_path / "run.yaml", list(overrides))
        recorder = Recorder()
        result = train(prepare(config, tmp_path), recorder)
        check_run(config, result, recorder)
        return config, result, recorder

    return run


def check_run(config: RunConfig, result: RunResult, recorder: Recorder) -> None:
    """What holds of every finished run."""
    steps = list(range(config.num_steps))
    assert list(result.history) == recorder.steps == steps
    assert recorder.phases[-1] == "training"
    assert recorder.links == {"MLflow": result.links.ui_command}
    per_step = config.completions_per_step
    for metrics in result.history.values():
        assert metrics["staleness/max"] <= config.max_staleness
        assert 0 <= metrics["staleness/mean"] <= metrics["staleness/max"]
        assert metrics["completions/num"] == per_step
        assert metrics["completions/num_tokens"] == pytest.approx(per_step * metrics["completions/mean_length"])
        assert metrics["prefix/tokens_encoded"] < metrics["prefix/tokens_repeated"]
        ratio = metrics["prefix/tokens_repeated"] / metrics["prefix/tokens_encoded"]
        assert metrics["prefix/token_ratio"] == pytest.approx(ratio) and ratio > 2
        assert metrics["faults/groups_failed"] == metrics["faults/generator_failures"] == 0
        assert all(math.isfinite(value) for value in metrics.values())
        check_times(metrics)
    assert result.history[0]["sampling/logprob_diff"] < 1e-4, "learner and generator begin as the same policy"
    check_tracked(result)
    check_export(config, result)


def check_times(metrics: dict[str, float]) -> None:
    stages = ("generate", "reward", "learn", "publish", "evaluate", "other")
    parts = {name: metrics.get(f"timing_s/{name}", 0.0) for name in stages}
    step = metrics["timing_s/step"]
    assert all(0 <= value <= step + 1e-6 for value in parts.values()), parts
    assert parts["learn"] > 0
    assert parts["other"] < step
    assert step <= sum(parts.values()) + 1e-6, "every second belongs to a stage or to other"
    assert 0 <= metrics["perf/learner_idle_fraction"] <= 1
    assert metrics["perf/tokens_per_s"] == pytest.approx(metrics["completions/num_tokens"] / step)


def check_tracked(result: RunResult) -> None:
    """MLflow has every metric of every step, once, and the run is finished."""
    assert result.links.undelivered == 0 and result.links.run_id is not None
    store = Store(result.links.tracking_uri)
    tracked = store.client.get_run(result.links.run_id)
    assert tracked.info.status == "FINISHED"
    names = {name for metrics in result.history.values() for name in metrics}
    assert names == {name for name in tracked.data.metrics if not name.startswith(("eval/", "checkpoint/"))}
    for name in names:
        expected = {step: metrics[name] for step, metrics in result.history.items() if name in metrics}
        points = store.points(result.links.run_id, name)
        assert len(points) == len(expected) and dict(points) == pytest.approx(expected), name
    assert Path(result.links.figure).stat().st_size > 1000


def check_export(config: RunConfig, result: RunResult) -> None:
    """The exported model is the trained one: its weights are those of the last checkpoint, read by DeepSpeed's own
    converter."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    exported = AutoModelForCausalLM.from_pretrained(result.export_dir, dtype=torch.float32).state_dict()
    before = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32).state_dict()
    checkpoint = Path(result.run_dir, "checkpoints", f"step-{config.num_steps:06d}")
    trained = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="deepspeed")
    for name, tensor in trained.items():
        assert torch.equal(exported[name], tensor), name
    moved = max((exported[name] - before[name]).abs().max().item() for name in before)
    assert moved > 5e-3, "nothing was trained"
    tokenizer = AutoTokenizer.from_pretrained(result.export_dir)
    assert tokenizer("abc")["input_ids"] == AutoTokenizer.from_pretrained(config.model.path)("abc")["input_ids"]


def samples(result: RunResult, step: int, directory: Path) -> list[dict[str, Any]]:
    """The table of the step's sampled rollouts."""
    store = Store(result.links.tracking_uri)
    table = json.loads(store.text(result.links.run_id, f"samples/step_{step:06d}.json", directory))
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def prompts_of(step: int) -> set[int]:
    tickets = range(step * GROUPS_PER_STEP, (step + 1) * GROUPS_PER_STEP)
    return {prompt_index(ticket, NUM_PROMPTS, seed=0) for ticket in tickets}


def test_on_policy_with_one_generator_and_one_learner(run, tmp_path):
    _, result, recorder = run("num_steps=4")
    for step, metrics in result.history.items():
        assert metrics["staleness/max"] == 0
        assert metrics["sampling/logprob_diff"] < 1e-4, "the publish before this step did not arrive"
        assert metrics["sampling/logprob_diff_max"] < 1e-3
        assert metrics["timing_s/generate"] > 0 and metrics["timing_s/publish"] > 0
        rows = samples(result, step, tmp_path)
        assert len(rows) == GROUPS_PER_STEP * GROUP_SIZE
        assert {row["prompt_id"] for row in rows} == prompts_of(step)
        assert {row["policy_version"] for row in rows} == {step}
        mean = sum(row["reward"] for row in rows) / len(rows)
        assert metrics["reward/mean"] == pytest.approx(mean, rel=1e-6)
        assert metrics["reward/share"] == pytest.approx(mean, rel=1e-6)
        assert sum(row["num_tokens"] for row in rows) == metrics["completions/num_tokens"]
        assert abs(sum(row["advantage"] for row in rows)) < 1e-4
    assert recorder.warnings == []

    prompt_ids, completion_ids = list(range(97, 137)), [100, 101, 32, 110, 120]
    exported = AutoModelForCausalLM.from_pretrained(result.export_dir, dtype=torch.float32)
    with torch.no_grad():
        logits = exported(torch.tensor([prompt_ids + completion_ids])).logits[0, len(prompt_ids) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(completion_ids)[:, None])[:, 0]
    assert vllm_logprobs(result.export_dir, prompt_ids, completion_ids) == pytest.approx(expected.tolist(), abs=1e-4)


def test_overlapped_with_two_generators_two_learners_zero_3_and_two_segments(run, tmp_path):
    config, result, recorder = run(
        "max_staleness=1",
        "eval={every: 1, data: {source: 'task:rows'}, samples: 2, sampling: {temperature: 1.0}}",
        "generator.num_actors=2",
        "learner.num_workers=2",
        "learner.deepspeed.zero_optimization.stage=3",
        "generator.weight_transfer=direct",
        "checkpoint.every=2",
    )
    for step in range(config.num_steps):
        rows = samples(result, step, tmp_path)  # of both learners' groups
        assert len(rows) == GROUPS_PER_STEP * GROUP_SIZE
        assert {row["prompt_id"] for row in rows} == prompts_of(step), "the prompts do not depend on the machines"
        assert all(step - 1 <= row["policy_version"] <= step for row in rows)
    assert result.history[1]["staleness/max"] == 1, "the second step's groups were sampled while the first was trained"
    assert result.history[1]["timing_s/publish"] > 0
    left = sorted(path.name for path in Path(result.run_dir, "checkpoints").iterdir())
    assert left == ["best", "step-000002", "step-000003"]
    check_evaluations(result, recorder, tmp_path)


def check_evaluations(result: RunResult, recorder: Recorder, directory: Path) -> None:
    """Every version, sampled by itself and by no other on both generators, and tracked once."""
    assert list(result.evaluations) == [0, 1, 2, 3] and recorder.evaluations == result.evaluations
    store = Store(result.links.tracking_uri)
    generators = set()
    for version, metrics in result.evaluations.items():
        table = json.loads(store.text(result.links.run_id, f"eval/held_out/step_{version:06d}.json", directory))
        rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        assert [row["prompt_id"] for row in rows] == sorted(list(range(NUM_PROMPTS)) * 2)
        assert {row["policy_version"] for row in rows} == {version}
        generators |= {row["generator"] for row in rows}
        mean = sum(row["reward"] for row in rows) / len(rows)
        assert metrics["eval/held_out/reward"] == pytest.approx(mean)
    assert generators == {"generator-0", "generator-1"}
    for name in result.evaluations[0]:
        expected = {version: metrics[name] for version, metrics in result.evaluations.items()}
        points = store.points(result.links.run_id, name)
        assert len(points) == len(expected) and dict(points) == pytest.approx(expected), name
    assert all(metrics["faults/evaluations_failed"] == 0 for metrics in result.history.values())
    assert result.history[1]["timing_s/evaluate"] > 0


def test_transformers_as_engine_and_a_reward_that_fails_now_and_then(run, tmp_path):
    _, result, _ = run(
        "generator.engine=transformers", "generator.vllm={}", "reward.functions=[{use: task:moody}]",
        "reward.max_error_share=0.9",
    )  # fmt: skip
    failed = 0
    for step, metrics in result.history.items():
        rows = samples(result, step, tmp_path)
        errors = [row for row in rows if row["error"]]
        assert metrics["faults/reward_failed"] == len(errors)
        assert all(row["reward"] is None and "a length I do not like" in row["error"] for row in errors)
        assert metrics["sampling/logprob_diff"] < 1e-4
        failed += len(errors)
    assert 0 < failed < 3 * GROUPS_PER_STEP * GROUP_SIZE


@pytest.mark.slow
def test_a_reward_that_sleeps_for_ever_costs_its_rollout_and_no_more(run):
    _, result, _ = run(
        "generator.engine=transformers", "generator.vllm={}", "num_steps=5",
        "reward.functions=[{use: task:sleepy, timeout_s: 3}]",
    )  # fmt: skip
    failed = {step: metrics["faults/reward_failed"] for step, metrics in result.history.items()}
    assert failed == {step: float(step == 3) for step in range(5)}, "call 50 is of the fourth step's 16"


@pytest.mark.slow
def test_the_pool_of_generators_grows_and_shrinks_while_the_run_goes_on(run):
    """One generator is too few for the groups in flight; the learner publishes to whoever is there."""
    _, result, recorder = run(
        "generator.engine=transformers", "generator.vllm={}", "generator.max_actors=2", "generator.target_groups=3",
        "generator.scale_down_after_s=5", "num_steps=40", "learner.optimizer.lr=1.0e-3",
    )  # fmt: skip
    assert any("generator-1 has joined, with version" in text for text in recorder.warnings), recorder.warnings
    assert all(metrics["sampling/logprob_diff"] < 1e-4 for metrics in result.history.values())


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_the_run_as_killed_and_frees_the_cluster(run, ray_session, tmp_path, how, interruptible):
    class Interrupting(Recorder):
        def on_step(self, step: int, metrics: dict[str, float]) -> None:
            if step == 1:
                os.kill(os.getpid(), how)

    config = load_config(tmp_path / "run.yaml", ["num_steps=500", "generator.engine=transformers", "generator.vllm={}"])
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        train(prepare(config, tmp_path), Interrupting())
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    identity = json.loads((tmp_path / "runs/run-latest/tracking.json").read_text())
    assert Store(identity["uri"]).client.get_run(identity["run_id"]).info.status == "KILLED"
    deadline_s = time.monotonic() + 60.0
    while ray_session.available_resources().get("CPU") != NUM_LOGICAL_CPUS:
        assert time.monotonic() < deadline_s, ray_session.available_resources()
        time.sleep(0.2)


def test_too_many_failed_rewards_end_the_run_with_a_message(run, tmp_path):
    with pytest.raises(RuntimeError) as stopped:
        run("generator.engine=transformers", "generator.vllm={}", "reward.functions=[{use: task:broken}]")
    message = str(stopped.value)
    assert "100% of the step's 16 rollouts failed to get a reward" in message
    assert "reward.max_error_share (10%)" in message
    assert "\n" not in message and "Traceback" not in message
    logs = {path.name: path.read_text() for path in (tmp_path / "runs" / "run-latest" / "logs").glob("*.jsonl")}
    assert f"the run must stop: {message}" in logs["controller.jsonl"]
    assert message in logs["driver.jsonl"]
    assert "KeyError: 'gold'" in logs["reward.jsonl"]
