"""The main loop: control in the driver, data in Ray Data.

    launch      tracker, generators, controller: Ray actors; the generators' engines start while the learners do
    train       TorchTrainer.fit: the learner gang pulls the stream, updates, publishes; the gate opens; and again
    finish      the exported policy, the last figures, the summary

The driver only waits and shows progress: no rollout passes through it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from raygrpo.connect import connect_to_ray, metrics_addresses, stop_as_interrupt
from raygrpo.jobs.driver import require_shared_storage
from raygrpo.launch import launch_controller, launch_evaluator, launch_generators, launch_tracker, run_gang
from raygrpo.prepare import PreparedRun
from raygrpo.run_directory import (
    RunResult,
    driver_log,
    exported_policy,
    latest_run_directory,
    new_run_directory,
    run_info,
    run_result,
)
from raygrpo.summary import summarise
from raygrpo.types import RunInfo

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from raygrpo.tracking import Links
    from raygrpo.types import StepMetrics

logger = logging.getLogger(__name__)

POLL_S = 0.5  # between looks at the run's progress


class Watcher(Protocol):
    """Who is told how the run proceeds; called from one thread."""

    def on_phase(self, text: str) -> None: ...

    def on_link(self, title: str, address: str) -> None: ...

    def on_step(self, step: int, metrics: StepMetrics) -> None: ...

    def on_evaluation(self, version: int, metrics: StepMetrics) -> None: ...

    def on_warning(self, text: str) -> None: ...


def train(
    prepared: PreparedRun,
    watcher: Watcher,
    *,
    resume: bool = False,
    resume_command: str | None = None,
    verbose: bool = False,
) -> RunResult:
    """Train to the end and return what came of it.

    resume: go on with the newest run of this name, from its newest checkpoint, instead of beginning one.
    resume_command: what a user would type for that; stands on the MLflow run's page. verbose: also show what the worker
    processes print.

    Raises RuntimeError with the cause when training failed; what was tracked until then is kept.
    """
    config = prepared.config
    old_run_dir = latest_run_directory(config) if resume else None
    watcher.on_phase("starting Ray")
    with connect_to_ray(config, verbose=verbose) as dashboard, stop_as_interrupt():
        require_shared_storage(config)
        run = run_info(config, old_run_dir or new_run_directory(config))
        with driver_log(run, resume=resume):
            history, evaluations, links = _train(prepared, run, watcher, resume_command, dashboard)
    return run_result(Path(run.directory), history, evaluations, links)


def _train(
    prepared: PreparedRun, run: RunInfo, watcher: Watcher, resume_command: str | None, dashboard: str | None
) -> tuple[dict[int, StepMetrics], dict[int, StepMetrics], Links]:
    """All of the run on the Ray that this process is connected to: steps, evaluations, and where they are shown."""
    import ray

    config = prepared.config
    logger.info("metrics for Prometheus: %s", ", ".join(metrics_addresses()))
    watcher.on_phase("starting the tracker")
    tracker = launch_tracker(config, run, resume_command, dashboard)
    generators = launch_generators(prepared, run)
    controller = launch_controller(prepared, run)
    evaluator = launch_evaluator(prepared, run) if config.evaluates else None
    prompts, evaluation = ray.put(prepared.prompts), ray.put(prepared.evaluation)
    status = "FAILED"
    try:
        set_up = partial(controller.set_up.remote, prompts, generators, evaluation, evaluator)
        with _follow(tracker, controller, set_up, watcher):
            run_gang(prepared, controller, tracker, run)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        history: Any = ray.get(tracker.history.remote())
        evaluations: Any = ray.get(tracker.evaluations.remote())
        summary = summarise(history, evaluations).as_dict()
        policy = exported_policy(Path(run.directory), status)
        links: Any = ray.get(tracker.finish.remote(status, summary, policy))
        for actor in (*generators.values(), *([evaluator] if evaluator else []), controller, tracker):
            ray.kill(actor)  # on a cluster that goes on after us
    return history, evaluations, links


@contextmanager
def _follow(
    tracker: ActorHandle, controller: ActorHandle, set_up: Callable[[], object], watcher: Watcher
) -> Iterator[None]:
    """Tell the watcher what happens, and set up the controller whenever it is new, from a thread, while the body
    runs."""
    import ray
    import ray.exceptions

    done = threading.Event()

    def follow() -> None:
        next_step = next_version = 0
        num_warnings = {"controller": 0, "tracker": 0}
        phase = ""
        is_linked = False
        last, period_s = False, 0.0
        while not last:
            last, period_s = done.wait(period_s), POLL_S  # one more look after the end
            try:
                status: Any = ray.get(controller.status.remote(num_warnings["controller"]))
            except ray.exceptions.RayActorError:  # Ray starts it again, with no warnings yet
                num_warnings["controller"] = 0
                continue
            if not status.is_set_up:
                set_up()
            warnings = {
                "controller": status.warnings,
                "tracker": ray.get(tracker.warnings.remote(num_warnings["tracker"])),
            }
            for source, texts in warnings.items():
                for text in texts:
                    watcher.on_warning(text)
                num_warnings[source] += len(texts)
            if not is_linked:
                links: Links = ray.get(tracker.links.remote())  # type: ignore[assignment]
                if links.run_url is not None:
                    is_linked = True
                    watcher.on_link("MLflow", links.ui_command or links.run_url)
            history: Any = ray.get(tracker.history.remote(next_step))
            for step, metrics in history.items():
                watcher.on_step(step, metrics)
                next_step = step + 1
            now = "training" if next_step and status.version >= 0 else status.waits_for
            if now != phase:
                phase = now
                watcher.on_phase(phase)
            evaluations: Any = ray.get(tracker.evaluations.remote(next_version))
            for version, metrics in evaluations.items():
                watcher.on_evaluation(version, metrics)
                next_version = version + 1

    thread = threading.Thread(target=follow, name="watcher", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
