"""One run, whole and undoubled, whatever happens to MLflow, the disk or the process."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from raygrpo.config import RunConfig
from raygrpo.tracking import Tracker, replay
from raygrpo.tracking.describe import flatten
from raygrpo.tracking.store import MlflowRun
from tests.tracking.conftest import FirstRun, MakeConfig, Store


def log_steps(tracker: Tracker, steps: range, offset: float = 0.0) -> None:
    for step in steps:
        tracker.log_step(step, {"reward/mean": step / 10 + offset, "policy/loss": -float(step)})


def test_a_run_writes_every_step_once_and_describes_itself(configure: MakeConfig, tmp_path: Path) -> None:
    options = {f"option_{i:03d}": i for i in range(150)}
    config = configure(generator={"vllm": options}, data={"system_prompt": "x" * 7000})
    tracker = Tracker(
        config,
        str(tmp_path / "run"),
        tags={"job": "raysubmit_1"},
        links={"Ray": "http://ray"},
        resume_command="again --resume",
    )
    tracker.start()
    log_steps(tracker, range(8))
    links = tracker.finish(summary={"reward": 0.7})

    store = Store(links.tracking_uri)
    (run,) = store.runs(config.tracking.experiment)
    assert run.info.run_id == links.run_id
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert store.points(links.run_id, "reward/mean") == [(step, step / 10) for step in range(8)]
    assert store.points(links.run_id, "policy/loss") == [(step, -float(step)) for step in range(8)]
    expected = flatten(config.model_dump(mode="json"))
    assert len(expected) > 200
    assert run.data.params.keys() == expected.keys()
    assert run.data.params["data.system_prompt"] == "x" * 5997 + "..."
    assert run.data.params["generator.vllm.option_149"] == "149"
    assert RunConfig.model_validate(yaml.safe_load(store.text(links.run_id, "config.yaml", tmp_path))) == config
    assert json.loads(store.text(links.run_id, "summary.json", tmp_path)) == {"reward": 0.7}
    assert {
        "version.torch",
        "version.ray",
        "version.vllm",
        "version.deepspeed",
        "version.raygrpo",
    } <= run.data.tags.keys()
    assert run.data.tags["job"] == "raysubmit_1"
    assert "again --resume" in run.data.tags["mlflow.note.content"]
    assert "[Ray](http://ray)" in run.data.tags["mlflow.note.content"]
    assert links.undelivered == 0
    assert not list((tmp_path / "run" / "spool").iterdir())


def test_mlflow_prints_nothing_into_the_progress_of_a_run(first_run: FirstRun) -> None:
    assert first_run.printed == ""


def test_the_steps_log_call_returns_while_mlflow_does_not_answer(
    configure: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = threading.Event()
    connect = MlflowRun.connect
    monkeypatch.setattr(MlflowRun, "connect", lambda run: (answer.wait(60), connect(run)))
    tracker = Tracker(configure(), str(tmp_path / "run"))
    assert tracker.start().run_id is None
    log_steps(tracker, range(8))  # all return, although MLflow has not said a word
    assert len(tracker.history()) == 8
    assert tracker.links().run_id is None
    answer.set()
    links = tracker.finish()
    assert store_points(links) == [(step, step / 10) for step in range(8)]


def test_values_that_are_not_finite_leave_a_gap_and_are_counted(configure: MakeConfig, tmp_path: Path, caplog) -> None:
    tracker = Tracker(configure(), str(tmp_path / "run"))
    for step, value in enumerate([1.0, math.nan, math.inf, -math.inf, 2.0]):
        tracker.log_step(step, {"policy/kl": value, "reward/mean": 0.5, "no number": "text"})
    links = tracker.finish()
    store = Store(links.tracking_uri)
    assert store.points(links.run_id, "policy/kl") == [(0, 1.0), (4, 2.0)]
    assert len(store.points(links.run_id, "reward/mean")) == 5
    assert store.points(links.run_id, "faults/non_finite_metrics") == [(1, 1.0), (2, 1.0), (3, 1.0)]
    kept = [json.loads(line)["metrics"]["policy/kl"] for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert kept == [1.0, "nan", "inf", "-inf", 2.0]
    again = Tracker(configure(), str(tmp_path / "run")).history()
    assert [again[step]["policy/kl"] for step in (2, 3, 4)] == [math.inf, -math.inf, 2.0]
    assert math.isnan(again[1]["policy/kl"])
    assert sum("policy/kl is nan" in message for message in caplog.messages) == 1


def test_a_resumed_run_continues_without_doubled_points(configure: MakeConfig, tmp_path: Path) -> None:
    first = Tracker(configure(), str(tmp_path / "run"))
    first.start()
    log_steps(first, range(5))
    assert first.close(60)  # as after a crash: nobody called finish
    run_id = first.links().run_id
    store = Store(first.links().tracking_uri)
    assert store.client.get_run(run_id).info.status == "RUNNING"

    second = Tracker(configure(num_steps=9), str(tmp_path / "run"))
    second.start()
    log_steps(second, range(3, 9), offset=100.0)  # from the checkpoint at step 3
    links = second.finish()
    assert links.run_id == run_id
    assert len(store.runs(links.experiment)) == 1
    expected = [(step, step / 10 + (100.0 if step >= 5 else 0.0)) for step in range(9)]
    assert store.points(run_id, "reward/mean") == expected
    history = second.history()
    assert [history[step]["reward/mean"] for step in range(9)] == [0.0, 0.1, 0.2, *(s / 10 + 100 for s in range(3, 9))]
    assert list(second.history(first_step=7)) == [7, 8]
    run = store.client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["raygrpo.repeated_steps"] == "3, 4"
    assert run.data.params["num_steps"] == "8"  # MLflow's parameters cannot change; the tag says what did
    assert run.data.tags["raygrpo.changed_on_resume"] == "num_steps: 8 -> 9"


def test_a_run_entered_by_id_without_its_directory_keeps_its_points_and_history(
    configure: MakeConfig, tmp_path: Path
) -> None:
    first = Tracker(configure(), str(tmp_path / "run"))
    log_steps(first, range(4))
    time.sleep(0.01)
    first.log_step(1, {"eval/held_out/reward": 0.5})  # of the same step, at another time
    run_id = first.finish().run_id
    second = Tracker(configure(), str(tmp_path / "elsewhere"), run_id)
    log_steps(second, range(2, 6), offset=100.0)
    links = second.finish()
    assert links.run_id == run_id
    assert store_points(links) == [(step, step / 10 + (100.0 if step >= 4 else 0.0)) for step in range(6)]
    assert [second.history()[step]["reward/mean"] for step in range(6)] == [0.0, 0.1, 100.2, 100.3, 100.4, 100.5]
    assert second.evaluations()[1]["eval/held_out/reward"] == 0.5
    tags = Store(links.tracking_uri).client.get_run(run_id).data.tags
    assert tags["raygrpo.repeated_steps"] == "2, 3"


@pytest.mark.parametrize("fate", ["unknown", "malformed", "deleted"])
def test_a_run_id_that_cannot_be_entered_gives_a_new_run_with_everything(
    configure: MakeConfig, tmp_path: Path, caplog, fate: str
) -> None:
    first = Tracker(configure(), str(tmp_path / "run"))
    log_steps(first, range(3))
    links = first.finish()
    bad = {"unknown": "0" * 32, "malformed": "../no id", "deleted": links.run_id}[fate]
    if fate == "deleted":
        Store(links.tracking_uri).client.delete_run(links.run_id)
    second = Tracker(configure(), str(tmp_path / "run"), bad)
    log_steps(second, range(3, 5))
    again = second.finish()
    assert again.run_id != bad
    assert store_points(again) == [(step, step / 10) for step in range(5)]
    assert any("cannot be continued" in message and bad in message for message in caplog.messages)


def test_a_batch_that_arrived_but_was_not_acknowledged_is_not_doubled(
    configure: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    log_batch = MlflowClient.log_batch
    fates = ["answer lost", "arrives", "request lost", "arrives", "answer lost", "answer lost"]

    def unreliable(client: MlflowClient, run_id: str, metrics=(), **rest) -> None:
        fate = fates.pop(0) if metrics and fates else "arrives"
        if fate == "request lost":
            raise ConnectionError(fate)
        log_batch(client, run_id, metrics, **rest)
        if fate == "answer lost":
            raise ConnectionError(fate)

    monkeypatch.setattr(MlflowClient, "log_batch", unreliable)
    monkeypatch.setattr("raygrpo.tracking.writer.LONGEST_PAUSE_S", 0.05)
    tracker = Tracker(configure(), str(tmp_path / "run"))
    tracker.start()
    for step in range(6):
        log_steps(tracker, range(step, step + 1))
        deadline = time.monotonic() + 60
        while tracker.links().undelivered and time.monotonic() < deadline:
            time.sleep(0.01)
    links = tracker.finish()
    assert fates == []
    assert store_points(links) == [(step, step / 10) for step in range(6)]


def test_what_finish_could_not_deliver_is_delivered_later(
    configure: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    with monkeypatch.context() as broken:

        def refuse(run: MlflowRun) -> None:
            raise ConnectionError("nobody there")

        broken.setattr(MlflowRun, "connect", refuse)
        tracker = Tracker(configure(tracking={"finish_timeout_s": 0.2}), str(tmp_path / "run"), tags={"job": "j"})
        tracker.start()
        log_steps(tracker, range(6))
        deadline = time.monotonic() + 60
        while not caplog.messages and time.monotonic() < deadline:  # a figure comes before the first attempt
            time.sleep(0.01)
        began, before_ms = time.monotonic(), time.time() * 1000
        links = tracker.finish("FAILED", summary={"a": 1})
        assert time.monotonic() - began < 10  # 0.2 s of waiting and the figure, not the 30 s between attempts
        after_ms = time.time() * 1000
    assert links.undelivered > 6
    assert any(f"python -m raygrpo.tracking {tmp_path / 'run'}" in message for message in caplog.messages)
    assert sum("nobody there" in message for message in caplog.messages) == 1  # said once, not at every attempt
    assert tracker.warnings() == caplog.messages
    assert tracker.warnings(1) == caplog.messages[1:]

    links = replay(str(tmp_path / "run"))
    assert links.undelivered == 0
    assert store_points(links) == [(step, step / 10) for step in range(6)]
    store = Store(links.tracking_uri)
    run = store.client.get_run(links.run_id)
    assert run.info.status == "FAILED"
    assert before_ms - 1 <= run.info.end_time <= after_ms
    assert run.data.tags["job"] == "j"
    assert store.artifacts(links.run_id) == ["config.yaml", "reward_curve.png", "summary.json"]
    replay(str(tmp_path / "run"))  # again: nothing changes
    assert store_points(links) == [(step, step / 10) for step in range(6)]
    assert store.client.get_run(links.run_id).info.status == "FAILED"


def test_replay_of_a_directory_that_is_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not the directory of a run: it has no config.yaml"):
        replay(str(tmp_path))


def test_a_disk_that_refuses_stops_neither_training_nor_mlflow(configure: MakeConfig, tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_text("in the way")
    tracker = Tracker(configure(), str(tmp_path / "file" / "run"))
    tracker.start()
    log_steps(tracker, range(6))
    links = tracker.finish(summary={"a": 1})
    assert store_points(links) == [(step, step / 10) for step in range(6)]
    assert Store(links.tracking_uri).client.get_run(links.run_id).info.status == "FINISHED"
    assert sum("metrics are kept in memory only" in message for message in caplog.messages) == 1


def test_a_line_torn_by_a_crash_costs_that_line_only(configure: MakeConfig, tmp_path: Path, caplog) -> None:
    tracker = Tracker(configure(), str(tmp_path / "run"))
    log_steps(tracker, range(2))
    tracker.close(60)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "time_ms": 17')
    tracker = Tracker(configure(), str(tmp_path / "run"))
    log_steps(tracker, range(2, 4))
    links = tracker.finish()
    assert store_points(links) == [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.3)]
    assert list(Tracker(configure(), str(tmp_path / "run")).history()) == [0, 1, 2, 3]
    assert any("line 3" in message for message in caplog.messages)


def test_an_artifact_that_vanished_does_not_hold_up_the_rest(configure: MakeConfig, tmp_path: Path, caplog) -> None:
    tracker = Tracker(configure(), str(tmp_path / "run"))
    tracker.log_artifact(str(tmp_path / "nowhere.txt"))
    (tmp_path / "here.txt").write_text("hello")
    tracker.log_artifact(str(tmp_path / "here.txt"), "notes")
    log_steps(tracker, range(2))
    links = tracker.finish()
    store = Store(links.tracking_uri)
    assert links.undelivered == 0
    assert store.text(links.run_id, "notes/here.txt", tmp_path / "run") == "hello"
    assert any("nowhere.txt" in message for message in caplog.messages)


def test_another_store_gets_a_run_with_all_of_the_history(configure: MakeConfig, tmp_path: Path) -> None:
    first = Tracker(configure(), str(tmp_path / "run"))
    log_steps(first, range(3))
    first_id = first.finish().run_id
    second = Tracker(configure(tracking={"experiment": "another"}), str(tmp_path / "run"))
    log_steps(second, range(3, 4))
    links = second.finish()
    assert links.run_id != first_id
    assert store_points(links) == [(step, step / 10) for step in range(4)]


def store_points(links) -> list[tuple[int, float]]:
    return Store(links.tracking_uri).points(links.run_id, "reward/mean")


def test_a_process_killed_before_mlflow_answered_loses_nothing(configure: MakeConfig, tmp_path: Path) -> None:
    code = """
import os, sys
from raygrpo.config import RunConfig
from raygrpo.tracking import Tracker
from tests.tracking.conftest import make_group

tracker = Tracker(RunConfig.model_validate_json(sys.argv[1]), sys.argv[2])
tracker.start()
for step in range(5):
    tracker.log_step(step, {"reward/mean": step / 10})
    tracker.log_samples(step, [make_group(step, [[1.0, 0.0]])], [[0.0]])
os._exit(9)
"""
    config = configure(tracking={"num_traces": 0})
    arguments = [sys.executable, "-c", code, config.model_dump_json(), str(tmp_path / "run")]
    killed = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert killed.returncode == 9, killed.stderr
    second = Tracker(config, str(tmp_path / "run"))
    log_steps(second, range(5, 7))
    links = second.finish()
    assert store_points(links) == [(step, step / 10) for step in range(7)]
    store = Store(links.tracking_uri)
    assert store.artifacts(links.run_id, "samples") == [f"samples/step_{step:06d}.json" for step in range(5)]
