"""The main loop: control in the driver, data in Ray Data.

    launch      tracker, generators, controller: Ray actors; the generators' engines start while the learners do
    train       TorchTrainer.fit: the learner gang pulls the stream, updates, publishes; the gate opens; and again
    finish      the exported policy, the last figures, the summary

The driver only waits and shows progress: no rollout passes through it.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from raygrpo.checkpoint import CheckpointStore
from raygrpo.config import RunConfig
from raygrpo.jobs.driver import identify, require_shared_storage
from raygrpo.logs import LOG_DIR, close_log, open_log
from raygrpo.placement import one_machine_problems
from raygrpo.prepare import PreparedRun, required_resources
from raygrpo.summary import summarise
from raygrpo.types import RunInfo

if TYPE_CHECKING:
    import ray
    from ray.actor import ActorHandle
    from ray.train.torch import TorchTrainer

    from raygrpo.tracking import Links
    from raygrpo.types import StepMetrics

logger = logging.getLogger(__name__)

# The gate admits what a healthy generator can serve at once; one that lacks the version has restarted unnoticed.
VERSION_TIMEOUT_S = 10.0
RAY_STARTS = 3
ABORT_LIMIT_S = 10.0  # for Ray Train to end a gang that is interrupted
POLL_S = 0.5  # between looks at the run's progress
CHECKPOINT_DIR = "checkpoints"  # in the run's directory
EXPORT_DIR = "model"  # in the run's directory: the trained policy as a Hugging Face model


class Watcher(Protocol):
    """Who is told how the run proceeds; called from one thread."""

    def on_phase(self, text: str) -> None: ...

    def on_link(self, title: str, address: str) -> None: ...

    def on_step(self, step: int, metrics: StepMetrics) -> None: ...

    def on_evaluation(self, version: int, metrics: StepMetrics) -> None: ...

    def on_warning(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a finished run leaves."""

    run_dir: str
    export_dir: str  # the trained policy as a Hugging Face model
    history: dict[int, StepMetrics]  # by step
    evaluations: dict[int, StepMetrics]  # by version of the policy
    best_checkpoint: str | None
    links: Links  # where MLflow shows it


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
    evaluator = launch_evaluator(prepared, run, controller, tracker) if config.evaluates else None
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


def run_result(
    run_dir: Path, history: dict[int, StepMetrics], evaluations: dict[int, StepMetrics], links: Links
) -> RunResult:
    best = CheckpointStore(run_dir / CHECKPOINT_DIR, keep=1).best
    return RunResult(
        run_dir=str(run_dir),
        export_dir=str(run_dir / EXPORT_DIR),
        history=history,
        evaluations=evaluations,
        best_checkpoint=str(best) if best else None,
        links=links,
    )


def new_run_directory(config: RunConfig) -> Path:
    """output_dir/<name>-<time>, new. `output_dir/<name>-latest` points to it."""
    root = Path(config.output_dir).expanduser().absolute()
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    for attempt in range(100):
        run_dir = root / (f"{config.name}-{stamp}" + (f"-{attempt}" if attempt else ""))
        try:
            run_dir.mkdir(parents=True)
            break
        except FileExistsError:
            continue
    latest = root / f"{config.name}-latest"
    latest.unlink(missing_ok=True)
    latest.symlink_to(run_dir.name)
    return run_dir


def exported_policy(run_dir: Path, status: str) -> str | None:
    """Where a run that ended with this status left the trained policy; None where it did not get so far."""
    return str(run_dir / EXPORT_DIR) if status == "FINISHED" else None


def latest_run_directory(config: RunConfig) -> Path:
    """The directory of the newest run of this name. Raises ValueError without one."""
    latest = Path(config.output_dir).expanduser().absolute() / f"{config.name}-latest"
    if not latest.exists():
        raise ValueError(f"there is no run to resume: {latest} does not exist; train without --resume to begin one")
    return latest.resolve()


def run_info(config: RunConfig, run_dir: Path) -> RunInfo:
    """The run that lies in this directory."""
    return RunInfo(
        name=run_dir.name,
        directory=str(run_dir),
        groups_per_step=config.groups_per_step,
        log_level=config.log_level,
    )


@contextmanager
def driver_log(run: RunInfo, *, resume: bool) -> Iterator[None]:
    """The driver's log around the run, which ends with why the run did."""
    Path(run.directory, LOG_DIR).mkdir(exist_ok=True)
    open_log(run, "driver")
    try:
        logger.info("the run is resumed" if resume else "the run begins")
        yield
        logger.info("the run is finished")
    except BaseException as error:
        logger.info("the run ends: %s: %s", type(error).__name__, error)
        raise
    finally:
        close_log()


def metrics_addresses() -> list[str]:
    """Where each of Ray's nodes serves the figures of gauges.py."""
    import ray

    return [f"http://{n['NodeManagerAddress']}:{n['MetricsExportPort']}/metrics" for n in ray.nodes() if n["Alive"]]


@contextmanager
def connect_to_ray(config: RunConfig, *, verbose: bool) -> Iterator[str | None]:
    """Within a job or beside a running cluster: that cluster. Otherwise an embedded one, which ends with the run. Gives
    the dashboard's host:port, where there is one.

    Raises ValueError where an embedded one could not place the run's processes."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield None
        return
    if problems := one_machine_problems(config):
        raise ValueError("; ".join(problems))
    demand = required_resources(config)
    # A laptop's cores are shared by roles that mostly take turns: logical CPUs must fit, they do not bind anything.
    num_cpus = max(os.cpu_count() or 1, math.ceil(demand.num_cpus) + 1)
    options: dict[str, Any] = {
        "runtime_env": {"env_vars": worker_environment(config)},
        "logging_level": logging.ERROR,
        "log_to_driver": verbose,
    }
    if not os.environ.get("RAY_ADDRESS"):
        # Ray warns about more processes than it expects to start at a time, which by default is the number of cores.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
        # GCS would keep the events of 100,000 tasks, for a dashboard that an embedded Ray does not have.
        os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
        options |= {"address": "local", "num_cpus": num_cpus, "include_dashboard": False}
    dashboard = _start_ray(options)
    try:
        yield dashboard
    finally:
        ray.shutdown()


@contextmanager
def stop_as_interrupt() -> Iterator[None]:
    """SIGTERM (a job that is stopped, a machine that goes) ends the run as Ctrl-C does: recorded as killed, and ready
    to be resumed. Ray's own handler would end the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _start_ray(options: dict[str, Any]) -> str | None:
    """ray.init, again where a machine that is busy did not start it within the 30 s that Ray waits."""
    import ray

    for remaining in reversed(range(RAY_STARTS)):
        try:
            return ray.init(**options).dashboard_url
        except Exception as error:
            if not remaining or "timed out during startup" not in str(error):
                raise
            logger.warning("Ray did not start in time, trying again: %s", error)
            ray.shutdown()


def worker_environment(config: RunConfig) -> dict[str, str]:
    """Environment variables of every worker process of the run."""
    environment = {
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_TRAIN_V2_ENABLED": "1",
        "DEEPSPEED_TIMEOUT": "120",  # minutes
        "DS_LOG_LEVEL": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",  # waiting threads that spin would take the cores from the other roles
    }
    if config.learner.num_gpus == 0:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def launch_tracker(config: RunConfig, run: RunInfo, resume_command: str | None, dashboard: str | None) -> Any:
    import ray

    from raygrpo.roles.nodes import NodeMetrics
    from raygrpo.tracking import Tracker

    actor = ray.remote(Tracker).options(
        name=f"{run.name}-tracker",
        scheduling_strategy=on_this_node(),  # where the run's directory and a local MLflow store are
        num_cpus=0,
        max_concurrency=4,
        max_restarts=-1,  # it finds its run again in run_dir, and repeats no point
        max_task_retries=-1,
        # glibc gives each of its threads a heap of its own, in which pictures and tables leave holes that the others
        # cannot use: the process would grow for hundreds of steps.
        runtime_env={"env_vars": {"MALLOC_ARENA_MAX": "1"}},
    )
    tags, links = identify(dashboard)
    tracker = actor.remote(
        config,
        run.directory,
        tags=tags,
        links=links,
        resume_command=resume_command,
        run_info=run,
        machines=NodeMetrics(),
    )
    ray.get(tracker.start.remote())
    return tracker


def on_this_node() -> Any:
    """The driver's node, and no other."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def launch_generators(prepared: PreparedRun, run: RunInfo) -> dict[str, ActorHandle]:
    """Named actors that Ray restarts when they die. Their engines start in the background: the first publish waits for
    them."""
    launch = GeneratorLauncher(config=prepared.config, max_model_len=prepared.max_model_len, run=run)
    names = [f"generator-{index}" for index in range(prepared.config.generator.num_actors)]
    return {name: launch(name) for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorLauncher:
    """Makes a generator of the run; the controller takes it along, for a pool that grows."""

    config: RunConfig
    max_model_len: int
    run: RunInfo

    def __call__(self, name: str) -> Any:
        import ray

        from raygrpo.roles.generator import Generator

        settings = self.config.generator
        actor = ray.remote(Generator).options(
            name=f"{self.run.name}-{name}",
            num_cpus=settings.num_cpus,
            num_gpus=settings.num_gpus,
            label_selector=settings.label_selector,
            max_restarts=-1,
            max_task_retries=0,
        )
        return actor.remote(
            name,
            self.config.model,
            settings,
            max_model_len=self.max_model_len,
            version_timeout_s=VERSION_TIMEOUT_S,
            deterministic=self.config.deterministic,
            run=self.run,
        )


def launch_controller(prepared: PreparedRun, run: RunInfo) -> Any:
    """`set_up` must follow."""
    import ray

    from raygrpo.roles.controller import RolloutController
    from raygrpo.roles.demand import UnplacedFinder

    config = prepared.config
    actor = ray.remote(RolloutController).options(
        name=f"{run.name}-controller",
        scheduling_strategy=on_this_node(),  # where its reports go; not on a machine that may be taken away
        num_cpus=0,
        max_concurrency=10_000,
        max_restarts=-1,
    )
    return actor.remote(
        seed=config.seed,
        groups_per_step=config.groups_per_step,
        group_size=config.group_size,
        max_staleness=config.max_staleness,
        settings=config.generator,
        eval_settings=config.eval,
        num_steps=config.num_steps,
        watchdog=config.watchdog,
        launch=GeneratorLauncher(config=config, max_model_len=prepared.max_model_len, run=run),
        find_unplaced=UnplacedFinder(config),
        run=run,
    )


def launch_evaluator(prepared: PreparedRun, run: RunInfo, controller: ActorHandle, tracker: ActorHandle) -> Any:
    import ray

    from raygrpo.roles.evaluator import Evaluator

    assert prepared.evaluation is not None
    reward = prepared.config.reward
    actor = ray.remote(Evaluator).options(
        name=f"{run.name}-evaluator",
        num_cpus=reward.num_cpus,
        label_selector=reward.label_selector,
        max_restarts=-1,
        max_task_retries=-1,  # an evaluation that it died of is begun again
    )
    arguments = (prepared.config, prepared.evaluation.sizes, prepared.import_paths, controller, tracker)
    return actor.remote(*arguments, run=run)


def run_gang(prepared: PreparedRun, controller: ActorHandle, tracker: ActorHandle, run: RunInfo) -> None:
    """Ray Train's gang of learners on the stream, to the end of the run."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from raygrpo.roles.learner import SEGMENT, TAIL, LearnerSetup, run_learner
    from raygrpo.roles.link import RayLink
    from raygrpo.stream import data_config, segment_dataset

    config = prepared.config
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    learner = config.learner
    resources = {"CPU": learner.num_cpus} | ({"GPU": learner.num_gpus} if learner.num_gpus else {})

    def dataset(name: str, num_steps: int) -> Callable[[], ray.data.Dataset]:
        """Ray Train calls it at every start of the gang."""
        return lambda: segment_dataset(
            name,
            num_steps * config.groups_per_step,
            controller,
            config.reward,
            prepared.import_paths,
            groups_in_flight=(config.max_staleness + 1) * config.groups_per_step,
            groups_per_block=config.groups_per_block,
            max_replacements=config.algorithm.dynamic_sampling,
            run=run,
        )

    whole, rest = divmod(config.num_steps, config.checkpoint.every)
    lengths = ({SEGMENT: config.checkpoint.every} if whole else {}) | ({TAIL: rest} if rest else {})
    run_dir = Path(run.directory)
    link = RayLink(controller, tracker, run)
    setup = LearnerSetup(
        config=config,
        link=link,
        prompts_digest=prepared.prompts.digest,
        checkpoint_dir=str(run_dir / CHECKPOINT_DIR),
        export_dir=str(run_dir / EXPORT_DIR),
    )
    trainer = _interruptible(TorchTrainer)(
        lambda: run_learner(setup, link),
        scaling_config=ray.train.ScalingConfig(
            num_workers=learner.num_workers,
            use_gpu=learner.num_gpus > 0,
            resources_per_worker=resources,
            label_selector=learner.label_selector or None,
        ),
        torch_config=TorchConfig(backend="nccl" if learner.num_gpus else "gloo", timeout_s=7200),
        run_config=ray.train.RunConfig(
            name=f"learners-{datetime.now():%Y%m%d-%H%M%S}",
            storage_path=str(run_dir / "ray_train"),
            failure_config=ray.train.FailureConfig(max_failures=learner.max_restarts),
        ),
        datasets={name: dataset(name, length) for name, length in lengths.items()},
        dataset_config=data_config(),
    )
    failure: BaseException | None = None
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        failure = error
    status: Any = ray.get(controller.status.remote())
    if status.stop_reason is not None:
        raise RuntimeError(status.stop_reason) from failure
    if failure is not None:
        raise RuntimeError(root_cause(failure)) from failure


def _interruptible(trainer: type[TorchTrainer]) -> type[TorchTrainer]:
    """The trainer, but an interrupt raises KeyboardInterrupt in `fit`, as anywhere. Ray Train 2.60 installs a handler
    that calls sys.exit(0) instead: a stopped run would look like one that ended well."""
    import ray
    import ray.exceptions

    class Interruptible(trainer):
        def _register_sigint_handler(self, controller: ActorHandle) -> None:
            self._controller = controller

        def fit(self) -> Any:
            try:
                return super().fit()
            except KeyboardInterrupt:
                with suppress(ray.exceptions.RayError):
                    ray.get(self._controller.abort.remote(), timeout=ABORT_LIMIT_S)  # frees the gang's resources
                raise

    return Interruptible


def root_cause(error: BaseException) -> str:
    """The last line of what went wrong deepest inside, without the traceback of Ray's layers."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = failures[min(failures)]
    text = str(getattr(error, "cause", None) or error).strip()
    return text.splitlines()[-1] if text else type(error).__name__


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
