"""Which version is being evaluated, and who waits for it. Part of the rollout controller's process, in its event loop.

An evaluation begins after the publish of its version and is over before the next one: so its groups are sampled by that
version and by no other. It has a stream of its own, whose claims the controller hands out like those of a segment; the
evaluator (evaluator.py) does the work.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from raygrpo.eval_config import EvalConfig
from raygrpo.evaluation import Evaluation
from raygrpo.roles.claims import Ledger
from raygrpo.roles.generator_pool import last_line
from raygrpo.timeline import Interval


@dataclass(slots=True, eq=False)
class RunningEvaluation:
    """Of one version."""

    stream: int
    version: int
    start_s: float  # unix time
    ledger: Ledger = field(default_factory=Ledger)
    task: asyncio.Task[None] | None = None


class EvaluationTurns:
    """Not for several event loops at once. `changed` is notified when an evaluation is over."""

    def __init__(
        self,
        settings: EvalConfig | None,
        num_steps: int,
        changed: asyncio.Condition,
        warn: Callable[[str], None],
        on_end: Callable[[Ledger], None],
    ):
        """settings: None for a run without evaluations. on_end: is given the claims that have not come back."""
        self.running: RunningEvaluation | None = None
        self._num_failed = 0  # that take_failures has not told
        self.rows: Evaluation | None = None
        self.evaluator: Any = None
        self._settings = settings
        self._num_steps = num_steps
        self._changed = changed
        self._warn = warn
        self._on_end = on_end
        self._last: Interval | None = None

    def of_stream(self, stream: int) -> RunningEvaluation | None:
        """The running evaluation, if this is its stream."""
        return self.running if self.running is not None and self.running.stream == stream else None

    def begin(self, version: int, *, is_first: bool) -> None:
        """Begin to evaluate the version just published, if it is its turn. is_first: of this attempt; the one before
        may have evaluated it."""
        settings = self._settings
        if self.evaluator is None or settings is None or not settings.due(version, self._num_steps):
            return
        self.running = RunningEvaluation(stream=time.time_ns(), version=version, start_s=time.time())
        call = self._evaluate(self.running, settings.timeout_s, only_if_unknown=is_first)
        self.running.task = asyncio.get_running_loop().create_task(call)

    async def over(self) -> None:
        """Wait until no evaluation is under way."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.running is None)

    def take_interval(self) -> Interval | None:
        """When the last evaluation ran, once."""
        interval, self._last = self._last, None
        return interval

    def take_failures(self) -> int:
        """How many evaluations were given up since this was called last."""
        num, self._num_failed = self._num_failed, 0
        return num

    def end_attempt(self) -> None:
        """Nothing is evaluated any more; the caller notifies."""
        if self.running is not None and self.running.task is not None:
            self.running.task.cancel()
        self.running = self._last = None

    async def _evaluate(self, running: RunningEvaluation, timeout_s: float, *, only_if_unknown: bool) -> None:
        """Have the evaluator do it. One that fails or takes too long is given up: training goes on."""
        failure = None
        try:
            async with asyncio.timeout(timeout_s):
                await self.evaluator.evaluate.remote(running.stream, running.version, only_if_unknown)
        except TimeoutError:
            failure = f"it took longer than {timeout_s:g} s (eval.timeout_s)"
        except Exception as error:
            failure = last_line(error)
        async with self._changed:
            if self.running is not running:
                return  # its attempt is over
            if failure is not None:
                self._num_failed += 1
                self._warn(f"the evaluation of version {running.version} is given up: {failure}")
            self.running = None
            self._last = (running.start_s, time.time())
            self._on_end(running.ledger)
            self._changed.notify_all()
