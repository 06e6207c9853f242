"""Runs in one process: the learner, the engine, reward functions and tracking of any run, without Ray."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from raygrpo.checkpoint import CheckpointStore, RunState
from raygrpo.config_file import load_config
from raygrpo.connect import worker_environment
from raygrpo.data import prompt_index
from raygrpo.local import train_locally
from raygrpo.prepare import prepare
from raygrpo.run_directory import RunResult
from raygrpo.tracking import Tracker
from raygrpo.types import RunStopped
from tests.conftest import run_config
from tests.test_train import TASK, Recorder
from tests.tiny_models import tiny_model
from tests.tracking.conftest import Store

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("process_group")]

MORE = """

async def later(completion, answer):
    return share(completion, answer)


def hopeless(completion):
    return 0.0


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


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        (["learner.num_gpus=1", "generator.num_gpus=1"], True),
        (["learner.num_gpus=1", "generator.num_gpus=0.5"], True),
        (["learner.num_gpus=0.5", "generator.num_gpus=0.5"], False),
        (["learner.num_gpus=1", "generator.num_gpus=1", "generator.vllm.gpu_memory_utilization=0.4"], False),
        (["learner.num_gpus=1", "generator.num_gpus=1", "generator.engine=transformers"], False),
        (["generator.num_gpus=1"], False),
        (["learner.num_gpus=1"], False),
    ],
)
def test_learner_and_vllm_share_a_gpu_as_their_settings_say(settings, refused, run, monkeypatch):
    monkeypatch.setattr("raygrpo.local._train", lambda *_: "trained")
    if refused:
        with pytest.raises(
            ValueError, match=r"learner.num_gpus \(1\) and generator.num_gpus \((1|0.5)\) must be shares"
        ):
            run("generator.engine=vllm", *settings)
    else:
        assert run("generator.engine=vllm", *settings)[0] == "trained"


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

    def full_at_step_2(store: CheckpointStore, state: RunState, scores: None) -> Any:
        if state.step == 2:
            raise OSError(28, "No space left on device")
        return commit(store, state, scores)

    monkeypatch.setattr(CheckpointStore, "commit", full_at_step_2)
    result, recorder = run()
    assert "the checkpoint of step 2 was not written: OSError: [Errno 28] No space left on device" in recorder.warnings
    assert result.history[2]["faults/checkpoints_failed"] == 1
    left = sorted(path.name for path in Path(result.run_dir, "checkpoints").iterdir())
    assert left == ["best", "step-000003"], "nothing half-written"


GREEDY = "{data: {source: 'local_task:rows', max_rows: 3}, sampling: {max_tokens: 12}}"
SAMPLED = (
    "{data: {source: 'local_task:rows', max_rows: 2}, sampling: {temperature: 1.0}, samples: 4, pass_at: [1, 2], "
    "functions: [{use: 'local_task:share'}, {use: 'local_task:later'}]}"
)
EVAL = [f"eval.sets={{greedy: {GREEDY}, sampled: {SAMPLED}}}", "eval.every=2", "learner.optimizer.lr=3.0e-3"]


def test_evaluations_change_nothing_and_a_resumed_run_neither_repeats_nor_loses_one(run, tmp_path):
    plain, recorder = run("name=plain", EVAL[2], "num_steps=4")
    assert plain.evaluations == recorder.evaluations == {}
    whole, recorder = run("name=whole", *EVAL, "num_steps=4", "eval.table_prompts=2")
    assert rewards(whole) == rewards(plain), "training is not disturbed"
    assert list(whole.evaluations) == [0, 2, 4] and recorder.evaluations == whole.evaluations
    assert all("timing_s/evaluate" in metrics for metrics in whole.history.values())
    assert whole.history[2]["timing_s/evaluate"] > 0 and whole.history[1]["timing_s/evaluate"] == 0
    assert whole.evaluations[0]["eval/sampled/reward"] != whole.evaluations[4]["eval/sampled/reward"]
    store = Store(whole.links.tracking_uri)
    for version in (0, 2, 4):
        rows = table(store, whole, f"eval/sampled/step_{version:06d}.json", tmp_path)
        assert {row["policy_version"] for row in rows} == {version}
        assert [(row["prompt_id"], row["sample"]) for row in rows] == [(p, i) for p in range(2) for i in range(4)]
        assert all(row["reward"] == pytest.approx(row["reward/share"] + row["reward/later"]) for row in rows)
        mean = sum(row["reward"] for row in rows) / 8
        assert whole.evaluations[version]["eval/sampled/reward"] == pytest.approx(mean)

    first, _ = run("name=parts", *EVAL, "num_steps=3")  # its checkpoints: after 2 steps, and after 3
    assert list(first.evaluations) == [0, 2, 3]
    shutil.rmtree(Path(first.run_dir, "checkpoints", "step-000003"))
    second, recorder = run("name=parts", *EVAL, "num_steps=4", resume=True)
    assert list(second.evaluations) == [0, 2, 3, 4] and recorder.evaluations.keys() == second.evaluations.keys()
    assert second.evaluations[2] == first.evaluations[2], "also its seconds: it was not made again"
    for version in (0, 2, 4):
        found, expected = second.evaluations[version], whole.evaluations[version]
        assert all(found[name] == expected[name] for name in expected if name != "eval/seconds")
    points = store.points(second.links.run_id, "eval/greedy/reward")
    assert [step for step, _ in points] == [0, 2, 3, 4], "no point is doubled"


def test_checkpoints_are_ranked_by_evaluations_of_their_weights(run):
    options = ["checkpoint.every=1", "checkpoint.keep=1", "checkpoint.keep_best=1", "eval.every=1", "num_steps=4"]
    all_pass = ["checkpoint.best_by=eval/sampled/pass_at_1", "eval.sets.sampled.pass_reward=-9"]
    result, _ = run(*EVAL[:1], *options, *all_pass)
    left = sorted(path.name for path in Path(result.run_dir, "checkpoints").iterdir())
    assert left == ["best", "step-000003", "step-000004"], "of equals the newest"
    values = {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.5}
    with pytest.MonkeyPatch.context() as patch:

        def log(self: Tracker, version: int, metrics: dict[str, float], shown: Any) -> None:
            log_evaluation(self, version, metrics | {"eval/greedy/reward": values.get(version, 0.0)}, shown)

        log_evaluation = Tracker.log_evaluation
        patch.setattr(Tracker, "log_evaluation", log)
        result, _ = run(*EVAL[:1], *options, "checkpoint.best_by=eval/greedy/reward", "name=ranked")
    left = sorted(path.name for path in Path(result.run_dir, "checkpoints").iterdir())
    assert left == ["best", "step-000002", "step-000004"]
    assert result.best_checkpoint is not None and Path(result.best_checkpoint).name == "step-000002"


def table(store: Store, result: RunResult, file: str, directory: Path) -> list[dict[str, Any]]:
    path = store.client.download_artifacts(result.links.run_id or "", file, str(directory))
    content = json.loads(Path(path).read_text())
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def test_generators_that_compute_another_model_stop_the_run(run):
    with pytest.raises(RunStopped, match=r"differ by .* \(learner.max_logprob_diff is 1e-12\)"):
        run("learner.max_logprob_diff=1.0e-12")


def test_a_cut_of_what_is_sampled_from_is_no_other_model(run):
    """Sampler and learner do differ by more than the bound, which only top_p says how far."""
    result, recorder = run("generator.sampling.top_p=0.3", "learner.max_logprob_diff=0.01", "num_steps=1")
    assert recorder.warnings == [] and result.history[0]["sampling/logprob_diff"] > 0.01
    result, recorder = run("generator.sampling.top_k=2", "learner.max_logprob_diff=0.01", "num_steps=1", "name=other")
    assert result.history[0]["sampling/logprob_diff"] > 0.01
    [warning] = recorder.warnings
    assert "is not checked (learner.max_logprob_diff): top_k or min_p" in warning


def test_steps_in_which_all_rewards_are_equal_train_nothing_and_are_no_error(run):
    """Also the first, in which the learner would compare itself with the generator."""
    result, _ = run("reward.functions=[{use: local_task:hopeless}]")
    assert rewards(result) == [0.0] * 3
    for metrics in result.history.values():
        assert metrics["policy/skipped_token_fraction"] == 1 and metrics["policy/grad_norm"] == 0
        assert "sampling/logprob_diff" not in metrics


def test_only_one_learner_and_one_generator(run):
    with pytest.raises(ValueError, match=r"not 2 and 1: set learner.num_workers=1"):
        run("learner.num_workers=2")


def test_a_way_for_the_weights_that_has_no_effect_is_refused(run):
    with pytest.raises(ValueError, match=r"generator.weight_transfer \(direct\) does not change: leave it out"):
        run("generator.weight_transfer=direct")


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
