"""What a user's machine asks of a cluster: submit a run as a Ray job, follow it, look at it, stop it.

Ray's own JobSubmissionClient does the talking. Added here: the package and the paths (package.py), patience with a
cluster that is still starting, one line for what a user can put right, and a log that goes on where a lost connection
cut it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shlex
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from raygrpo.config_file import eval_source_keys, load_config
from raygrpo.jobs.driver import RESUME_KEY, job_page, metadata_of
from raygrpo.jobs.package import Project, find_project, job_overrides, pack
from raygrpo.tracking import commit_tags

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails
    from ray.job_submission import JobSubmissionClient

COMMAND_NOT_FOUND = 127  # exit status of a shell
NO_AGENT = "No available agent"  # what the head answers while its nodes are still starting
AGENT_LIMIT_S = 180.0
RETRY_S = 3.0
SILENCE_S = 120.0  # of a log, until its connection is made anew
CONNECTION_LIMIT_S = 300.0  # of a log whose connection is lost; the job goes on without us
STOP_LIMIT_S = 120.0
STOP_WAIT_S = 90  # that Ray gives a job to end when it is stopped; its own default of 3 s cuts off MLflow


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A run as it will be sent."""

    project: Project
    entrypoint: str  # shell command, run in the copy of the project
    env_vars: dict[str, str]
    resume_command: str  # what the user would type to continue the run
    probe: str | None  # file in output_dir by which the driver knows that it is the same directory

    def write_probe(self) -> None:
        if self.probe:
            Path(self.probe).parent.mkdir(parents=True, exist_ok=True)
            Path(self.probe).touch()

    def remove_probe(self) -> None:
        """Where the driver did not: it does not see it, or never ran."""
        if self.probe:
            Path(self.probe).unlink(missing_ok=True)


def plan(config_path: Path, overrides: list[str], address: str | None, *, resume: bool) -> Submission:
    """What `raygrpo submit` sends, without sending it. Raises ValueError for settings or paths that cannot work.

    A relative output_dir is meant from the current directory, as always: the job must see that directory, and a file is
    written there for it to find.
    """
    config = load_config(config_path, overrides)
    project = find_project(config_path, config.output_dir)
    here = Path.cwd().resolve()
    directory = here if here.is_relative_to(project.root) else config_path.resolve().parent
    if project.left_behind(config_path.resolve()):
        raise ValueError(f"{config_path} does not travel with the job: git ignores it, or it is in output_dir")
    command = ["raygrpo", "train", os.path.relpath(config_path.resolve(), directory), *overrides]
    command += job_overrides(config, eval_source_keys(config_path, overrides), project, directory)
    command += ["--resume"] * resume
    entrypoint = shlex.join(command)
    if directory != project.root:
        entrypoint = f"cd {shlex.quote(str(directory.relative_to(project.root)))} && {entrypoint}"
    to_address = ["--address", address] if address else []
    again = shlex.join(["raygrpo", "submit", str(config_path), *overrides, *to_address, "--resume"])
    env_vars = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    if config.tracking.uri is None and (uri := os.environ.get("MLFLOW_TRACKING_URI")):
        env_vars["MLFLOW_TRACKING_URI"] = uri
    probe = None
    if not os.path.isabs(config.output_dir):
        probe = str(Path(config.output_dir).expanduser().absolute() / f".submitted-{uuid.uuid4().hex}")
    return Submission(project=project, entrypoint=entrypoint, env_vars=env_vars, resume_command=again, probe=probe)


class RayJobs:
    """A cluster's jobs. Whatever a user can put right raises ValueError with what to do."""

    def __init__(self, address: str | None = None):
        """address: of the dashboard, http://HOST:8265; by default RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or a Ray on this
        machine."""
        from ray.job_submission import JobSubmissionClient

        for name in ("dashboard_sdk", "job.sdk"):  # they tell of uploads and closed sockets
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
        self._named = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "auto"
        self._followed: dict[str, Lines] = {}  # by job
        with self._explained(), _without_variables("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", when=address is not None):
            self._client: JobSubmissionClient = JobSubmissionClient(address)

    @property
    def address(self) -> str:
        """Of the dashboard."""
        return self._client.get_address()

    def page(self, job_id: str) -> str:
        return job_page(self.address, job_id)

    def submit(self, submission: Submission, on_wait: Callable[[str], None]) -> str:
        """Send it; returns the job's id. Waits, and says so, while the cluster has no agent that takes jobs."""
        job_id = f"raygrpo_{secrets.token_hex(6)}"
        try:
            with self._explained(), tempfile.TemporaryDirectory() as directory:
                package = Path(directory, "project.zip")
                pack(submission.project, package)
                submission.write_probe()
                return self._submit(job_id, submission, package, on_wait)
        except BaseException:
            submission.remove_probe()
            raise

    def _submit(self, job_id: str, submission: Submission, package: Path, on_wait: Callable[[str], None]) -> str:
        commit = commit_tags(submission.project.root)
        metadata = metadata_of(self.address, submission.resume_command, submission.probe, commit)
        deadline_s = time.monotonic() + AGENT_LIMIT_S
        while True:
            try:
                return self._client.submit_job(
                    entrypoint=submission.entrypoint,
                    submission_id=job_id,
                    runtime_env={"working_dir": str(package), "env_vars": submission.env_vars},
                    metadata=metadata,
                )
            except RuntimeError as error:
                if NO_AGENT not in str(error) or time.monotonic() > deadline_s:
                    raise
                on_wait("the cluster has no agent that takes jobs yet; trying again")
                time.sleep(RETRY_S)
            except KeyboardInterrupt:
                with contextlib.suppress(RuntimeError):  # most likely it has not begun
                    self._client.stop_job(job_id)
                raise

    def info(self, job_id: str) -> JobDetails:
        with self._explained():
            return self._client.get_job_info(job_id)

    def log(self, job_id: str) -> str:
        with self._explained():
            return self._client.get_job_logs(job_id)

    def follow(self, job_id: str, show: Callable[[str], None]) -> None:
        """Show the job's log, line by line, until the job has ended; from where an earlier call was interrupted. Where
        the connection is lost it is made again."""
        lines = self._followed.setdefault(job_id, Lines())
        lines.show = show
        asyncio.run(self._follow(job_id, lines))

    async def _follow(self, job_id: str, lines: Lines) -> None:
        import aiohttp

        lost_s = None
        while True:
            lines.begin_again()
            try:
                is_whole = await self._show_log(job_id, lines)
                if self.info(job_id).status.is_terminal() and is_whole:
                    return lines.end()
                lost_s = None
            except (RuntimeError, ValueError, aiohttp.ClientError, OSError):
                lost_s = lost_s or time.monotonic()
                if time.monotonic() - lost_s > CONNECTION_LIMIT_S:
                    raise ValueError(
                        f"the connection to {self._named} is lost; the job goes on, and `raygrpo logs {job_id} "
                        "--follow` shows it when the cluster answers again"
                    ) from None
            await asyncio.sleep(RETRY_S)

    async def _show_log(self, job_id: str, lines: Lines) -> bool:
        """Whether the log came to its end; otherwise nothing came for so long that the connection may be dead."""
        pieces = self._client.tail_job_logs(job_id)
        while True:
            try:
                lines.add(await asyncio.wait_for(anext(pieces), SILENCE_S))
            except StopAsyncIteration:
                return True
            except TimeoutError:
                return False

    def wait_until_ended(self, job_id: str, timeout_s: float) -> JobDetails:
        """The job as it is when it has ended, or after the timeout."""
        deadline_s = time.monotonic() + timeout_s
        while not (info := self.info(job_id)).status.is_terminal() and time.monotonic() < deadline_s:
            time.sleep(1.0)
        return info

    def stop(self, job_id: str) -> bool:
        """Ask the job to end; False if it has ended already."""
        with self._explained():
            return self._client.stop_job(job_id)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise ValueError(_explain_authentication(self._named, str(error))) from None
        except ConnectionError as error:
            raise ValueError(
                f"no Ray answers at {self._named}: {error} Give the dashboard's address with --address "
                "http://HOST:8265, or in RAY_API_SERVER_ADDRESS"
            ) from None
        except RuntimeError as error:
            raise ValueError(f"the cluster at {self._named} refused: {error}") from None


def failure(info: JobDetails) -> str | None:
    """Why a job failed, where its own log does not say it."""
    if info.status != "FAILED":
        return None
    if info.driver_exit_code == COMMAND_NOT_FOUND:
        return "the cluster's nodes have no `raygrpo` on their PATH: install it there"
    return None if info.error_type == "JOB_ENTRYPOINT_COMMAND_ERROR" else info.message


def describe(jobs: RayJobs, job_id: str) -> str:
    """Status, times, page and command of a job, and how far it is, in a few lines."""
    info = jobs.info(job_id)
    times = {"started": info.start_time, "ended": info.end_time}
    facts = {
        "job": f"{job_id}, {info.status.value}",
        **{name: datetime.fromtimestamp(ms / 1000).strftime("%Y-%m-%d %H:%M:%S") for name, ms in times.items() if ms},
        "page": jobs.page(job_id),
        "command": info.entrypoint,
        "to resume": (info.metadata or {}).get(RESUME_KEY),
        "failure": failure(info),
    }
    log = [line for line in jobs.log(job_id).splitlines() if line.strip()]
    if log:
        facts["last line"] = log[-1].strip()
    return "\n".join(f"{name:<10} {fact}" for name, fact in facts.items() if fact)


class Lines:
    """Whole lines of a text that comes in pieces, and from its beginning again after `begin_again`: each is shown
    once."""

    def __init__(self, show: Callable[[str], None] = print):
        self.show = show
        self._num_shown = 0  # characters, of whole lines
        self._position = 0  # in the text, of the next piece
        self._rest = ""  # of a line whose end has not come

    def begin_again(self) -> None:
        self._position, self._rest = 0, ""

    def add(self, piece: str) -> None:
        skipped = max(0, min(len(piece), self._num_shown - self._position))
        self._position += len(piece)
        *whole, self._rest = (self._rest + piece[skipped:]).split("\n")
        for line in whole:
            self._num_shown += len(line) + 1
            self.show(line)

    def end(self) -> None:
        if self._rest:
            self.show(self._rest)
            self._rest = ""


def _explain_authentication(address: str, message: str) -> str:
    if "invalid" in message.lower():
        return (
            f"the cluster at {address} does not accept the token given: set RAY_AUTH_TOKEN to the cluster's own, or "
            "RAY_AUTH_TOKEN_PATH to a file that holds it"
        )
    return (
        f"the cluster at {address} wants a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the cluster's token "
        "or RAY_AUTH_TOKEN_PATH to a file that holds it"
    )


@contextlib.contextmanager
def _without_variables(*names: str, when: bool) -> Iterator[None]:
    """Ray prefers its environment variables to an address that is given; we do not."""
    saved = {name: os.environ.pop(name) for name in names if name in os.environ} if when else {}
    try:
        yield
    finally:
        os.environ.update(saved)
