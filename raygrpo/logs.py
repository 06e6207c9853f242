"""Logs of a run: what its processes say, as JSON lines in the run's directory.

Owns where lines go and what each of them carries; what is worth a line is said where it happens, through `logging`.
One file for each process, RUN_DIR/logs/<role>.jsonl, of bounded size. A process on a machine that does not have the
run's directory writes among Ray's own logs of that machine instead. Only loggers below "raygrpo" are written; their
warnings go to the process's stderr as well, as they would without this module.

A line has time, level, run, role, pid, logger and message, and attempt, step and group as far as they are known there.
A group is named by its ticket, so that `select(.group == 42)` over all files is the story of ticket 42. A group of an
evaluation, whose rows are numbered apart, has evaluation_row instead.
"""

from __future__ import annotations

import fcntl
import json
import logging
import logging.handlers
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from raygrpo.types import RunInfo

LOG_DIR = "logs"  # in the run's directory
MAX_BYTES, NUM_OLD_FILES = 10_000_000, 4  # of one process

_logger = logging.getLogger("raygrpo")
_open = ExitStack()  # what close_log undoes
_lasting: dict[str, Any] = {}  # what this process is at
_passing: ContextVar[Mapping[str, Any]] = ContextVar("about", default=MappingProxyType({}))  # this thread or task


def open_log(run: RunInfo, role: str) -> None:
    """From now on, write what this process logs to a file that is named for its role, instead of to one that was opened
    before. Where no file can be written, a warning says so, and the process goes on without."""
    close_log()
    _open.callback(_logger.setLevel, _logger.level)
    _logger.setLevel(run.log_level.upper())
    if logging.lastResort:  # it writes warnings to stderr where nobody else is there to handle them
        _add(logging.lastResort)
    try:
        file = logging.handlers.RotatingFileHandler(_own_file(run, role), maxBytes=MAX_BYTES, backupCount=NUM_OLD_FILES)
    except OSError as error:
        _logger.warning("%s of %s writes no log: %s", role, run.name, error)
        return
    file.setFormatter(_JsonLine(run, role))
    _open.callback(file.close)
    _add(file)


def close_log() -> None:
    _open.close()
    _lasting.clear()


def _add(handler: logging.Handler) -> None:
    _logger.addHandler(handler)
    _open.callback(_logger.removeHandler, handler)


def always(**fields: Any) -> None:
    """What this process is at from now on: attempt, step."""
    _lasting.update(fields)


@contextmanager
def about(**fields: Any) -> Iterator[None]:
    """What the lines of this thread or asyncio task are about meanwhile: group, attempt, step, ..."""
    token = _passing.set({**_passing.get(), **fields})
    try:
        yield
    finally:
        _passing.reset(token)


def about_group(ticket: int, *, is_evaluation: bool = False, **fields: Any) -> AbstractContextManager[None]:
    """As `about`. ticket: in an evaluation its row."""
    return about(**{"evaluation_row" if is_evaluation else "group": ticket}, **fields)


class _JsonLine(logging.Formatter):
    def __init__(self, run: RunInfo, role: str):
        super().__init__()
        self._run = run
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        passing = _passing.get()
        if (group := passing.get("group")) is not None:
            passing = {"step": group // self._run.groups_per_step, **passing}
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "run": self._run.name,
            "role": self._role,
            "pid": os.getpid(),
            **_lasting,
            **passing,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _own_file(run: RunInfo, role: str) -> Path:
    """The first of role.jsonl, role.1.jsonl, ... that no living process writes. So a process that was restarted goes on
    with its file, and no two rotate the same one: each holds a lock, which ends with it."""
    directory, prefix = _directory(run)
    index = 0
    while True:
        path = directory / f"{prefix}{role}{f'.{index}' if index else ''}.jsonl"
        lock = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            index += 1
        except OSError:  # a file system without locks
            os.close(lock)
            return directory / f"{prefix}{role}.{socket.gethostname()}-{os.getpid()}.jsonl"
        else:
            _open.callback(os.close, lock)
            return path


def _directory(run: RunInfo) -> tuple[Path, str]:
    """Where the files lie, and how their names begin. The driver makes the directory: where it is not seen, the run's
    directory is not shared with this machine."""
    shared = Path(run.directory, LOG_DIR)
    if shared.is_dir():
        return shared, ""
    import ray._private.worker

    node = ray._private.worker._global_node  # Ray has no public name for its logs' directory
    if node is None:
        raise FileNotFoundError(f"there is no {shared}")
    return Path(node.get_logs_dir_path()), f"{run.name}-"
