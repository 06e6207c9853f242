"""The Ray that a run uses: a cluster that is there, or one of its own on this machine."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raygrpo.config import RunConfig
from raygrpo.placement import one_machine_problems
from raygrpo.prepare import required_resources

logger = logging.getLogger(__name__)

RAY_STARTS = 3


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
        if "address" in options:  # a cluster that was there may grow
            _require_gpus(demand.num_gpus, ray.cluster_resources().get("GPU", 0.0))
        yield dashboard
    finally:
        ray.shutdown()


def _require_gpus(needed: float, there: float) -> None:
    """Raise ValueError where the run's processes would wait for GPUs that never come."""
    if needed > there:
        raise ValueError(
            f"the run asks for {needed:g} GPUs (generator.num_actors x generator.num_gpus + learner.num_workers x "
            f"learner.num_gpus), and this machine has {there:g}: set RAY_ADDRESS to a cluster, or lower these"
        )


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


def metrics_addresses() -> list[str]:
    """Where each of Ray's nodes serves the figures of gauges.py."""
    import ray

    return [f"http://{n['NodeManagerAddress']}:{n['MetricsExportPort']}/metrics" for n in ray.nodes() if n["Alive"]]


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
