"""A run's directory, output_dir/<name>-<time>: which one it is, the driver's log in it, what a finished run leaves."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from raygrpo.checkpoint import CheckpointStore
from raygrpo.config import RunConfig
from raygrpo.logs import LOG_DIR, close_log, open_log
from raygrpo.types import RunInfo

if TYPE_CHECKING:
    from raygrpo.tracking import Links
    from raygrpo.types import StepMetrics

logger = logging.getLogger(__name__)

CHECKPOINT_DIR = "checkpoints"
EXPORT_DIR = "model"  # the trained policy as a Hugging Face model


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a finished run leaves."""

    run_dir: str
    export_dir: str  # the trained policy as a Hugging Face model
    history: dict[int, StepMetrics]  # by step
    evaluations: dict[int, StepMetrics]  # by version of the policy
    best_checkpoint: str | None
    links: Links  # where MLflow shows it


def new_run_directory(config: RunConfig) -> Path:
    """output_dir/<name>-<time>, new. `output_dir/<name>-latest` points to it. Raises ValueError where that cannot be
    written."""
    root = Path(config.output_dir).expanduser().absolute()
    try:
        return _make_run_directory(root, config)
    except OSError as error:
        raise ValueError(f"output_dir ({root}) cannot be written: {error.strerror}: {error.filename}") from error


def _make_run_directory(root: Path, config: RunConfig) -> Path:
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


def exported_policy(run_dir: Path, status: str) -> str | None:
    """Where a run that ended with this status left the trained policy; None where it did not get so far."""
    return str(run_dir / EXPORT_DIR) if status == "FINISHED" else None


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
