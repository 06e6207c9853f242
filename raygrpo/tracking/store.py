"""One MLflow run: entering it, and delivering to it what the journal holds. Every word said to MLflow is said here.

Nothing here retries: a failed call raises, the tracker waits and connects anew, and `connect` reads from the store what
it has, so that whatever happened to the failed call nothing is lost and nothing is stored twice. MLflow is imported on
the first connection (it takes seconds), in the tracker's thread.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import posixpath
import re
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raygrpo.config import RunConfig
from raygrpo.tracking.describe import dataset_facts, description, flatten, provenance_tags
from raygrpo.tracking.journal import Item, Record
from raygrpo.tracking.models import deliver_checkpoint, deliver_policy, find_checkpoint
from raygrpo.tracking.points import Points
from raygrpo.tracking.traces import deliver_trace

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

logger = logging.getLogger(__name__)

# MLflow's limits.
MAX_METRICS_PER_BATCH = 1000
MAX_PARAMS_PER_BATCH = 100
MAX_KEY = 250
MAX_PARAM_VALUE = 6000
MAX_TAG_VALUE = 8000

RUN_KEY_TAG = "raygrpo.run_key"
REPEATED_STEPS_TAG = "raygrpo.repeated_steps"
CHANGED_PARAMS_TAG = "raygrpo.changed_on_resume"
TABLES_TAG = (
    "mlflow.loggedArtifacts"  # lists the tables, so that the UI shows them as such and mlflow.load_table finds them
)


def resolve_tracking_uri(config: RunConfig) -> str:
    """Where this run is tracked: `tracking.uri`, else MLFLOW_TRACKING_URI, else a sqlite file in `output_dir`.

    Paths are made absolute. Raises ValueError for a store of plain files, which MLflow no longer writes.
    """
    return resolve_store(config.tracking.uri, config.output_dir)


def resolve_store(uri: str | None, output_dir: str) -> str:
    """The same without a whole configuration."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return f"sqlite:///{Path(output_dir).expanduser().absolute() / 'mlflow.db'}"
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).expanduser().absolute()}"
    if ("://" not in uri and not uri.startswith("databricks")) or uri.startswith("file:"):
        raise ValueError(
            f"the tracking URI {uri!r} is a directory, which MLflow no longer writes to: set tracking.uri (or "
            f"MLFLOW_TRACKING_URI) to a database such as sqlite:///{Path(output_dir) / 'mlflow.db'}, or to a "
            "server such as http://127.0.0.1:5000"
        )
    return uri


def ui_command(uri: str) -> str | None:
    """The command that opens the MLflow UI on this store; None where a server shows it already."""
    if uri.startswith(("http://", "https://", "databricks")):
        return None
    mlflow = Path(sys.executable).with_name("mlflow")
    program = "mlflow" if shutil.which("mlflow") == str(mlflow) or not mlflow.exists() else str(mlflow)
    return shlex.join([program, "ui", "--workers", "1", "--backend-store-uri", uri])


def run_url(uri: str, experiment_id: str, run_id: str) -> str:
    """The run's page; on port 5000 of this machine (as `ui_command` serves it) where the store is no server."""
    server = uri.rstrip("/") if uri.startswith(("http://", "https://")) else "http://127.0.0.1:5000"
    return f"{server}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def without_password(uri: str) -> str:
    """For logs: user:password@host becomes user:***@host."""
    return re.sub(r"(://[^/:@]*):[^@/]*@", r"\1:***@", uri)


@functools.lru_cache(maxsize=1000)
def metric_name(name: str) -> str:
    """The name as MLflow takes it: other characters become "_", and what it would read as a path is flattened."""
    name = re.sub(r"[^\w./ :-]", "_", name)
    name = posixpath.normpath(name).lstrip("/")
    return ("_" if name in ("", ".") else name.replace("..", "__"))[:MAX_KEY]


@dataclass(slots=True)
class MlflowRun:
    """A run on an MLflow store. `connect` first; after an exception from anything, `connect` again."""

    config: RunConfig
    run_dir: Path
    uri: str
    run_key: str  # ours: finds the run again where MLflow created it and its answer was lost
    run_id: str | None  # to enter; None: a new one
    start_time_ms: int
    tags: dict[str, str]
    links: dict[str, str]
    resume_command: str | None
    experiment_id: str = field(default="", init=False)
    _points: Points = field(default_factory=Points, init=False)  # what the store has
    _client: MlflowClient | None = field(default=None, init=False)
    _repeated: set[int] = field(default_factory=set, init=False)
    _told: str = field(default="", init=False)
    _described: bool = field(default=False, init=False)

    @property
    def client(self) -> MlflowClient:
        assert self._client is not None, "connect first"
        return self._client

    def connect(self) -> None:
        """Enter the run, or create it, and read what it has."""
        _quiet_mlflow()
        from mlflow import MlflowClient

        if self._client is None:
            if self.uri.startswith("sqlite:///"):
                Path(self.uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
            self._client = MlflowClient(tracking_uri=self.uri)
        self.experiment_id = self._enter_experiment()
        run = self._find_run()
        if run is None:
            run = self.client.create_run(
                self.experiment_id,
                start_time=self.start_time_ms,
                tags={RUN_KEY_TAG: self.run_key},
                run_name=self.run_dir.name,
            )
            self._described = False
        self.run_id = run.info.run_id
        self.experiment_id = run.info.experiment_id
        self._points = Points()
        for name in run.data.metrics:
            for point in self.client.get_metric_history(self._id, name):
                self._points.add(name, point.step, point.timestamp)
        if not self._described:
            self._describe(run)
            self._described = True

    def log_metrics(self, records: list[Record]) -> None:
        """Deliver the points that the store lacks, in order: one call for a step, or for many steps after an outage."""
        from mlflow.entities import Metric

        missing: list[Metric] = []
        for record in records:
            for name, value in self._finite(record):
                known_ms = self._points.time_ms(name, record.step)
                if known_ms is None:
                    self._points.add(name, record.step, record.time_ms)
                    missing.append(Metric(name, value, record.time_ms, record.step))
                elif known_ms != record.time_ms:
                    self._repeated.add(record.step)
        for start in range(0, len(missing), MAX_METRICS_PER_BATCH):
            self.client.log_batch(self._id, metrics=missing[start : start + MAX_METRICS_PER_BATCH])
        self._tell_repeated()

    def lacks(self, record: Record) -> bool:
        """Whether `log_metrics` would have something to do with it."""
        return any(self._points.time_ms(name, record.step) != record.time_ms for name, _ in self._finite(record))

    def read_history(self) -> list[Record]:
        """All points of the store, as they were logged, by step."""
        records: dict[tuple[int, int], Record] = {}
        for name in self.client.get_run(self._id).data.metrics:
            for point in self.client.get_metric_history(self._id, name):
                place = (point.step, point.timestamp)
                records.setdefault(place, Record(*place, {})).metrics[name] = point.value
        return [records[place] for place in sorted(records)]

    @staticmethod
    def _finite(record: Record) -> list[tuple[str, float]]:
        """The record's points. Values that are not finite would ruin a chart's axes; the journal has them."""
        return [(metric_name(name), value) for name, value in record.metrics.items() if math.isfinite(value)]

    def deliver(self, item: Item) -> None:
        """One spooled item. Delivering it again does no harm."""
        match item["kind"]:
            case "artifact":
                self.client.log_artifact(self._id, item["path"], item["artifact_path"])
            case "text":
                self.client.log_text(self._id, item["text"], item["artifact_file"])
            case "table":
                self._deliver_table(item["artifact_file"], item["columns"], item["data"])
            case "trace":
                deliver_trace(self.client, self.experiment_id, self._id, item)
            case "checkpoint":
                model = deliver_checkpoint(self.client, self.experiment_id, self._id, item)
                self._log_scores(model, item)
            case "scores":
                model = find_checkpoint(self.client, self.experiment_id, self._id, item)
                if model is not None:
                    self._log_scores(model, item)
            case "policy":
                deliver_policy(self.client, self.experiment_id, self._id, item)
            case "status" if item["end_time_ms"] is None:
                self.client.update_run(self._id, status=item["status"])
            case "status":
                self.client.set_terminated(self._id, status=item["status"], end_time=item["end_time_ms"])
            case kind:
                raise ValueError(f"unknown kind of spooled item: {kind!r}")

    @property
    def _id(self) -> str:
        assert self.run_id is not None, "connect first"
        return self.run_id

    def _enter_experiment(self) -> str:
        name = self.config.tracking.experiment
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            local = not self.uri.startswith(("http://", "https://", "databricks"))
            # A store without a server would otherwise put artifacts under the directory that we happen to run in.
            artifacts = (
                (Path(self.config.output_dir).expanduser().absolute() / "mlartifacts").as_uri() if local else None
            )
            # Without a kind, the traces make the UI open on its page for chat applications.
            tags = {"mlflow.experimentKind": "custom_model_development"}
            return self.client.create_experiment(name, artifact_location=artifacts, tags=tags)
        if experiment.lifecycle_stage != "active":
            raise RuntimeError(
                f"the MLflow experiment {name!r} is deleted: restore it with `mlflow experiments restore -x "
                f"{experiment.experiment_id}`, or set tracking.experiment to another name"
            )
        return experiment.experiment_id

    def _find_run(self) -> Run | None:
        from mlflow.exceptions import MlflowException

        if self.run_id is not None:
            try:
                run = self.client.get_run(self.run_id)
                if run.info.lifecycle_stage == "active":
                    return run
                reason = "it is deleted"
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
                reason = str(error)
            logger.error(
                "the MLflow run %s cannot be continued at %s (%s): a new run gets everything that %s holds",
                self.run_id, self.uri, reason, self.run_dir,
            )  # fmt: skip
            self.run_id = None
        found = self.client.search_runs([self.experiment_id], f"tags.`{RUN_KEY_TAG}` = '{self.run_key}'", max_results=1)
        return found[0] if found else None

    def _describe(self, run: Run) -> None:
        """Parameters, tags and description: what a person wants to know of the run, and how to continue it."""
        from mlflow.entities import Param, RunTag

        params = {
            key: _truncated(value, MAX_PARAM_VALUE)
            for key, value in flatten(self.config.model_dump(mode="json")).items()
        }
        changed = [f"{k}: {run.data.params[k]} -> {v}" for k, v in params.items() if run.data.params.get(k, v) != v]
        if changed:
            logger.warning(
                "settings differ from those that the MLflow run started with, which it keeps: %s", "; ".join(changed)
            )
            self.client.set_tag(self._id, CHANGED_PARAMS_TAG, _truncated("; ".join(changed), MAX_TAG_VALUE))
        new = [Param(key[:MAX_KEY], value) for key, value in params.items() if key not in run.data.params]
        for start in range(0, len(new), MAX_PARAMS_PER_BATCH):
            self.client.log_batch(self._id, params=new[start : start + MAX_PARAMS_PER_BATCH])
        self._describe_data()
        tags = provenance_tags() | self.tags
        if self.config.tracking.parent_run:
            tags["mlflow.parentRunId"] = self.config.tracking.parent_run
        tags["mlflow.note.content"] = description(self.config, self.run_dir, self.links, self.resume_command)
        tags = {key[:MAX_KEY]: _truncated(str(value), MAX_TAG_VALUE) for key, value in tags.items()}
        self.client.log_batch(self._id, tags=[RunTag(key, value) for key, value in tags.items()])

    def _describe_data(self) -> None:
        """Prompts of the training and of each evaluation set, as the run's inputs."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        sets = self.config.eval.sets if self.config.eval else {}
        used = [("training", self.config.data), *((f"eval {name}", each.data) for name, each in sets.items())]
        for use, data in used:
            try:
                facts = dataset_facts(data)
            except OSError as error:  # not ours to stop a run for
                logger.warning("the data set of %s cannot be described in MLflow: %s", use, error)
                continue
            dataset = Dataset(facts["name"], facts["digest"], facts["kind"], json.dumps({"uri": facts["source"]}))
            inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", use)])]
            self.client.log_inputs(self._id, datasets=inputs)

    def _deliver_table(self, artifact_file: str, columns: list[str], data: list[list[Any]]) -> None:
        """As MlflowClient.log_table, but that appends to a file that exists: delivered twice, rows would double."""
        self.client.log_text(self._id, json.dumps({"columns": columns, "data": data}), artifact_file)
        tables = json.loads(self.client.get_run(self._id).data.tags.get(TABLES_TAG, "[]"))
        entry = {"path": artifact_file, "type": "table"}
        if entry not in tables:
            tables.append(entry)
            while len(json.dumps(tables)) > MAX_TAG_VALUE:  # MLflow would cut the tag in the middle; the files stay
                tables.pop(0)
            self.client.set_tag(self._id, TABLES_TAG, json.dumps(tables))

    def _log_scores(self, model: LoggedModel, item: Item) -> None:
        """Points of the run are the model's as well. Those of a step trained again are not: the run keeps the first."""
        from mlflow.entities import Metric

        points, step = [], item["step"]
        for name, (value, time_ms) in item["metrics"].items():
            name = metric_name(name)
            if self._points.time_ms(name, step) in (None, time_ms) and math.isfinite(value):
                self._points.add(name, step, time_ms)
                points.append(Metric(name, value, time_ms, step, model_id=model.model_id, run_id=self._id))
        self.client.log_batch(self._id, metrics=points)

    def _tell_repeated(self) -> None:
        """Steps trained again after a resume: MLflow cannot replace a point, and two at a step are worse than one."""
        steps = ", ".join(map(str, sorted(self._repeated)))
        if steps != self._told:
            logger.warning(
                "steps trained again after a resume keep their first values in MLflow, the new ones are in %s: %s",
                self.run_dir,
                steps,
            )
            self.client.set_tag(self._id, REPEATED_STEPS_TAG, _truncated(steps, MAX_TAG_VALUE))
            self._told = steps


def _truncated(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _quiet_mlflow() -> None:
    """MLflow's own progress, prints and usage statistics stay off, and its requests give up in seconds: we retry.

    What the user's environment sets wins."""
    for name, value in (
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "20"),
    ):
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401  # sets up its loggers, which we then turn down

    for name, level in (("mlflow", logging.WARNING), ("alembic", logging.WARNING), ("urllib3", logging.ERROR)):
        logging.getLogger(name).setLevel(level)
