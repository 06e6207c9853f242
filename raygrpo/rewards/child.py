"""The process that runs reward functions: loads them, then answers one batch of calls after the other.

It must not outlive its parent, not even with a function spinning in C that lets no other Python run. Therefore the
kernel watches: the parent holds one end of a pipe (`lifeline`), the other is set up so that its closing sends SIGKILL
to this whole process group.
"""

from __future__ import annotations

import asyncio
import faulthandler
import fcntl
import inspect
import math
import os
import signal
import socket
import traceback
from typing import Any

from raygrpo.imports import describe_exception
from raygrpo.rewards.functions import RewardFunction, load_function
from raygrpo.rewards.wire import receive, send

MAX_RATIONALE = 300  # characters that are kept: each completion of a run carries one for each function

_reported: set[str] = set()  # places where functions failed


def main(connection_fd: int, lifeline_fd: int) -> None:
    die_with_parent(lifeline_fd)
    faulthandler.enable()  # a crash in C leaves a traceback on stderr
    for fd in (connection_fd, lifeline_fd):
        os.set_inheritable(fd, False)
    connection = socket.socket(fileno=connection_fd)
    try:
        functions = _load(receive(connection), connection)
        if functions is not None:
            with asyncio.Runner() as runner:  # one loop for all calls: clients that a function keeps belong to it
                while True:
                    _answer(receive(connection), functions, connection, runner)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the parent is done with us, whatever threads a function has left behind
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def die_with_parent(lifeline_fd: int) -> None:
    """Linux only (F_SETSIG); elsewhere a child whose parent was killed ends after its current call."""
    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, -os.getpgrp())  # the group: children of the functions too
        fcntl.fcntl(lifeline_fd, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, fcntl.fcntl(lifeline_fd, fcntl.F_GETFL) | os.O_ASYNC)


def _load(specs: list[dict[str, Any]], connection: socket.socket) -> list[RewardFunction] | None:
    """Load the functions and report what they need, or why they could not be loaded."""
    try:
        functions = [load_function(spec["use"], spec["args"]) for spec in specs]
    except ValueError as error:
        send(connection, {"error": str(error)})
        return None
    loaded = [{"arguments": function.arguments, "is_async": function.is_async} for function in functions]
    send(connection, {"functions": loaded})
    return functions


def _answer(
    request: dict[str, Any], functions: list[RewardFunction], connection: socket.socket, runner: asyncio.Runner
) -> None:
    """One message for each call, as soon as its value is known; async calls run at once and finish in any order."""
    function, calls, timeout_s = functions[request["function"]], request["calls"], request["timeout_s"]
    if function.is_async:
        runner.run(_answer_async(function, calls, timeout_s, connection))
        return
    for index, arguments in enumerate(calls):
        try:
            outcome = as_reward(function.call(**arguments))
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            outcome = describe_failure(error)
        send(connection, {"call": index} | outcome)


async def _answer_async(
    function: RewardFunction, calls: list[dict[str, Any]], timeout_s: float, connection: socket.socket
) -> None:
    async def answer(index: int, arguments: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(timeout_s) as timer:
                outcome = as_reward(await function.call(**arguments))
        except (Exception, SystemExit, KeyboardInterrupt, asyncio.CancelledError) as error:
            outcome = {} if timer.expired() else describe_failure(error)
        if timer.expired():
            outcome = {"error": f"took longer than {timeout_s:g} s"}
        send(connection, {"call": index} | outcome)

    await asyncio.gather(*(answer(index, arguments) for index, arguments in enumerate(calls)))


def as_reward(value: Any) -> dict[str, Any]:
    """A finite float, with its rationale, or why it is none. Booleans, NumPy scalars and one-element tensors are
    numbers, texts are not."""
    number: Any = value
    rationale = getattr(value, "rationale", "")
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], str):
        number, rationale = value
    try:
        if isinstance(number, str | bytes):
            raise TypeError
        number = float(number)
    except (TypeError, ValueError, OverflowError):
        return {"error": f"returned {_shown(value)}, which is no number"}
    if not math.isfinite(number):
        return {"error": f"returned {number}, which is not finite"}
    return {"value": number, "rationale": str(rationale)[:MAX_RATIONALE]}


def _shown(value: Any) -> str:
    if inspect.iscoroutine(value):
        value.close()
        return "a coroutine (declare the function itself `async`)"
    return f"{repr(value)[:200]} ({type(value).__name__})"


def describe_failure(error: BaseException) -> dict[str, Any]:
    described = describe_exception(error)
    place = described.rpartition("(")[2]
    if place not in _reported:  # the whole story goes to the process's log once
        _reported.add(place)
        traceback.print_exception(error)
    return {"error": f"raised {described}"}
