"""A run's processes on Ray: which actors there are, how each is started and restarted, and the gang of learners."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raygrpo.config import RunConfig
from raygrpo.jobs.driver import identify
from raygrpo.prepare import PreparedRun
from raygrpo.run_directory import CHECKPOINT_DIR, EXPORT_DIR
from raygrpo.types import RunInfo

if TYPE_CHECKING:
    import ray
    from ray.actor import ActorHandle
    from ray.train.torch import TorchTrainer

# The gate admits what a healthy generator can serve at once; one that lacks the version has restarted unnoticed.
VERSION_TIMEOUT_S = 10.0
ABORT_LIMIT_S = 10.0  # for Ray Train to end a gang that is interrupted


def launch_tracker(config: RunConfig, run: RunInfo, resume_command: str | None, dashboard: str | None) -> Any:
    import ray

    from raygrpo.roles.nodes import NodeMetrics
    from raygrpo.tracking import Tracker

    actor = ray.remote(Tracker).options(
        name=tracker_name(run),
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

    def __call__(self, name: str, again: bool = False) -> Any:
        """again: in place of one that cannot be started, whose name Ray may still keep."""
        import ray

        from raygrpo.roles.generator import Generator

        settings = self.config.generator
        actor = ray.remote(Generator).options(
            name=f"{self.run.name}-{name}" + (f"-{time.time_ns()}" if again else ""),
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
        name=controller_name(run),
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


def tracker_name(run: RunInfo) -> str:
    return f"{run.name}-tracker"


def controller_name(run: RunInfo) -> str:
    return f"{run.name}-controller"


def launch_evaluator(prepared: PreparedRun, run: RunInfo) -> Any:
    """Tracker and controller must be there."""
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
    arguments = (prepared.config, prepared.evaluation.sizes, prepared.import_paths)
    return actor.remote(*arguments, controller_name(run), tracker_name(run), run=run)


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
