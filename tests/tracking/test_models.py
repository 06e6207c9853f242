"""Checkpoints as models with their metrics, and the registered policy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from raygrpo.tracking import Tracker
from tests.tracking.conftest import MakeConfig, Store


def models(links: Any) -> dict[str, Any]:
    """name -> the run's logged model."""
    client = Store(links.tracking_uri).client
    run = client.get_run(links.run_id)
    found = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{links.run_id}'")
    outputs = {output.model_id: output.step for output in run.outputs.model_outputs}
    assert set(outputs) == {model.model_id for model in found}, "the run's page shows each of them, once"
    assert len(found) == len(run.outputs.model_outputs)
    return {model.name: model for model in found}


@pytest.mark.usefixtures("delivered_twice")
def test_checkpoints_are_models_with_the_run_s_own_points(configure: MakeConfig, tmp_path: Path) -> None:
    tracker = Tracker(configure(), str(tmp_path / "run"))
    tracker.log_step(2, {"reward/mean": 0.2, "eval/held_out/reward": 0.25})  # before its checkpoint is whole
    tracker.log_checkpoint(2, "/runs/step-000002", "aa", 0.15, [2])
    tracker.log_checkpoint(4, "/runs/step-000004", "bb", math.nan, [2, 4])
    tracker.log_step(4, {"eval/held_out/reward": 0.5})  # after it
    tracker.log_step(5, {"eval/held_out/reward": 0.6})  # without one
    tracker.log_checkpoint(6, "/runs/step-000006", "cc", 0.55, [4, 6])
    links = tracker.finish()
    found = models(links)
    assert {name: model.tags["raygrpo.on_disk"] for name, model in found.items()} == {
        "step-000002": "false",
        "step-000004": "true",
        "step-000006": "true",
    }
    second = found["step-000002"]
    assert second.params == {"step": "2", "path": "/runs/step-000002", "digest": "aa"}
    assert (second.status, second.model_type) == ("READY", "checkpoint")
    scores = {name: {m.key: m.value for m in model.metrics or []} for name, model in found.items()}
    assert scores == {
        "step-000002": {"checkpoint/mean_reward": 0.15, "eval/held_out/reward": 0.25},
        "step-000004": {"eval/held_out/reward": 0.5},
        "step-000006": {"checkpoint/mean_reward": 0.55},
    }
    store = Store(links.tracking_uri)
    assert store.points(links.run_id, "eval/held_out/reward") == [(2, 0.25), (4, 0.5), (5, 0.6)]
    assert store.points(links.run_id, "checkpoint/mean_reward") == [(2, 0.15), (6, 0.55)]


def test_a_checkpoint_written_anew_is_another_model_and_doubles_no_point(configure: MakeConfig, tmp_path: Path) -> None:
    config = configure()
    for digest, reward in (("aa", 0.15), ("bb", 0.3)):
        tracker = Tracker(config, str(tmp_path / "run"))
        tracker.log_checkpoint(2, "/runs/step-000002", digest, reward, [2])
        links = tracker.finish()
    client = Store(links.tracking_uri).client
    experiment = client.get_run(links.run_id).info.experiment_id
    found = client.search_logged_models([experiment])
    assert {model.params["digest"]: model.tags["raygrpo.on_disk"] for model in found} == {"aa": "false", "bb": "true"}
    assert Store(links.tracking_uri).points(links.run_id, "checkpoint/mean_reward") == [(2, 0.15)]


@pytest.mark.parametrize("name", ["prices", None])
def test_register_model(configure: MakeConfig, tmp_path: Path, name: str | None) -> None:
    policy = tmp_path / "model"
    policy.mkdir()
    (policy / "config.json").write_text('{"model_type": "qwen3"}')
    config = configure(tracking={"register_model": name})
    for _ in range(2):  # a run that was resumed after its end registers nothing anew
        links = Tracker(config, str(tmp_path / "run")).finish(policy=str(policy))
    client = Store(links.tracking_uri).client
    versions = client.search_model_versions(f"run_id = '{links.run_id}'")
    assert [(version.name, version.version, version.status) for version in versions] == (
        [("prices", 1, "READY")] if name else []
    )
    if name:
        (model,) = models(links).values()
        assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "prices", "version": 1}]
        files = Path(client.get_model_version_download_uri("prices", "1").removeprefix("file://"))
        assert (files / "config.json").read_text() == '{"model_type": "qwen3"}'


def test_a_policy_that_cannot_be_registered_is_said_and_fails_nothing(
    configure: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(configure(tracking={"register_model": "prices"}), str(tmp_path / "run"))
    links = tracker.finish(policy=str(tmp_path / "nowhere"))
    assert links.undelivered == 0
    assert Store(links.tracking_uri).client.get_run(links.run_id).info.status == "FINISHED"
    assert any("will not take this policy" in text and "nowhere does not exist" in text for text in caplog.messages)


def test_a_name_that_no_registry_takes_is_refused(configure: MakeConfig) -> None:
    with pytest.raises(ValueError, match="register_model"):
        configure(tracking={"register_model": "team/model"})
