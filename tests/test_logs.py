"""Lines say what they are about, whoever writes them, and land in a file of bounded size that is the process's own."""

from __future__ import annotations

import json
import logging
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raygrpo import logs
from raygrpo.run_directory import driver_log, run_info
from raygrpo.types import LogLevel, RunInfo
from tests.conftest import run_config

logger = logging.getLogger("raygrpo.somewhere")


def info(directory: Path, level: LogLevel = "info") -> RunInfo:
    return RunInfo(name="run-1", directory=str(directory), groups_per_step=4, log_level=level)


@pytest.fixture
def run(tmp_path) -> Iterator[RunInfo]:
    (tmp_path / logs.LOG_DIR).mkdir()
    yield info(tmp_path)
    logs.close_log()


def lines(run: RunInfo, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(run.directory, logs.LOG_DIR, file).read_text().splitlines()]


def test_a_line_carries_run_role_attempt_step_and_group(run):
    logs.open_log(run, "learner-0")
    logs.always(attempt=2, step=7)
    logger.info("between groups")
    with logs.about(group=33):
        logger.info("about %s", "a group")
        with logs.about(attempt=1):
            logger.warning("an earlier attempt's")
    logger.info("after it")
    first, second, third, fourth = lines(run, "learner-0.jsonl")
    assert (first["run"], first["role"], first["attempt"], first["step"]) == ("run-1", "learner-0", 2, 7)
    assert first["level"] == "info" and first["logger"] == "raygrpo.somewhere" and "group" not in first
    assert (second["group"], second["step"], second["message"]) == (33, 8, "about a group"), "ticket 33 is of step 8"
    assert (third["group"], third["attempt"], third["level"]) == (33, 1, "warning")
    assert "group" not in fourth and fourth["step"] == 7


def test_what_a_task_is_about_does_not_reach_the_tasks_beside_it(run):
    import asyncio

    logs.open_log(run, "controller")

    async def work(group: int) -> None:
        with logs.about(group=group):
            await asyncio.sleep(0.01 * (3 - group))
            logger.info("%d", group)

    async def all_of_it() -> None:
        await asyncio.gather(*map(work, range(3)))

    asyncio.run(all_of_it())
    assert [(line["group"], line["message"]) for line in lines(run, "controller.jsonl")] == [
        (2, "2"),
        (1, "1"),
        (0, "0"),
    ]


def test_an_exception_stands_in_its_line(run):
    logs.open_log(run, "tracker")
    try:
        raise KeyError("gold")
    except KeyError:
        logger.exception("it failed")
    [line] = lines(run, "tracker.jsonl")
    assert (
        line["message"] == "it failed" and "KeyError: 'gold'" in line["exception"] and "Traceback" in line["exception"]
    )


@pytest.mark.parametrize(("level", "written"), [("debug", 3), ("info", 2), ("warning", 1), ("error", 0)])
def test_log_level_says_what_is_written(tmp_path, level, written):
    config = run_config(log_level=level)
    run = run_info(config, tmp_path)
    with driver_log(run, resume=False):
        before = len(lines(run, "driver.jsonl"))
        logger.debug("a detail")
        logger.info("an event")
        logger.warning("a fault")
        assert len(lines(run, "driver.jsonl")) - before == written


def test_the_driver_says_why_the_run_ended(tmp_path):
    run = run_info(run_config(), tmp_path / "run-1")
    Path(run.directory).mkdir()
    with pytest.raises(RuntimeError), driver_log(run, resume=True):
        raise RuntimeError("no generator is left")
    assert [line["message"] for line in lines(run, "driver.jsonl")] == [
        "the run is resumed",
        "the run ends: RuntimeError: no generator is left",
    ]
    assert logging.getLogger("raygrpo").handlers == []


def test_warnings_reach_stderr_and_other_lines_do_not(run, capsys):
    logs.open_log(run, "driver")
    logger.info("an event")
    logger.warning("a fault")
    assert capsys.readouterr().err == "a fault\n"


def test_files_are_bounded(run, monkeypatch):
    monkeypatch.setattr(logs, "MAX_BYTES", 2000)
    logs.open_log(run, "reward")
    for number in range(1000):
        logger.info("line %d", number)
    files = list(Path(run.directory, logs.LOG_DIR).glob("reward.jsonl*"))
    assert len(files) == 1 + logs.NUM_OLD_FILES
    assert all(file.stat().st_size <= 2000 for file in files)
    assert lines(run, "reward.jsonl")[-1]["message"] == "line 999"


def _write(run: RunInfo, written: Any) -> None:
    logs.open_log(run, "reward")
    logger.info("here")
    written.set()
    time.sleep(600)


def test_two_processes_of_a_role_have_files_of_their_own_and_a_successor_goes_on_with_its_predecessors(run):
    context = multiprocessing.get_context("fork")
    processes = []
    for _ in range(2):
        written = context.Event()
        processes.append(context.Process(target=_write, args=(run, written), daemon=True))
        processes[-1].start()
        assert written.wait(60)
    assert [line["pid"] for line in lines(run, "reward.jsonl")] == [processes[0].pid]
    assert [line["pid"] for line in lines(run, "reward.1.jsonl")] == [processes[1].pid]
    processes[0].kill()
    processes[0].join()
    logs.open_log(run, "reward")
    logger.info("in its place")
    assert [line["message"] for line in lines(run, "reward.jsonl")] == ["here", "in its place"]
    processes[1].kill()
    processes[1].join()


def test_a_directory_that_cannot_be_written_costs_the_log_and_not_the_run(tmp_path, capsys):
    (tmp_path / logs.LOG_DIR).mkdir()
    (tmp_path / logs.LOG_DIR / ".tracker.jsonl.lock").mkdir()
    logs.open_log(info(tmp_path), "tracker")
    assert "tracker of run-1 writes no log: " in capsys.readouterr().err
    logger.warning("goes on")
    assert capsys.readouterr().err == "goes on\n"
    logs.close_log()


class Elsewhere:
    """A role on a machine that does not see the run's directory."""

    def __init__(self, run: RunInfo):
        import ray

        logs.open_log(run, "generator-7")
        logger.info("hello")
        self.session_logs = ray._private.worker._global_node.get_logs_dir_path()

    def where(self) -> str:
        return self.session_logs


def test_without_the_runs_directory_lines_go_to_rays_logs(ray_session, tmp_path):
    actor = ray_session.remote(Elsewhere).options(num_cpus=0).remote(info(tmp_path / "not-here"))
    directory = ray_session.get(actor.where.remote())
    [line] = map(json.loads, Path(directory, "run-1-generator-7.jsonl").read_text().splitlines())
    assert line["message"] == "hello" and line["run"] == "run-1"
    ray_session.kill(actor)
