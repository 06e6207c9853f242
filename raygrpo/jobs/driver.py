"""What the driver of a run must know of the cluster around it: the job it runs in, and whether what it writes lasts.

A job's working directory is a copy that Ray deletes, on every node its own. Outputs must lie elsewhere, and with more
than one node where all of them look: the learners write checkpoints there, the tracker its journal, and Ray may start
either on any node. That is tried, not believed: every node is asked for a file that the driver just wrote.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raygrpo.config import RunConfig
from raygrpo.tracking import resolve_tracking_uri

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the driver of a job
COPIES = "working_dir_files"  # directory of a Ray session in which the copies of working directories lie
NODE_LIMIT_S = 600.0  # for an answer of every node: it may have to make the job's environment first
SHARED_FILE_WAIT_S = 10.0  # network file systems may show a new file late

# Keys of a job's metadata that `raygrpo submit` sets.
DASHBOARD_KEY, RESUME_KEY, PROBE_KEY = "raygrpo_dashboard", "raygrpo_resume", "raygrpo_probe"
COMMIT_KEY = "raygrpo_commit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The Ray job that this process is the driver of."""

    job_id: str
    dashboard: str | None  # as the submitter reaches it
    resume_command: str | None  # what the submitter would type to continue the run
    probe: str | None  # a file that the submitter wrote into output_dir
    commit_tags: dict[str, str]  # of the project that was packed: its copy is no repository


def current_job() -> Job | None:
    """None in a process that was not started as a job."""
    text = os.environ.get(JOB_VARIABLE)
    metadata = json.loads(text).get("metadata", {}) if text else {}
    if "job_submission_id" not in metadata:
        return None
    return Job(
        job_id=metadata["job_submission_id"],
        dashboard=metadata.get(DASHBOARD_KEY),
        resume_command=metadata.get(RESUME_KEY),
        probe=metadata.get(PROBE_KEY),
        commit_tags=json.loads(metadata.get(COMMIT_KEY, "{}")),
    )


def job_page(dashboard: str, job_id: str) -> str:
    """Address of a job's page."""
    return f"{dashboard.rstrip('/')}/#/jobs/{job_id}"


def identify(dashboard: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """(tags, links) for the run's MLflow page: the job, its commit and where Ray shows it. dashboard: host:port as Ray
    names it."""
    job = current_job()
    address = (job and job.dashboard) or (f"http://{dashboard}" if dashboard else None)
    if job is None:
        return {}, {"Ray dashboard": address} if address else {}
    links = {f"Ray job {job.job_id}": job_page(address, job.job_id)} if address else {}
    return {"ray.job_id": job.job_id} | job.commit_tags, links


def require_lasting_paths(config: RunConfig) -> None:
    """In a job: outputs must not go where Ray deletes them. Raises ValueError with what to set."""
    job = current_job()
    if job is None:
        return
    output_dir = Path(config.output_dir).expanduser()
    if not output_dir.is_absolute() or COPIES in output_dir.parts:
        raise ValueError(
            f"output_dir is {config.output_dir}: in a Ray job that is in a copy of the working directory, which Ray "
            "deletes. Set output_dir to an absolute path, on storage that all nodes share, or use `raygrpo submit`"
        )
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or ""
    database = uri.removeprefix("sqlite:///")
    if database != uri and (not os.path.isabs(os.path.expanduser(database)) or COPIES in Path(database).parts):
        raise ValueError(
            f"the tracking URI is {uri}: in a Ray job that file is in a copy of the working directory, which Ray "
            "deletes. Set tracking.uri to a server, or to sqlite:/// and an absolute path"
        )
    if job.probe is not None and not os.path.exists(job.probe):
        raise ValueError(
            f"output_dir {config.output_dir} is on the machine that submitted the job, and the driver's node does not "
            "see what that machine wrote there. Set output_dir to an absolute path, on storage that all nodes share"
        )
    if job.probe is not None:
        with contextlib.suppress(OSError):  # another user's file
            os.unlink(job.probe)


def require_shared_storage(config: RunConfig) -> None:
    """On a cluster of several nodes, to which this process is connected: every node must see the same output_dir and
    the model, and MLflow must be a server. Raises ValueError with what to set."""
    import ray

    nodes = {
        node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})" for node in ray.nodes() if node["Alive"]
    }
    if len(nodes) < 2:
        return
    uri = resolve_tracking_uri(config)
    if uri.startswith("sqlite:"):
        raise ValueError(
            f"the cluster has {len(nodes)} nodes, and the run would be tracked in {uri}: a file that one process at a "
            "time may use, on whichever node the tracker runs. Set tracking.uri (or MLFLOW_TRACKING_URI) to an MLflow "
            "server, e.g. http://HOST:5000"
        )
    root = Path(config.output_dir).expanduser().absolute()
    root.mkdir(parents=True, exist_ok=True)
    probe = root / f".probe-{uuid.uuid4().hex}"
    probe.touch()
    model = Path(config.model.path, "config.json") if os.path.isabs(config.model.path) else None
    try:
        answers = _ask_nodes(nodes, str(probe), str(model) if model else None)
    finally:
        probe.unlink(missing_ok=True)
    check_answers(config, nodes, answers)


def check_answers(config: RunConfig, nodes: dict[str, str], answers: dict[str, tuple[bool, bool]]) -> None:
    """nodes: names by id. answers: of each that lives, whether it sees the output directory and the model."""
    blind = sorted(nodes[node] for node, (sees_output, _) in answers.items() if not sees_output)
    if blind:
        raise ValueError(
            f"output_dir {config.output_dir} is not the same directory on all nodes: {', '.join(blind)} ({len(blind)} "
            f"of {len(nodes)}) do not see what the driver writes there. Set output_dir to storage that all nodes "
            "share: checkpoints and the run's record go there from several nodes"
        )
    without = sorted(nodes[node] for node, (_, sees_model) in answers.items() if not sees_model)
    if without:
        raise ValueError(
            f"model.path {config.model.path} is not there on {', '.join(without)} ({len(without)} of {len(nodes)} "
            "nodes): put the model on storage that all nodes share, or name one of the Hugging Face hub"
        )


def _ask_nodes(nodes: dict[str, str], probe: str, model: str | None) -> dict[str, tuple[bool, bool]]:
    """For each node: does it see the probe, does it see the model. One that dies meanwhile is left out."""
    import ray
    import ray.exceptions
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0)(_look)
    asked = {
        node: ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(probe, model)
        for node in nodes
    }
    deadline_s = time.monotonic() + NODE_LIMIT_S
    answers: dict[str, tuple[bool, bool]] = {}
    for node, reference in asked.items():
        try:
            answers[node] = ray.get(reference, timeout=max(1.0, deadline_s - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            raise ValueError(
                f"the node {nodes[node]} ran nothing for {NODE_LIMIT_S:g} s: see its page in the Ray dashboard"
            ) from None
        except (ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError):
            continue
    return answers


def _look(probe: str, model: str | None) -> tuple[bool, bool]:
    deadline_s = time.monotonic() + SHARED_FILE_WAIT_S
    while not os.path.exists(probe) and time.monotonic() < deadline_s:
        time.sleep(0.5)
    return os.path.exists(probe), model is None or os.path.exists(model)


def metadata_of(
    dashboard: str, resume_command: str, probe: str | None, commit_tags: dict[str, str] | None = None
) -> dict[str, Any]:
    """What `raygrpo submit` gives to the job, for `current_job` to find."""
    metadata = {DASHBOARD_KEY: dashboard, RESUME_KEY: resume_command, COMMIT_KEY: json.dumps(commit_tags or {})}
    return metadata | ({PROBE_KEY: probe} if probe else {})
