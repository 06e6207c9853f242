"""The Tracker: the only writer of a run's MLflow record.

    training ---- log_step, log_samples ----> journal (local files) ----> writer thread ----> MLflow

A call writes to the journal and returns. The writer thread connects, delivers in order, and on any failure waits and connects again; it
also draws the reward curve. A tracker that starts in the directory of an earlier one (a resume, an actor that Ray restarted) enters
the same run and delivers what that one could not.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
import uuid
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from raygrpo.config import RunConfig
from raygrpo.tracking.figures import draw_reward_curve
from raygrpo.tracking.journal import Item, Journal, Record, Spooled
from raygrpo.tracking.samples import sample_table
from raygrpo.tracking.store import MAX_METRICS_PER_BATCH, MlflowRun, resolve_tracking_uri, run_url, ui_command
from raygrpo.types import ScoredGroup, StepMetrics

logger = logging.getLogger(__name__)

IDENTITY_FILE = "tracking.json"  # which MLflow run this directory belongs to
CONFIG_FILE = "config.yaml"
FIGURE_FILE = "reward_curve.png"
LONGEST_PAUSE_S = 30.0  # between attempts to reach a store that does not answer
REMIND_S = 300.0  # between reminders that it still does not

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """Where a run can be looked at."""

    tracking_uri: str
    experiment: str
    run_id: str | None  # None until the store has answered
    run_url: str | None
    ui_command: str | None  # opens the UI that serves run_url; None where a server does already
    figure: str  # path of the reward curve, once a step was drawn
    undelivered: int  # steps and files that the store does not have yet
    spool: str  # directory from which they can be delivered later


class Tracker:
    """Writes one run to MLflow. Thread-safe; no method but the constructor raises, whatever happens to MLflow or the disk.

    run_dir: the run's own directory, the same one when the run is resumed. run_id: an MLflow run to continue; by default the one that
    run_dir belongs to, if any. tags, links (title -> address) and resume_command stand on the run's page.
    Raises ValueError for a tracking URI that cannot work.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: str,
        run_id: str | None = None,
        *,
        tags: dict[str, str] | None = None,
        links: dict[str, str] | None = None,
        resume_command: str | None = None,
    ) -> None:
        self._config = config
        self._run_dir = Path(run_dir).expanduser().absolute()
        self._journal = Journal(self._run_dir)
        self._records: list[Record] = self._journal.load_records()
        self._num_sent = 0  # of _records, in this connection
        self._spool: deque[Spooled] = deque(self._journal.load_spool())
        self._resumed = bool(self._records or self._spool or run_id)
        self._figure_due = False
        self._non_finite: set[str] = set()
        self._connected = self._closing = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

        uri = resolve_tracking_uri(config)
        identity = self._read_identity()
        if identity.get("uri") != uri or identity.get("experiment") != config.tracking.experiment:
            identity = {}  # another store: a new run there, which gets all of the journal
        self._resumed |= "run_id" in identity
        self._run = MlflowRun(
            config=config,
            run_dir=self._run_dir,
            uri=uri,
            run_key=identity.get("run_key") or uuid.uuid4().hex,
            run_id=run_id or identity.get("run_id"),
            start_time_ms=identity.get("start_time_ms") or _now_ms(),
            tags=tags or {},
            links=links or {},
            resume_command=resume_command,
        )
        self._write_identity()

    # What the training calls.

    def start(self, wait_s: float = 0.0) -> Links:
        """Begin to connect in the background, and wait up to `wait_s` for it (a first connection takes about 10 s)."""
        config_text = yaml.safe_dump(self._config.model_dump(mode="json"), sort_keys=False)
        try:
            (self._run_dir / CONFIG_FILE).write_text(config_text)
        except OSError as error:
            logger.error("cannot write %s: %s", self._run_dir / CONFIG_FILE, error)
        self._enqueue({"kind": "text", "artifact_file": CONFIG_FILE, "text": config_text})
        if self._resumed:
            self._enqueue({"kind": "status", "status": "RUNNING", "end_time_ms": None})
        if self._config.tracking.system_metrics:
            _system_metrics()  # the first call starts the first step's averages
        return self.links(wait_s)

    def links(self, wait_s: float = 0.0) -> Links:
        """Where the run can be looked at; waits up to `wait_s` for the store to answer."""
        with self._changed:
            self._ensure_writer()
            self._changed.wait_for(lambda: self._connected, timeout=wait_s)
            run = self._run
            known = run.run_id is not None and run.experiment_id != ""
            return Links(
                tracking_uri=run.uri,
                experiment=self._config.tracking.experiment,
                run_id=run.run_id,
                run_url=run_url(run.uri, run.experiment_id, run.run_id or "") if known else None,
                ui_command=ui_command(run.uri),
                figure=str(self._figure_path),
                undelivered=self._undelivered(),
                spool=str(self._run_dir),
            )

    def log_step(self, step: int, metrics: StepMetrics) -> None:
        """The metrics of one step (numbers by name). One that is not finite is kept in the journal and left out of MLflow."""
        values: dict[str, float] = {}
        for name, value in metrics.items():
            try:
                values[name] = float(value)
            except (TypeError, ValueError):
                logger.error("the metric %s is no number and is left out: %r", name, value)
        non_finite = [name for name, value in values.items() if not math.isfinite(value)]
        if non_finite:
            values["faults/non_finite_metrics"] = float(len(non_finite))
            for name in set(non_finite) - self._non_finite:
                logger.warning(
                    "%s is %s at step %d: MLflow shows a gap where it is not finite", name, values[name], step
                )
            self._non_finite.update(non_finite)
        if self._config.tracking.system_metrics:
            values |= _system_metrics()
        record = Record(int(step), _now_ms(), values)
        with self._changed:
            self._journal.append(record)
            self._records.append(record)
            every = self._config.tracking.figure_every
            self._figure_due |= every > 0 and step % every == 0 and "reward/mean" in values
            self._ensure_writer()
            self._changed.notify_all()

    def log_samples(self, step: int, groups: list[ScoredGroup], advantages: list[list[float]]) -> None:
        """Show some of the step's rollouts, if it is this step's turn (`tracking.samples_every`).

        advantages: for each group one list with a value per rollout.
        """
        tracking = self._config.tracking
        if tracking.samples_every == 0 or step % tracking.samples_every:
            return
        try:
            components = [function.metric_name for function in self._config.reward.functions]
            table = sample_table(step, groups, advantages, components, tracking.num_samples, self._config.seed)
        except Exception:  # whatever is wrong with a sample, training goes on
            logger.exception("the samples of step %d cannot be shown", step)
            return
        if table is not None:
            self._enqueue(table)

    def log_artifact(self, path: str, artifact_path: str | None = None) -> None:
        """Copy a local file to the run's artifacts, under the folder `artifact_path`. The file must stay until it is delivered."""
        self._enqueue({"kind": "artifact", "path": str(Path(path).absolute()), "artifact_path": artifact_path})

    def history(self) -> dict[int, StepMetrics]:
        """The metrics by step, in order of steps, across resumes; where a step was trained again, its last values."""
        history: dict[int, StepMetrics] = {}
        with self._changed:
            for record in self._records:
                history[record.step] = history.get(record.step, {}) | record.metrics
        return dict(sorted(history.items()))

    def finish(self, status: Status = "FINISHED", summary: dict[str, Any] | None = None) -> Links:
        """Draw the final figure, deliver everything and end the run; waits at most `tracking.finish_timeout_s`.

        `summary` (JSON values) becomes the artifact summary.json. What could not be delivered stays, and the log says how to do it later.
        """
        if summary is not None:
            self._enqueue(
                {"kind": "text", "artifact_file": "summary.json", "text": json.dumps(summary, indent=2, default=str)}
            )
        self._draw()
        self._enqueue({"kind": "status", "status": status, "end_time_ms": _now_ms()})
        delivered = self.close(self._config.tracking.finish_timeout_s)
        if not delivered:
            logger.warning(
                "MLflow at %s did not take everything in %g s: %d steps and files wait in %s. Nothing is lost; deliver them later with\n"
                "  python -m raygrpo.tracking %s",
                self._run.uri, self._config.tracking.finish_timeout_s, self._undelivered(), self._run_dir, self._run_dir,
            )  # fmt: skip
        return self.links()

    def close(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` until everything is delivered, then stop the writer; True if it was. The run is not ended."""
        with self._changed:
            self._ensure_writer()
            self._closing = True
            self._changed.notify_all()
            delivered = self._changed.wait_for(lambda: self._connected and self._undelivered() == 0, timeout=timeout_s)
            thread, self._thread = self._thread, None
            self._changed.notify_all()
        if delivered and thread is not None:
            thread.join(timeout=5)
        return delivered

    # The writer thread.

    def _ensure_writer(self) -> None:
        if self._thread is None and not self._closing:
            self._thread = threading.Thread(target=self._write, name="mlflow-writer", daemon=True)
            self._thread.start()

    def _write(self) -> None:
        failures, last_said, lost_at = 0, 0.0, 0.0
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closing or self._figure_due or not self._connected or self._undelivered()
                )
                if self._thread is not threading.current_thread():
                    return  # closed
                draw, self._figure_due = self._figure_due, False
            if draw:
                self._draw()
            try:
                self._deliver()
            except Exception as error:
                now = time.monotonic()
                lost_at = lost_at or now
                if now - last_said > REMIND_S or failures == 0:
                    logger.warning(
                        "MLflow at %s does not work (%s: %s). Training goes on; %d steps and files wait in %s and are delivered when it does",
                        self._run.uri, type(error).__name__, _first_line(error), self._undelivered(), self._run_dir,
                    )  # fmt: skip
                    last_said = now
                self._pause(min(2.0**failures, LONGEST_PAUSE_S))
                failures += 1
                continue
            if failures:
                logger.warning(
                    "MLflow at %s works again after %.0f s: everything is delivered",
                    self._run.uri,
                    time.monotonic() - lost_at,
                )
                failures, last_said, lost_at = 0, 0.0, 0.0
            with self._changed:
                self._changed.notify_all()
                if self._closing and not self._undelivered():
                    return

    def _deliver(self) -> None:
        """Everything there is; raises where the store does not take it, and the next call connects anew."""
        try:
            if not self._connected:
                self._run.connect()
                self._adopt_points()
                self._write_identity()
                with self._changed:
                    self._num_sent = 0
                    self._connected = True
                    self._changed.notify_all()
            while True:
                with self._changed:
                    records = _first_batch(self._records, self._num_sent)
                    spooled = self._spool[0] if self._spool else None
                if records:
                    self._run.log_metrics(records)
                    with self._changed:
                        self._num_sent += len(records)
                elif spooled is not None:
                    self._deliver_spooled(spooled)
                else:
                    return
        except Exception:
            with self._changed:
                self._connected = False
            raise

    def _deliver_spooled(self, spooled: Spooled) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._run.deliver(spooled.item)
            self._journal.delivered(spooled)
        except (FileNotFoundError, ValueError, TypeError, KeyError, MlflowException) as error:
            if isinstance(error, MlflowException) and error.error_code not in (
                "INVALID_PARAMETER_VALUE",
                "BAD_REQUEST",
            ):
                raise
            logger.error(
                "MLflow will not take this %s, which is left out: %s", spooled.item["kind"], _first_line(error)
            )
            self._journal.reject(spooled)
        with self._changed:
            self._spool.popleft()

    def _adopt_points(self) -> None:
        """Where the directory's journal is gone but the run has points (a run_id was given), its history starts with those."""
        if self._records or not self._run.points:
            return
        steps: dict[int, Record] = {}
        for name, points in self._run.points.items():
            for step, (time_ms, value) in points.items():
                steps.setdefault(step, Record(step, time_ms, {})).metrics[name] = value
        with self._changed:
            self._records = [steps[step] for step in sorted(steps)] + self._records

    def _pause(self, seconds: float) -> None:
        with self._changed:
            if self._closing:  # finish waits for us, not long
                seconds = min(seconds, 1.0)
            self._changed.wait_for(lambda: self._closing, timeout=seconds)
            if self._closing and self._thread is threading.current_thread():
                self._changed.wait(timeout=min(seconds, 1.0))

    def _undelivered(self) -> int:
        return len(self._records) - (self._num_sent if self._connected else 0) + len(self._spool)

    # Local files.

    @property
    def _figure_path(self) -> Path:
        return self._run_dir / FIGURE_FILE

    def _draw(self) -> None:
        try:
            drawn = draw_reward_curve(self.history(), self._config.name, self._figure_path)
        except Exception:  # a picture is never worth a run
            logger.exception("the reward curve cannot be drawn")
            return
        if drawn:
            self._enqueue({"kind": "artifact", "path": str(self._figure_path), "artifact_path": None})

    def _enqueue(self, item: Item) -> None:
        with self._changed:
            # The first of the queue may be on its way already.
            if not any(waiting.item == item for waiting in list(self._spool)[1:]):
                self._spool.append(self._journal.spool(item))
            self._ensure_writer()
            self._changed.notify_all()

    def _read_identity(self) -> dict[str, Any]:
        try:
            return json.loads((self._run_dir / IDENTITY_FILE).read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            logger.error("%s cannot be read (%s): a new MLflow run is made", self._run_dir / IDENTITY_FILE, error)
            return {}

    def _write_identity(self) -> None:
        run = self._run
        identity = {
            "uri": run.uri,
            "experiment": self._config.tracking.experiment,
            "run_id": run.run_id,
            "run_key": run.run_key,
            "start_time_ms": run.start_time_ms,
        }
        path = self._run_dir / IDENTITY_FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(identity, indent=2) + "\n")
            os.replace(partial, path)
        except OSError as error:
            logger.error("cannot write %s: %s", path, error)


def replay(run_dir: str, timeout_s: float = 600.0) -> Links:
    """Deliver to MLflow what a run's directory still holds. Raises ValueError where the directory is no run's."""
    path = Path(run_dir).expanduser().absolute() / CONFIG_FILE
    if not path.exists():
        raise ValueError(f"{run_dir} is not the directory of a run: it has no {CONFIG_FILE}")
    tracker = Tracker(RunConfig.model_validate(yaml.safe_load(path.read_text())), run_dir)
    tracker.links(timeout_s)
    tracker.close(timeout_s)
    return tracker.links()


def _first_batch(records: list[Record], start: int) -> list[Record]:
    """As many records from `start` on as go into one call."""
    batch, num_metrics = [], 0
    for record in records[start:]:
        num_metrics += len(record.metrics)
        if batch and num_metrics > MAX_METRICS_PER_BATCH:
            break
        batch.append(record)
    return batch


def _system_metrics() -> StepMetrics:
    """Of the tracker's machine, CPU as the mean since the last call; named as MLflow's own, so that its UI shows them on their tab."""
    import psutil

    memory = psutil.virtual_memory()
    return {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
        "system/disk_usage_percentage": psutil.disk_usage(os.sep).percent,
    }


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]
