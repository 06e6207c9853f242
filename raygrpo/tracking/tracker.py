"""The Tracker: the only writer of a run's MLflow record.

    training ---- log_step, log_samples, ... ----> journal (local files) ----> writer thread ----> MLflow

A call writes to the journal and returns. The writer thread connects, delivers in order, and on any failure waits and
connects again; it also draws the reward curve. A tracker that starts in the directory of an earlier one (a resume, an
actor that Ray restarted) enters the same run and delivers what that one could not.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from raygrpo.config import RunConfig
from raygrpo.logs import about, open_log
from raygrpo.tracking.figures import RewardCurve
from raygrpo.tracking.journal import Journal, Record
from raygrpo.tracking.machine import MachineMetrics
from raygrpo.tracking.models import MEAN_REWARD, TimedMetrics, checkpoint_item, policy_item, scores_item
from raygrpo.tracking.samples import choose_groups, evaluation_table, sample_table
from raygrpo.tracking.store import MlflowRun, resolve_tracking_uri, run_url, ui_command, without_password
from raygrpo.tracking.traces import group_trace
from raygrpo.tracking.writer import Writer
from raygrpo.types import RunInfo, ScoredGroup, StepMetrics

logger = logging.getLogger(__name__)

IDENTITY_FILE = "tracking.json"  # which MLflow run this directory belongs to
CONFIG_FILE = "config.yaml"
FIGURE_FILE = "reward_curve.png"
EVALUATION_PREFIX = "eval/"  # of the names of an evaluation's metrics, whose step is the policy's version

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
    """Writes one run to MLflow. Thread-safe; only the constructor raises, whatever happens to MLflow or the disk.

    run_dir: the run's own directory, the same one when the run is resumed. run_id: an MLflow run to continue; by
    default the one that run_dir belongs to, if any. tags, links (title -> address) and resume_command stand on the
    run's page. machines: what the machines of the run are doing, asked at each step; by default this one is
    looked at.
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
        run_info: RunInfo | None = None,
        machines: Callable[[], StepMetrics] | None = None,
    ) -> None:
        if run_info is not None:  # this process is the tracker's alone
            open_log(run_info, "tracker")
        self._config = config
        self._run_dir = Path(run_dir).expanduser().absolute()
        self._machines = machines or MachineMetrics()
        self._non_finite: set[str] = set()
        self._warnings = _Warnings()
        logging.getLogger(__package__).addHandler(self._warnings)
        uri = resolve_tracking_uri(config)
        identity = self._read_identity()
        if identity.get("uri") != uri or identity.get("experiment") != config.tracking.experiment:
            identity = {}  # another store: a new run there, which gets all of the journal
        run = MlflowRun(
            config=config,
            run_dir=self._run_dir,
            uri=uri,
            run_key=identity.get("run_key") or uuid.uuid4().hex,
            run_id=run_id or identity.get("run_id"),
            start_time_ms=identity.get("start_time_ms") or _now_ms(),
            tags=identity.get("tags", {}) if tags is None else tags,
            links=identity.get("links", {}) if links is None else links,
            resume_command=resume_command or identity.get("resume_command"),
        )
        self._curve = RewardCurve(config.name)
        self._writer = Writer(run, Journal(self._run_dir), self._write_identity, self._curve.add)
        self._resumed = run.run_id is not None or len(self._curve) > 0
        self._write_identity()

    # What the training calls.

    def start(self, wait_s: float = 0.0) -> Links:
        """Begin to connect in the background, and wait up to `wait_s` for it (a first connection takes about 10 s)."""
        config_text = yaml.safe_dump(self._config.model_dump(mode="json"), sort_keys=False)
        try:
            (self._run_dir / CONFIG_FILE).write_text(config_text)
        except OSError as error:
            logger.error("cannot write %s: %s", self._run_dir / CONFIG_FILE, error)
        self._writer.add_item({"kind": "text", "artifact_file": CONFIG_FILE, "text": config_text})
        logger.info("tracks to %s%s", without_password(self._writer.run.uri), ", a run that goes on" * self._resumed)
        if self._resumed:
            self._writer.add_item({"kind": "status", "status": "RUNNING", "end_time_ms": None})
        if self._config.tracking.system_metrics:
            self._machines()  # the first call starts the first step's averages
        return self.links(wait_s)

    def links(self, wait_s: float = 0.0) -> Links:
        """Where the run can be looked at; waits up to `wait_s` for the store to answer."""
        self._writer.start()
        self._writer.wait_connected(wait_s)
        run = self._writer.run
        return Links(
            tracking_uri=run.uri,
            experiment=self._config.tracking.experiment,
            run_id=run.run_id,
            run_url=run_url(run.uri, run.experiment_id, run.run_id) if run.run_id and run.experiment_id else None,
            ui_command=ui_command(run.uri),
            figure=str(self._figure_path),
            undelivered=self._writer.undelivered(),
            spool=str(self._run_dir),
        )

    def log_step(self, step: int, metrics: StepMetrics) -> None:
        """The metrics of one step, numbers by name. One that is not finite is kept in the journal, not in MLflow."""
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
            values |= self._machines()
        self._add_record(Record(int(step), _now_ms(), values))
        with about(step=int(step)):
            logger.info("recorded %d metrics", len(values))
        every = self._config.tracking.figure_every
        if every and step % every == 0 and "reward/mean" in values:
            self._writer.add_chore(self._draw)

    def _add_record(self, record: Record) -> None:
        self._writer.add_record(record)
        if scores := _evaluated(record):  # of a checkpoint, perhaps, that is a model already
            self._writer.add_item(scores_item(record.step, scores))

    def log_samples(self, step: int, groups: list[ScoredGroup], advantages: list[list[float]]) -> None:
        """Show some of the step's rollouts, if it is this step's turn (`tracking.samples_every`).

        groups: of all learners, at least those that `shown_groups` names. advantages: for each group one list with a
        value per rollout.
        """
        tracking = self._config.tracking
        if not tracking.shows_samples(step):
            return
        functions = self._config.reward.functions
        components = {function.metric_name: function.weight for function in functions}
        try:
            items = [sample_table(step, groups, advantages, list(components), tracking.num_samples, self._config.seed)]
            for why, g in choose_groups(step, groups, tracking.num_traces, self._config.seed):
                items.append(group_trace(step, why, groups[g], advantages[g], components))
        except Exception:  # whatever is wrong with a sample, training goes on
            logger.exception("the samples of step %d cannot be shown", step)
            return
        for item in items:
            if item is not None:
                self._writer.add_item(item)

    def log_evaluation(self, version: int, metrics: StepMetrics, shown: dict[str, list[ScoredGroup]]) -> None:
        """What an evaluation of the policy after `version` steps found, as points of that step: the step whose rewards
        the same policy earns on-policy. shown: by set, the groups whose completions become a table."""
        self._add_record(Record(int(version), _now_ms(), {name: float(v) for name, v in metrics.items()}))
        for name, groups in shown.items():
            own = self._config.eval.sets[name].functions if self._config.eval else None
            components = [function.metric_name for function in own or self._config.reward.functions]
            item = evaluation_table(version, name, groups, components)
            if item is not None:
                self._writer.add_item(item)

    def log_checkpoint(self, step: int, path: str, digest: str, mean_reward: float, kept: list[int]) -> None:
        """A checkpoint is whole: show it as a model, with what was evaluated of it.

        step: steps that it has trained. mean_reward: over the steps since the one before; NaN: not known. kept: the
        steps of all checkpoints on disk, this one among them.
        """
        metrics = {MEAN_REWARD: (mean_reward, _now_ms())} if math.isfinite(mean_reward) else {}
        for record in self._writer.records(step):
            metrics |= _evaluated(record) if record.step == step else {}
        self._writer.add_item(checkpoint_item(step, path, digest, metrics, kept))

    def log_table(self, file: str, columns: list[str], rows: list[list[Any]]) -> None:
        """A table (JSON values) among the run's artifacts, as `mlflow.load_table(file)` reads it."""
        self._writer.add_item({"kind": "table", "artifact_file": file, "columns": columns, "data": rows})

    def log_artifact(self, path: str, artifact_path: str | None = None) -> None:
        """Copy a local file to the run's artifacts (folder `artifact_path`); it must stay until it is delivered."""
        self._writer.add_item({"kind": "artifact", "path": str(Path(path).absolute()), "artifact_path": artifact_path})

    def history(self, first_step: int = 0) -> dict[int, StepMetrics]:
        """The metrics by step, in order, from `first_step` on; where a resume trained a step again, its last values."""
        return self._values(first_step, of_evaluations=False)

    def evaluations(self, first_version: int = 0) -> dict[int, StepMetrics]:
        """The same of `log_evaluation`, by version."""
        return self._values(first_version, of_evaluations=True)

    def _values(self, first_step: int, *, of_evaluations: bool) -> dict[int, StepMetrics]:
        values: dict[int, StepMetrics] = {}
        for record in self._writer.records(first_step):
            chosen = {n: v for n, v in record.metrics.items() if n.startswith(EVALUATION_PREFIX) == of_evaluations}
            if chosen:
                values[record.step] = values.get(record.step, {}) | chosen
        return dict(sorted(values.items()))

    def warnings(self, first: int = 0) -> list[str]:
        """What was logged as a warning or worse, from number `first` on: an actor's log does not reach every user."""
        return self._warnings.texts[first:]

    def finish(
        self, status: Status = "FINISHED", summary: dict[str, Any] | None = None, policy: str | None = None
    ) -> Links:
        """Draw the final figure, deliver everything and end the run; waits at most `tracking.finish_timeout_s`.

        `summary` (JSON values) becomes the artifact summary.json. policy: directory of the trained policy, which is
        registered where `tracking.register_model` names what as; that it cannot be is said, and no failure of the run.
        What could not be delivered stays, and the log says how to deliver it later.
        """
        if summary is not None:
            self._writer.add_item(
                {"kind": "text", "artifact_file": "summary.json", "text": json.dumps(summary, indent=2, default=str)}
            )
        logger.info("the run ends as %s", status)
        self._draw()
        self._writer.add_item({"kind": "status", "status": status, "end_time_ms": _now_ms()})
        if policy is not None and (register := self._config.tracking.register_model):
            self._writer.add_item(policy_item(self._config.num_steps, policy, register))
        timeout_s = self._config.tracking.finish_timeout_s
        if not self._writer.close(timeout_s):
            logger.warning(
                "MLflow at %s did not take everything in %g s: %d steps and files wait in %s. Nothing is lost; deliver "
                "them later with\n  python -m raygrpo.tracking %s",
                without_password(self._writer.run.uri),
                timeout_s,
                self._writer.undelivered(),
                self._run_dir,
                self._run_dir,
            )
        logging.getLogger(__package__).removeHandler(self._warnings)
        return self.links()

    def close(self, timeout_s: float) -> bool:
        """Stop without an end of the run, when everything is delivered or after `timeout_s`; True if it was."""
        try:
            return self._writer.close(timeout_s)
        finally:
            logging.getLogger(__package__).removeHandler(self._warnings)

    # Local files.

    @property
    def _figure_path(self) -> Path:
        return self._run_dir / FIGURE_FILE

    def _draw(self) -> None:
        try:
            drawn = self._curve.draw(self._figure_path)
        except Exception:  # a picture is never worth a run
            logger.exception("the reward curve cannot be drawn")
            return
        if drawn:
            self._writer.add_item({"kind": "artifact", "path": str(self._figure_path), "artifact_path": None})

    def _read_identity(self) -> dict[str, Any]:
        try:
            return json.loads((self._run_dir / IDENTITY_FILE).read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            logger.error("%s cannot be read (%s): a new MLflow run is made", self._run_dir / IDENTITY_FILE, error)
            return {}

    def _write_identity(self) -> None:
        run = self._writer.run
        identity = {
            "uri": run.uri,
            "experiment": self._config.tracking.experiment,
            "run_id": run.run_id,
            "run_key": run.run_key,
            "start_time_ms": run.start_time_ms,
            "tags": run.tags,
            "links": run.links,
            "resume_command": run.resume_command,
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
    directory = Path(run_dir).expanduser().absolute()
    try:
        config = RunConfig.model_validate(yaml.safe_load((directory / CONFIG_FILE).read_text()))
        uri = json.loads((directory / IDENTITY_FILE).read_text())["uri"]  # maybe from the environment of that time
    except FileNotFoundError as error:
        raise ValueError(f"{run_dir} is not the directory of a run: it has no {Path(error.filename).name}") from None
    tracking = config.tracking.model_copy(update={"uri": uri})
    tracker = Tracker(config.model_copy(update={"tracking": tracking}), run_dir)
    tracker.close(timeout_s)
    return tracker.links()


def read_history(run_dir: str) -> dict[int, StepMetrics]:
    """The metrics of a run by step, from its directory, without MLflow; empty where there is none."""
    history: dict[int, StepMetrics] = {}
    for record in Journal(Path(run_dir).expanduser().absolute()).records():
        history[record.step] = history.get(record.step, {}) | record.metrics
    return dict(sorted(history.items()))


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
        if not logging.getLogger("raygrpo").hasHandlers() and logging.lastResort:
            logging.lastResort.handle(record)  # to stderr, as if this handler were not there


def _evaluated(record: Record) -> TimedMetrics:
    return {
        name: (value, record.time_ms) for name, value in record.metrics.items() if name.startswith(EVALUATION_PREFIX)
    }


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
