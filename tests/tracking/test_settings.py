"""Each setting of `tracking`, by what it changes; where a run is tracked; what the pieces compute."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raygrpo.tracking import Tracker, resolve_tracking_uri
from raygrpo.tracking.describe import dataset_facts, description, flatten
from raygrpo.tracking.figures import RewardCurve, smooth
from raygrpo.tracking.journal import Record
from raygrpo.tracking.machine import MachineMetrics
from raygrpo.tracking.store import metric_name, run_url, ui_command, without_password
from tests.tracking.conftest import FirstRun, MakeConfig, Store, make_config, make_group

REWARDS = [[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]
ADVANTAGES = [0.9, -0.7, -1.0, 0.8]


def test_the_uri_comes_from_the_setting_then_the_environment_then_the_output_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert resolve_tracking_uri(make_config(tmp_path, tracking={"uri": "http://chosen:1"})) == "http://chosen:1"
    assert resolve_tracking_uri(make_config(tmp_path)) == "http://server:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert resolve_tracking_uri(make_config(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    assert resolve_tracking_uri(make_config(Path("runs"))) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert (
        resolve_tracking_uri(make_config(tmp_path, tracking={"uri": "sqlite:///a.db"})) == f"sqlite:///{tmp_path}/a.db"
    )


@pytest.mark.parametrize("uri", ["file:///data/mlruns", "./mlruns", "mlruns"])
def test_a_directory_as_store_is_refused_with_what_to_set(tmp_path: Path, uri: str) -> None:
    with pytest.raises(ValueError, match=r"(?s)mlruns.*tracking\.uri.*sqlite:///.*http://"):
        Tracker(make_config(tmp_path, tracking={"uri": uri}), str(tmp_path / "run"))


def test_the_default_store_keeps_everything_under_the_output_directory(first_run: FirstRun) -> None:
    store = Store(f"sqlite:///{first_run.output_dir}/mlflow.db")
    (run,) = store.runs("raygrpo")
    assert run.info.artifact_uri.startswith((first_run.output_dir / "mlartifacts").as_uri())
    assert store.points(run.info.run_id, "reward/mean") == [(0, 0.5)]


def test_the_links_open_this_run(tmp_path: Path) -> None:
    command = ui_command(f"sqlite:///{tmp_path}/with space/mlflow.db")
    assert command is not None
    assert command.endswith(f"ui --workers 1 --backend-store-uri 'sqlite:///{tmp_path}/with space/mlflow.db'")
    program = command.split()[0]
    done = subprocess.run([program, "ui", "--help"], capture_output=True, text=True, timeout=120, check=False)
    assert "--backend-store-uri" in done.stdout
    assert "--workers" in done.stdout
    assert ui_command("http://server:5000/") is None
    assert run_url("http://server:5000/", "3", "abc").startswith("http://server:5000/#/experiments/3/runs/abc")


def test_passwords_stay_out_of_the_log() -> None:
    assert without_password("postgresql://user:secret@host:5432/db") == "postgresql://user:***@host:5432/db"
    assert without_password("http://host:5000") == "http://host:5000"


@pytest.mark.parametrize("every, expected", [(0, []), (1, [0, 1, 2, 3, 4]), (3, [0, 3])])
def test_samples_every(configure: MakeConfig, tmp_path: Path, every: int, expected: list[int]) -> None:
    tracking = {"samples_every": every, "num_samples": 3, "num_traces": 0}
    tracker = Tracker(configure(tracking=tracking), str(tmp_path / "run"))
    for step in range(5):
        tracker.log_samples(step, [make_group(step, REWARDS)], [ADVANTAGES])
    links = tracker.finish()
    store = Store(links.tracking_uri)
    assert store.artifacts(links.run_id, "samples") == [f"samples/step_{step:06d}.json" for step in expected]


@pytest.mark.parametrize("num_samples, num_traces", [(1, 0), (5, 1), (9, 3)])
def test_num_samples_and_num_traces(configure: MakeConfig, tmp_path: Path, num_samples: int, num_traces: int) -> None:
    import json

    tracking = {"num_samples": num_samples, "num_traces": num_traces}
    tracker = Tracker(configure(tracking=tracking), str(tmp_path / "run"))
    tracker.log_samples(0, [make_group(ticket, REWARDS) for ticket in range(3)], [ADVANTAGES] * 3)
    links = tracker.finish()
    store = Store(links.tracking_uri)
    table = json.loads(store.text(links.run_id, "samples/step_000000.json", tmp_path))
    assert len(table["data"]) == num_samples
    experiment = store.client.get_run(links.run_id).info.experiment_id
    assert len(store.client.search_traces(locations=[experiment], run_id=links.run_id)) == num_traces


def test_figure_every(configure: MakeConfig, tmp_path: Path) -> None:
    for every, drawn_at in ((2, [0, 2, 4]), (0, [])):
        run_dir = tmp_path / f"every{every}"
        figure = run_dir / "reward_curve.png"
        tracker = Tracker(configure(tracking={"figure_every": every}), str(run_dir))
        drawn = []
        for step in range(5):
            figure.unlink(missing_ok=True)
            tracker.log_step(step, {"reward/mean": 0.1 * step})
            tracker.log_step(step, {"eval/accuracy": 0.5})  # no reason to draw
            deadline = time.monotonic() + (60 if step in drawn_at else 0.3)
            while not figure.exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            drawn += [step] if figure.exists() else []
        assert drawn == drawn_at
        figure.unlink(missing_ok=True)
        links = tracker.finish()  # the final figure, always
        assert Path(links.figure).read_bytes().startswith(b"\x89PNG")
        assert "reward_curve.png" in Store(links.tracking_uri).artifacts(links.run_id)


@pytest.mark.parametrize("wanted", [True, False])
def test_system_metrics(configure: MakeConfig, tmp_path: Path, wanted: bool) -> None:
    tracker = Tracker(configure(tracking={"system_metrics": wanted}), str(tmp_path / "run"))
    tracker.start()
    end = time.monotonic() + 0.3
    while time.monotonic() < end:  # one core is busy
        sum(range(1000))
    tracker.log_step(0, {"reward/mean": 0.0})
    tracker.close(60)
    values = tracker.history()[0]
    assert ("system/cpu_utilization_percentage" in values) == wanted
    if wanted:
        assert 1.0 < values["system/cpu_utilization_percentage"] <= 100.0
        assert values["system/system_memory_usage_megabytes"] > 100.0
        assert 0.0 < values["system/system_memory_usage_percentage"] <= 100.0


def test_the_cpu_is_measured_whichever_thread_asks() -> None:
    machine = MachineMetrics()
    for _ in range(3):
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            sum(range(1000))
        with ThreadPoolExecutor(1) as thread:  # a new one each time
            assert 1.0 < thread.submit(machine).result()["system/cpu_utilization_percentage"] <= 100.0


def test_experiment(configure: MakeConfig, tmp_path: Path) -> None:
    links = Tracker(configure(tracking={"experiment": "of my own"}), str(tmp_path / "run")).finish()
    (run,) = Store(links.tracking_uri).runs("of my own")
    assert run.info.run_id == links.run_id


def test_the_data_set_is_an_input_with_the_digest_of_its_content(configure: MakeConfig, tmp_path: Path) -> None:
    for name, text in (("a.jsonl", "1"), ("b.jsonl", "2")):
        (tmp_path / name).write_text(text)
    config = configure(data={"source": str(tmp_path / "*.jsonl")})
    links = Tracker(config, str(tmp_path / "run")).finish()
    (dataset,) = Store(links.tracking_uri).client.get_run(links.run_id).inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.source_type) == ("*.jsonl", "files")
    assert dataset.dataset.digest == dataset_facts(config.data)["digest"]
    before = dataset_facts(config.data)["digest"]
    assert dataset_facts(config.data)["digest"] == before
    (tmp_path / "b.jsonl").write_text("3")
    assert dataset_facts(config.data)["digest"] != before
    hub = configure(data={"source": "openai/gsm8k", "subset": "main"})
    assert dataset_facts(hub.data)["name"] == "openai/gsm8k main train"
    assert dataset_facts(hub.data) != dataset_facts(configure(data={"source": "openai/gsm8k", "subset": "other"}).data)


def test_the_data_of_evaluation_sets_are_inputs_too(configure: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text("1")
    sets = {"near": {"data": {"source": str(tmp_path / "held.jsonl")}}, "far": {"data": {"source": "hub/other"}}}
    links = Tracker(configure(eval={"sets": sets}), str(tmp_path / "run")).finish()
    inputs = Store(links.tracking_uri).client.get_run(links.run_id).inputs.dataset_inputs
    names = {each.tags[0].value: each.dataset.name for each in inputs}
    assert names.pop("training") and names == {"eval near": "held.jsonl", "eval far": "hub/other train"}


def test_the_description_names_what_lies_in_the_working_directory_by_its_path_in_it(
    configure: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = configure(model={"path": str(tmp_path / "tasks/small")}, data={"source": "/data/rows.jsonl"})
    assert description(config, tmp_path / "run", {}, None).startswith("GRPO on `tasks/small` with `/data/rows.jsonl`: ")


@given(st.text(max_size=400))
def test_mlflow_accepts_every_metric_name_we_send(name: str) -> None:
    from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH, _validate_metric_name

    _validate_metric_name(metric_name(name))
    assert len(metric_name(name)) <= MAX_ENTITY_KEY_LENGTH


def test_names_that_mlflow_accepts_stay_as_they_are() -> None:
    for name in ("reward/mean", "timing_s/step", "eval/pass-8", "reward/my reward.v2"):
        assert metric_name(name) == name
    assert metric_name("eval/pass@8") == "eval/pass_8"


def test_flatten_keeps_every_leaf() -> None:
    tree = {"a": {"b": 1, "c": [True, None, "text"], "empty": {}, "none": []}, "d": 0.1}
    assert flatten(tree) == {
        "a.b": "1",
        "a.c.0": "true",
        "a.c.1": "null",
        "a.c.2": "text",
        "a.empty": "{}",
        "a.none": "[]",
        "d": "0.1",
    }


def test_smoothing_is_the_unbiased_moving_average() -> None:
    values = np.array([1.0, 3.0, np.nan, 5.0])
    decay = 1 - 2 / 4  # span 3
    weights = [decay**3, decay**2, decay**0]
    expected_last = np.dot(weights, [1.0, 3.0, 5.0]) / sum(weights)
    assert smooth(values, 3) == pytest.approx(
        [1.0, (decay * 1 + 3) / (decay + 1), (decay * 1 + 3) / (decay + 1), expected_last]
    )
    assert np.isnan(smooth(np.array([np.nan]), 3)[0])


def test_no_figure_before_there_is_a_reward(tmp_path: Path) -> None:
    curve = RewardCurve("name")
    curve.add(Record(0, 0, {"policy/loss": 1.0}))
    assert not curve.draw(tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())
    curve.add(Record(0, 1, {"reward/mean": 1.0}))
    assert curve.draw(tmp_path / "figure.png")  # a single step, nothing else


def test_the_figure_has_the_last_values_of_a_step_and_the_evaluations(tmp_path: Path) -> None:
    def picture(name: str, *records: Record) -> bytes:
        curve = RewardCurve("name")
        for record in records:
            curve.add(record)
        assert curve.draw(tmp_path / name)
        return (tmp_path / name).read_bytes()

    steps = [Record(step, step, {"reward/mean": 0.1 * step, "reward/std": 0.1}) for step in range(6)]
    again = Record(3, 99, {"reward/mean": 0.9, "reward/std": 0.1})
    once = picture("once.png", *steps)
    assert picture("again.png", *steps, again) == picture("last.png", *steps[:3], again, *steps[4:]) != once
    assert picture("eval.png", *steps, Record(5, 7, {"eval/held_out/reward": 0.4})) != once


def test_importing_the_tracker_is_light() -> None:
    heavy = "mlflow", "torch", "ray", "pandas", "matplotlib"
    code = f"import sys, raygrpo.tracking; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_warnings_reach_stderr_where_logging_is_not_set_up(tmp_path: Path) -> None:
    code = """
import sys
from raygrpo.config import RunConfig
from raygrpo.tracking import Tracker

tracker = Tracker(RunConfig.model_validate_json(sys.argv[1]), sys.argv[2])
tracker.log_step(3, {"policy/kl": float("nan")})
print(tracker.warnings())
"""
    config = make_config(tmp_path, tracking={"uri": "http://127.0.0.1:9"})
    arguments = [sys.executable, "-c", code, config.model_dump_json(), str(tmp_path / "run")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True)
    text = "policy/kl is nan at step 3: MLflow shows a gap where it is not finite"
    assert done.stdout.strip() == repr([text])
    assert done.stderr.count(text) == 1
