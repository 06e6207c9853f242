"""What a run that goes wrong tells while it goes: a generator dies with groups in it."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from raygrpo.gauges import FAULT_KINDS, FIGURES, GENERATORS, OF_A_STEP, STAGES, Gauges
from raygrpo.roles.claims import Release
from raygrpo.roles.controller import RolloutController
from raygrpo.types import RunInfo
from tests.chaos import GROUPS_PER_STEP, record, started, write_task
from tests.fake_generator import FakeGenerator, Script
from tests.roles.test_controller import prompt_set

pytestmark = pytest.mark.timeout(500)

Series = dict[tuple[str, ...], float]  # (name, then the values of its tags but run) -> value
TAGS = {figure.exported_name: figure.tags for figure in FIGURES}


def scrape(address: str, run: str) -> Series:
    """The run's figures, as Prometheus gets them."""
    with urllib.request.urlopen(address, timeout=10) as answer:
        text = answer.read().decode()
    series = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in TAGS and sample.labels["run"] == run:
                series[sample.name, *(sample.labels[tag] for tag in TAGS[sample.name])] = sample.value
    return series


@dataclass
class Observed:
    directory: Path
    scrapes: list[Series]
    screen: str
    lines: dict[str, list[dict[str, Any]]]  # of logs/*.jsonl, by file
    steps: dict[int, dict[str, float]]


def read_logs(directory: Path) -> dict[str, list[dict[str, Any]]]:
    files = {}
    for path in sorted((directory / "logs").glob("*.jsonl")):
        files[path.name] = []
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the line that is being written
                files[path.name].append(json.loads(line))
    return files


@pytest.fixture(scope="module")
def observed(tmp_path_factory) -> Iterator[Observed]:
    """A run whose figures are scraped all the time, and whose generator-0 is killed while it holds a group."""
    directory = tmp_path_factory.mktemp("observed")
    command = [
        str(Path(sys.executable).parent / "raygrpo"), "train", str(write_task(directory)), "max_staleness=1",
        "generator.engine=transformers", "generator.vllm={}", "generator.sampling.max_tokens=50",
        "learner.num_workers=1", "algorithm.kl.coef=0.01", "log_level=debug", "num_steps=16", "checkpoint.every=8",
        "eval={every: 8, data: {source: 'chaos_task:rows', max_rows: 3}}",
    ]  # fmt: skip
    run_dir, scrapes, address = directory / "runs" / "chaos-latest", [], None
    deadline_s = time.monotonic() + 400
    with (
        pytest.MonkeyPatch.context() as patch,
        open(directory / "screen.txt", "w") as screen,
    ):
        patch.setenv("RAY_metrics_report_interval_ms", "500")  # instead of 10 s
        with started(command, directory, screen) as process:
            while process.poll() is None:
                assert time.monotonic() < deadline_s, (directory / "screen.txt").read_text()
                lines = read_logs(run_dir) if run_dir.exists() else {}
                told = [line["message"] for line in lines.get("driver.jsonl", [])]
                address = address or next((m[1] for t in told if (m := re.search(r"Prometheus: (http\S+)", t))), None)
                if address:
                    with contextlib.suppress(OSError):
                        scrapes.append(scrape(address, run_dir.resolve().name))
                if record(run_dir) and not begun_and_lost(lines):
                    kill_amid_a_group(run_dir)
                time.sleep(0.05)
        assert process.returncode == 0, (directory / "screen.txt").read_text()
    yield Observed(
        run_dir, scrapes, (directory / "screen.txt").read_text(), read_logs(run_dir.resolve()), record(run_dir)
    )


def kill_amid_a_group(run_dir: Path) -> None:
    """Kill generator-0 if it holds a ticket's group. It is stopped while that is decided."""
    pid, held = held_by_generator_0(run_dir)
    if not held:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        generator = psutil.Process(pid)
        generator.suspend()
        while generator.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
            time.sleep(0.001)
        _, held = held_by_generator_0(run_dir)
        if held:
            generator.kill()
        else:
            generator.resume()


def held_by_generator_0(run_dir: Path) -> tuple[int, set[int]]:
    """Its newest process, and the tickets that this has begun and not sampled."""
    lines = read_logs(run_dir).get("generator-0.jsonl", [])
    pid, held = lines[-1]["pid"] if lines else -1, set()
    for line in lines:
        if line["pid"] == pid and "group" in line:
            (held.add if line["message"].startswith("begun") else held.discard)(line["group"])
    return pid, held


def begun_and_lost(lines: dict[str, list[dict[str, Any]]]) -> list[int]:
    """Tickets that generator-0 had begun and that failed on it: not those that were still on their way."""
    begun = [line for line in lines.get("generator-0.jsonl", []) if line["message"].startswith("begun")]
    since = {line["group"]: line["time"] for line in reversed(begun) if "group" in line}
    failed = [line for line in lines.get("controller.jsonl", []) if "failed on generator-0" in line["message"]]
    return [line["group"] for line in failed if since.get(line["group"], line["time"]) < line["time"]]


def test_what_prometheus_gets_of_a_step_is_what_the_record_has(observed):
    compared = set()
    for series in observed.scrapes:
        step = series.get(("ray_raygrpo_step",))
        if step is None:
            continue
        metrics = observed.steps[int(step)]
        expected = {(figure.exported_name,): metrics[name] for name, figure in OF_A_STEP.items()}
        expected |= {("ray_raygrpo_stage_seconds", stage): metrics[f"timing_s/{stage}"] for stage in STAGES}
        for kind in FAULT_KINDS:
            total = sum(observed.steps[s].get(f"faults/{kind}", 0.0) for s in range(int(step) + 1))
            expected["ray_raygrpo_faults", kind] = total
        found = {key: series[key] for key in expected if key in series}
        if found == pytest.approx(expected, rel=1e-6):
            compared.add(step)
    assert len(compared) >= 2, "of some steps all figures are those of the record"


def test_every_figure_that_the_dashboard_shows_is_there(observed):
    assert {key[0] for series in observed.scrapes for key in series} == set(TAGS)


def test_the_pools_state_is_seen_from_outside(observed):
    states = [
        {state: series[GENERATORS.exported_name, state] for state in ("healthy", "not_ready", "dead")}
        for series in observed.scrapes
        if (GENERATORS.exported_name, "dead") in series
    ]
    assert all(state["dead"] == 0 for state in states)
    assert {(state["healthy"], state["not_ready"]) for state in states} >= {(2, 0), (1, 1)}
    assert max(series.get(("ray_raygrpo_generator_failures",), 0) for series in observed.scrapes) >= 1
    for generator in ("generator-0", "generator-1"):
        assert max(s.get(("ray_raygrpo_generator_tokens_total", generator), 0) for s in observed.scrapes) > 0


def test_the_lines_about_a_ticket_tell_its_story(observed):
    """As `jq -s 'map(select(.group == T)) | sort_by(.time) | .[]' RUN_DIR/logs/*.jsonl` shows it."""
    everything = [line for lines in observed.lines.values() for line in lines]
    ticket = begun_and_lost(observed.lines)[0]
    story = sorted((line for line in everything if line.get("group") == ticket), key=lambda line: line["time"])
    for line in story:
        assert line["run"] == observed.directory.resolve().name
        assert line["attempt"] == 1 and line["step"] == ticket // GROUPS_PER_STEP
    told = [(line["role"], re.sub(r"[\d.]+ s\b", "# s", line["message"])) for line in story]
    expected = [
        ("controller", r"goes to generator-0 after # s .*"),
        ("generator-0", r"begun by version \d+, beside \d+ others"),
        (
            "rollout",
            r"no group from generator-0: Actor(Died|Unavailable)Error: .*",
        ),
        ("controller", r"ticket \d+ failed on generator-0, and goes to another generator: .*"),
        ("controller", r"goes to generator-\d after # s .*"),
        (r"generator-\d", r"sampled by version \d+: \d+ tokens in # s"),
        ("reward", r"scored in # s: mean reward .*"),
        ("learner-0", r"arrived, sampled by version \d+ of generator-\d"),
    ]
    remaining = iter(told)
    for role, message in expected:
        assert any(re.fullmatch(role, r) and re.fullmatch(message, m) for r, m in remaining), (role, message, told)


def test_every_process_says_how_it_goes(observed):
    assert set(observed.lines) >= {
        "driver.jsonl", "controller.jsonl", "generator-0.jsonl", "generator-1.jsonl", "learner-0.jsonl",
        "tracker.jsonl", "rollout.jsonl", "reward.jsonl", "evaluator.jsonl",
    }  # fmt: skip
    assert len({line["pid"] for line in observed.lines["generator-0.jsonl"]}) >= 2, "the killed one and its successor"
    trained = [line for line in observed.lines["learner-0.jsonl"] if line["message"].startswith("trained")]
    assert [line["step"] for line in trained] == sorted(observed.steps)
    assert all(line["attempt"] == 1 for line in trained)


def test_groups_of_evaluations_are_not_taken_for_tickets(observed):
    """Three rows, evaluated before the first step, after the eighth and at the end."""
    lines = [line for file in observed.lines.values() for line in file if "evaluation_row" in line]
    assert not any("group" in line or line["role"].startswith(("learner", "reward")) for line in lines)
    scored = [line for line in lines if line["message"].startswith("scored")]
    assert sorted(line["evaluation_row"] for line in scored) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert {line["role"] for line in lines} >= {"controller", "evaluator"}


def test_the_screen_says_what_a_starting_run_waits_for_and_stays_for_people(observed):
    *starting, training = [
        observed.screen.index(phase)
        for phase in ("starting Ray", "starting the tracker", "starting learners and generators", "training")
    ]
    assert starting == sorted(starting) and starting[-1] < training
    last = len(observed.steps)
    assert re.search(
        rf"step {last}/{last}  reward -?\d+\.\d+  staleness [01]  \d+ tokens/s  0:00 left", observed.screen
    )
    assert '{"time"' not in observed.screen


@pytest.fixture
def metrics_address(ray_session) -> str:
    [node] = ray_session.nodes()
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def test_what_prometheus_gets_of_the_controller_is_its_status(ray_session, metrics_address, tmp_path):
    run = RunInfo(name="gauged", directory=str(tmp_path), groups_per_step=4, log_level="error")
    generator = ray_session.remote(FakeGenerator).options(num_cpus=0, max_concurrency=100)
    generators = {name: generator.remote(name, Script()) for name in ("a", "b", "c")}
    controller = ray_session.remote(RolloutController).options(num_cpus=0, max_concurrency=100)
    controller = controller.remote(
        prompt_set(), generators, seed=0, groups_per_step=4, group_size=2, max_staleness=1, run=run
    )
    stream = ray_session.get(controller.new_stream.remote("segment"))
    ray_session.get(controller.begin_attempt.remote(0))
    ray_session.get(controller.publish.remote(3, [ray_session.put({"version": 3})]))
    ray_session.get(controller.begin_segment.remote("segment", 0))
    [_, *taken] = [ray_session.get(controller.claim.remote(stream, row)) for row in range(6)]
    ray_session.get(controller.release_block.remote(stream, [Release(ticket=0, generator_name="a")]))
    ray_session.kill(generators["a"])  # for good
    died = Release(ticket=taken[2].ticket, generator_name=taken[2].generator_name, failure="it died")
    ray_session.get(controller.release_block.remote(stream, [died]))
    waiting = [controller.claim.remote(stream, row) for row in (20, 21, 22)]
    names = {
        "ray_raygrpo_version": lambda status: {(): status.version},
        "ray_raygrpo_claims": lambda status: {(state,): count for state, count in status.claims.items()},
        "ray_raygrpo_generators": lambda status: {(state,): count for state, count in status.generators.items()},
    }
    deadline_s = time.monotonic() + 90
    while True:
        series = scrape(metrics_address, "gauged")
        status: Any = ray_session.get(controller.status.remote())
        expected = {(name, *key): value for name, values in names.items() for key, value in values(status).items()}
        found = {key: value for key, value in series.items() if key[0] in names}
        if found == expected and status.generators == {"healthy": 2, "not_ready": 0, "dead": 1}:
            break
        assert time.monotonic() < deadline_s, (found, expected)
        time.sleep(0.5)
    assert status.version == 3 and status.claims == {"at_gate": 3, "without_generator": 0, "at_generator": 4}
    assert series[("ray_raygrpo_gate",)] == (3 + 1 + 1) * 4
    assert series[("ray_raygrpo_generator_failures",)] == 1
    del waiting
    for actor in (*generators.values(), controller):
        ray_session.kill(actor)


class Unsteady:
    def __init__(self, run: str):
        self._gauges = Gauges(run)

    def report(self, step: int, grad_norm: float) -> None:
        metrics = dict.fromkeys(OF_A_STEP, 1.0) | dict.fromkeys((f"timing_s/{s}" for s in STAGES), 1.0)
        metrics |= dict.fromkeys((f"faults/{kind}" for kind in FAULT_KINDS), 0.0)
        self._gauges.set_step(step, metrics | {"policy/grad_norm": grad_norm})


def test_a_value_that_is_not_finite_is_counted_and_hides_no_other(ray_session, metrics_address):
    actor = ray_session.remote(Unsteady).options(num_cpus=0).remote("unsteady")
    for step, grad_norm in enumerate([2.0, math.nan, math.inf]):
        ray_session.get(actor.report.remote(step, grad_norm))
    deadline_s = time.monotonic() + 90
    while (series := scrape(metrics_address, "unsteady")).get(("ray_raygrpo_step",)) != 2:
        assert time.monotonic() < deadline_s, series
        time.sleep(0.5)
    assert series[("ray_raygrpo_grad_norm",)] == 2.0, "the last that was finite"
    assert series["ray_raygrpo_faults", "non_finite_metrics"] == 2
    ray_session.kill(actor)


class Measuring:
    def seconds_per_step(self) -> float:
        gauges = Gauges("timed")
        metrics = dict.fromkeys(OF_A_STEP, 1.0) | dict.fromkeys((f"timing_s/{s}" for s in STAGES), 1.0)
        metrics |= dict.fromkeys((f"faults/{kind}" for kind in FAULT_KINDS), 0.0)
        start_s = time.process_time()
        for step in range(100):
            gauges.set_step(step, metrics)
        return (time.process_time() - start_s) / 100


def test_the_figures_of_a_step_cost_a_few_milliseconds_at_most(ray_session):
    """0.3 ms on a calm machine."""
    actor = ray_session.remote(Measuring).options(num_cpus=0).remote()
    assert ray_session.get(actor.seconds_per_step.remote()) < 5e-3
    ray_session.kill(actor)
