"""The parent's side of the process that runs reward functions.

User code may sleep for ever, spin in C, exit or crash. None of that can be stopped from inside its own process
(signal.alarm needs the main thread and a bytecode to run), so the functions live in a child that is killed at a
deadline, with all processes it started, and started anew for the calls that are left. That bounds what they cost; it is
no sandbox: they run with the user's rights.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from raygrpo.rewards.wire import receive, send

if TYPE_CHECKING:
    from raygrpo.task_config import RewardFunctionConfig

logger = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 600.0  # importing the functions' modules, making their classes
GRACE_S = 1.0  # an async function gets from its own event loop before the process is killed

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from raygrpo.rewards.child import main; "
    "main(int(sys.argv[2]), int(sys.argv[3]))"
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one call: a value and what it was given for, or an error that names the function and the cause."""

    value: float
    error: str = ""
    rationale: str = ""


@dataclass(frozen=True, slots=True)
class _Loss:
    """How a child was lost during a call."""

    reason: str
    timed_out: bool  # it was killed at the deadline


class RewardProcess:
    """Runs reward functions in a child process. Not for several threads at once."""

    def __init__(self, functions: Sequence[RewardFunctionConfig], import_paths: Sequence[str] = ()):
        """Starts the child and loads the functions in it. Raises ValueError when that fails."""
        self._functions = list(functions)
        self._path = list(dict.fromkeys([*import_paths, *sys.path]))
        self._start()

    def call(self, function: int, calls: Sequence[dict[str, Any]]) -> list[Outcome]:
        """Call one function several times, each with a deadline of its own.

        calls: values for all of functions.ARGUMENTS. A call that fails, hangs or kills the process does not change the
        outcome of the others. Async functions run all calls at once; if the process is lost meanwhile, no one knows
        whose fault it was, and the unanswered calls are repeated one by one. A call during which the process ended is
        repeated once: something else may have killed it.
        """
        outcomes: dict[int, Outcome] = {}
        repeated: dict[int, str] = {}  # call -> how the process ended during it
        pending = list(range(len(calls)))
        one_by_one = False
        while pending:
            batch = pending[:1] if one_by_one else pending
            try:
                if _state(self._child) != "running":
                    self._end()
                    self._start()
            except ValueError as error:
                outcomes |= {index: Outcome(math.nan, repeated.get(index, str(error))) for index in pending}
                break
            loss = self._run(function, {index: calls[index] for index in batch}, outcomes)
            if loss is not None:
                logger.warning("%s; its process is started again", loss.reason)
                culprit = next(index for index in batch if index not in outcomes)
                if self._loaded[function]["is_async"] and len(batch) > 1:
                    one_by_one = True
                elif loss.timed_out or culprit in repeated:
                    outcomes[culprit] = Outcome(math.nan, loss.reason)
                else:
                    repeated[culprit] = loss.reason
            pending = [index for index in pending if index not in outcomes]
        return [outcomes[index] for index in range(len(calls))]

    def close(self) -> None:
        """End the child. Calling it again does nothing; a later `call` would start a new child."""
        self._end()

    def _start(self) -> None:
        """Start a child, in place of the one before, and have it load the functions."""
        ours, theirs = socket.socketpair()
        lifeline_read, lifeline_write = os.pipe()
        arguments = [json.dumps(self._path), str(theirs.fileno()), str(lifeline_read)]
        try:
            child = subprocess.Popen(
                [sys.executable, "-c", _BOOT, *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), lifeline_read],
                start_new_session=True,
            )
        finally:
            theirs.close()
            os.close(lifeline_read)
        self._child, self._connection = child, ours
        self._end = weakref.finalize(self, _end, child, ours, lifeline_write, os.getpid())
        try:
            send(ours, [{"use": function.use, "args": function.args} for function in self._functions])
            answer = receive(ours, timeout_s=LOAD_TIMEOUT_S)
        except TimeoutError:
            self._end()
            raise ValueError(f"loading the reward functions took longer than {LOAD_TIMEOUT_S:g} s") from None
        except (EOFError, OSError):
            raise ValueError(f"loading the reward functions {self._how_it_ended()}") from None
        if "error" in answer:
            self._end()
            raise ValueError(f"reward.functions: {answer['error']}")
        self._loaded = answer["functions"]

    def _run(self, function: int, calls: dict[int, dict[str, Any]], outcomes: dict[int, Outcome]) -> _Loss | None:
        """Have the child make these calls and add their outcomes. Returns how the child was lost meanwhile, if so."""
        settings, loaded = self._functions[function], self._loaded[function]
        name = f"reward function {settings.metric_name!r}"
        indices = list(calls)
        timeout_s = settings.timeout_s + (GRACE_S if loaded["is_async"] else 0.0)
        request = {
            "function": function,
            "calls": [{argument: call[argument] for argument in loaded["arguments"]} for call in calls.values()],
            "timeout_s": settings.timeout_s,
        }
        try:
            send(self._connection, request, timeout_s=timeout_s)
            for _ in indices:
                answer = receive(self._connection, timeout_s=timeout_s)
                error = f"{name} {answer['error']}" if "error" in answer else ""
                value, rationale = answer.get("value", math.nan), answer.get("rationale", "")
                outcomes[indices[answer["call"]]] = Outcome(value, error, rationale)
        except TimeoutError:
            self._end()
            return _Loss(f"{name} took longer than {settings.timeout_s:g} s", timed_out=True)
        except (EOFError, OSError):
            return _Loss(f"{name} {self._how_it_ended()}", timed_out=False)
        except BaseException:  # interrupted: the answers still to come would be taken for those of the next call
            self._end()
            raise
        return None

    def _how_it_ended(self) -> str:
        """Clean up after a child that is gone, and say what happened to it."""
        self._end()
        code = self._child.returncode
        how = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
        return f"ended its process ({how})"


def _state(child: subprocess.Popen) -> Literal["running", "dead", "reaped"]:
    """Looks without reaping: as long as the child has not been waited for, nobody else can get its number."""
    try:
        exited = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return "reaped"
    return "running" if exited is None else "dead"


def _end(child: subprocess.Popen, connection: socket.socket, lifeline: int, owner: int) -> None:
    """Kill the child with all processes of its group, and release what belongs to it."""
    if os.getpid() != owner:  # a fork of the parent, at its exit
        return
    if _state(child) != "reaped":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    connection.close()
    os.close(lifeline)
