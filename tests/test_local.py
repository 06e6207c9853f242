"""Runs in one process: the learner, the engine, reward functions and tracking of any run, without Ray."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from raygrpo.checkpoint import CheckpointStore, RunState
from raygrpo.config_file import load_config
from raygrpo.data import prompt_index
from raygrpo.local import train_locally
from raygrpo.prepare import prepare
from raygrpo.train import RunResult, worker_environment
from raygrpo.types import RunStopped
from tests.conftest import run_config
from tests.test_train import TASK, Recorder
from tests.tiny_models import tiny_model
from tests.tracking.conftest import Store

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("process_group")]

MORE = """

async def later(completion, answer):
    return share(completion, answer)


def flat_for_vowels(completion, answer):
    return 0.0 if answer in "aei" else share(completion, answer)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), max_positions=256)


@pytest.fixture
def run(tmp_path, model, monkeypatch):
    """run(*overrides, resume=False) -> (what the run left, what the watcher was told)."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, value in worker_environment(run_config()).items():  # which a local run sets, for good
        monkeypatch.setenv(name, value)
    (tmp_path / "local_task.py").write_text(TASK + MORE)
    settings = {
        "num_steps": 3,
        "groups_per_step": 4,
        "group_size": 4,
        "output_dir": str(tmp_path / "runs"),
        "model": {"path": str(model)},
        "data": {"source": "local_task:rows"},
        "reward": {"functions": [{"use": "local_task:share"}]},
        "generator": {"engine": "transformers", "sampling": {"max_tokens": 10}, "num_threads": 1},
        "learner": {"optimizer": {"lr": 1e-2}, "num_threads": 1},
        "checkpoint": {"every": 2},
        "tracking": {"samples_every": 0, "figure_every": 0, "system_metrics": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))

    def run(*overrides: str, resume: bool = False) -> tuple[RunResult, Recorder]:
        recorder = Recorder()
        config = load_config(tmp_path / "run.yaml", list(overrides))
        result = train_locally(prepare(config, tmp_path), recorder, resume=resume)
        return result, recorder

    return run


def rewards(result: RunResult) -> list[float]:
    return [metrics["reward/mean"] for metrics in result.history.values()]


def test_a_run_trains_reports_and_goes_on(run):
    whole, recorder = run("name=whole")
    assert recorder.steps == [0, 1, 2] and recorder.phases[-1] == "training" and recorder.warnings == []
    for metrics in whole.history.values():
        assert metrics["staleness/max"] == 0 and metrics["completions/num"] == 16
        assert metrics["sampling/logprob_diff"] < 1e-4, "the engine got the learner's weights"
        assert all(math.isfinite(value) for value in metrics.values())
    assert whole.links.undelivered == 0
    client = Store(whole.links.tracking_uri).client
    experiment = client.get_run(whole.links.run_id).info.experiment_id
    models = {model.name: model for model in client.search_logged_models([experiment])}
    assert set(models) == {"step-000002", "step-000003"}
    for model in models.values():
        newest = CheckpointStore(Path(model.params["path"]).parent, keep=2)
        assert Path(model.params["path"], "manifest.json").is_file() and int(model.params["step"]) in newest.steps()
    assert models["step-000003"].params["digest"] == newest.newest().digest
    assert models["step-000003"].metrics[0].value == pytest.approx(whole.history[2]["reward/mean"])
    first, _ = run("name=parts", "num_steps=2")
    second, recorder = run("name=parts", resume=True)
    assert recorder.steps == [0, 1, 2] and second.run_dir == first.run_dir
    assert second.links.run_id == first.links.run_id, "the same MLflow run"
    assert rewards(second) == rewards(whole)
    assert second.history[2]["run/attempt"] == 2
    trained = [AutoModelForCausalLM.from_pretrained(result.export_dir).state_dict() for result in (whole, second)]
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_async_rewards_and_failing_ones(run):
    plain, _ = run("num_steps=1")
    asynchronous, _ = run("num_steps=1", "reward.functions=[{use: local_task:later}]")
    assert rewards(plain) == rewards(asynchronous)
    moody, _ = run("num_steps=1", "reward.functions=[{use: local_task:moody}]", "reward.max_error_share=0.99")
    assert 0 < moody.history[0]["faults/reward_failed"] < 16
    with pytest.raises(RunStopped, match="100% of the step's 16 rollouts failed"):
        run("num_steps=1", "reward.functions=[{use: local_task:broken}]")


def test_dynamic_sampling_takes_other_prompts(run):
    seed, flat = next(
        (seed, flat)
        for seed in range(100)
        if 0 < sum(flat := [prompt_index(ticket, 10, seed=seed) in (0, 4, 8) for ticket in range(4)]) < 3
    )
    options = ["num_steps=1", f"seed={seed}", "reward.functions=[{use: local_task:flat_for_vowels}]"]
    without, _ = run(*options)
    assert without.history[0]["reward/frac_zero_std"] == sum(flat) / 4
    replaced, _ = run(*options, "algorithm.dynamic_sampling=5")
    assert replaced.history[0]["reward/frac_zero_std"] == 0
    assert replaced.history[0]["prompts/replaced"] >= sum(flat)


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(run, monkeypatch):
    commit = CheckpointStore.commit

    def full_at_step_2(store: CheckpointStore, state: RunState) -> Any:
        if state.step == 2:
            raise OSError(28, "No space left on device")
        return commit(store, state)

    monkeypatch.setattr(CheckpointStore, "commit", full_at_step_2)
    result, recorder = run()
    assert "the checkpoint of step 2 was not written: OSError: [Errno 28] No space left on device" in recorder.warnings
    assert result.history[2]["faults/checkpoints_failed"] == 1
    left = [path.name for path in Path(result.run_dir, "checkpoints").iterdir()]
    assert left == ["step-000003"], "nothing half-written"


def test_generators_that_compute_another_model_stop_the_run(run):
    with pytest.raises(RunStopped, match=r"differ by .* \(learner.max_logprob_diff is 1e-12\)"):
        run("learner.max_logprob_diff=1.0e-12")


def test_only_one_learner_and_one_generator(run):
    with pytest.raises(ValueError, match=r"not 2 and 1: set learner.num_workers=1"):
        run("learner.num_workers=2")


@pytest.fixture(scope="module")
def lora() -> list[str]:
    return ["model.lora={rank: 4, alpha: 16}", "learner.optimizer.lr=0.05", "algorithm.kl.coef=0.05"]


def test_adapters_are_trained_published_and_exported(run, model, lora):
    result, _ = run(*lora)
    history: dict[int, dict[str, Any]] = result.history
    assert all(metrics["sampling/logprob_diff"] < 1e-4 for metrics in history.values()), "merged as they are trained"
    assert abs(history[0]["policy/kl"]) < 1e-6, "the reference has its adapters off, and they do nothing yet"
    assert history[2]["policy/kl"] > 1e-3
    exported = AutoModelForCausalLM.from_pretrained(result.export_dir)
    with_adapter = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model), str(Path(result.export_dir, "adapter"))
    )
    before = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.tensor([[97, 98, 99, 100, 101]])
    with torch.no_grad():
        logits, expected, old = (m(ids).logits for m in (exported, with_adapter, before))
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (logits - old).abs().max() > 1e-2
    resumed, _ = run(*lora, "num_steps=4", resume=True)
    assert rewards(resumed)[:3] == rewards(result) and len(resumed.history) == 4
    assert resumed.history[3]["sampling/logprob_diff"] < 1e-4


def test_a_publish_of_adapters_is_small_and_so_are_checkpoints(run, lora):
    sizes = {}
    for name, options in {"all": [], "lora": lora}.items():
        result, _ = run(f"name={name}", "num_steps=1", *options)
        manifest = json.loads(next(Path(result.run_dir, "checkpoints").glob("step-*/manifest.json")).read_text())
        sizes[name] = sum(entry[0] for entry in manifest["files"].values())
    assert sizes["lora"] < 0.4 * sizes["all"]
