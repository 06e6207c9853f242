"""The rollout controller: who may sample what, when, and under which version of the policy.

One actor, asyncio, no tensors. It owns the prompts, the gate, the set of healthy generators and the latest published
weights; rollouts never pass through it.

The gate. Ticket t belongs to step t // groups_per_step, and is admitted when

    t < (version + max_staleness + 1) * groups_per_step                                            (1)

where `version` is the latest published version; the learner that trains step s holds version s. A generator samples the
ticket under a version v_g >= the version at admission >= step(t) - max_staleness, and tickets are trained in their
order, so the staleness step(t) - v_g is at most max_staleness. 0 is on-policy by the same rule.

Streams and attempts. Each time the gang of learners starts, it is a new attempt, with streams of its own (stream.py
registers them). A claim from any stream but the one whose segment is running is fenced: it gets no prompt, and its row
goes nowhere.

Publish order: every healthy generator has acknowledged version v before the gate moves to v. The other order lets a
generator serve an admitted ticket with weights that are one version too old.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raygrpo.data import PromptSet, sample_seed
from raygrpo.types import Prompt

if TYPE_CHECKING:
    import ray
    from ray.actor import ActorHandle

    from raygrpo.roles.generator import WeightsAck

logger = logging.getLogger(__name__)

LOAD_DEADLINE_S = 600.0  # for one generator to load a version; later it counts as failed and is restarted
MAX_ATTEMPTS = 3  # generators tried for one ticket before its group is emitted with an error


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a ticket is worth: always the same prompt and seeds, and the generator that should sample it now."""

    ticket: int
    prompt: Prompt
    seeds: list[int]  # one for each completion
    min_version: int
    generator: ActorHandle | None  # None: given up, or fenced; `error` says why
    generator_name: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReport:
    """How a publish went."""

    version: int
    num_bytes: int  # that each generator loaded
    seconds: float  # from the call to the last acknowledgement
    end_s: float  # unix time of the last acknowledgement
    num_generators: int  # that acknowledged
    failed: list[str]  # generators that did not
    generator_failures: int  # since the run began


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerStatus:
    version: int  # latest that was published; -1 before the first
    warnings: list[str]  # from the one asked for on


class RolloutController:
    def __init__(
        self,
        prompts: PromptSet,
        generators: dict[str, ActorHandle],
        *,
        seed: int,
        groups_per_step: int,
        group_size: int,
        max_staleness: int,
    ):
        self._prompts = prompts
        self._generators = generators
        self._seed = seed
        self._groups_per_step = groups_per_step
        self._group_size = group_size
        self._max_staleness = max_staleness
        self._version = -1  # nothing published: the gate is shut
        self._attempt = 0
        self._streams: dict[str, int] = {}  # name of a dataset -> its newest stream
        self._num_streams = 0
        self._active_stream = -1
        self._first_ticket = 0  # of the current segment
        self._weights: list[ray.ObjectRef] = []  # of self._version; a restarted generator loads them
        self._healthy = set(generators)
        self._outstanding: dict[str, int] = dict.fromkeys(generators, 0)
        self._failures: dict[int, list[str]] = {}  # ticket -> what went wrong so far
        self._num_generator_failures = 0
        self._warnings: list[str] = []  # for the person who watches
        self._changed = asyncio.Condition()
        self._revivals: set[asyncio.Task] = set()

    async def new_stream(self, name: str) -> int:
        """Register a dataset that was built under this name; its claims carry the number that this returns."""
        self._num_streams += 1
        self._streams[name] = self._num_streams
        return self._num_streams

    async def begin_attempt(self, at_least: int) -> int:
        """The gang has started (again), and will publish before it trains: shut the gate. Returns the attempt's
        number."""
        self._attempt = max(self._attempt + 1, at_least)
        async with self._changed:
            self._version = -1
            self._active_stream = -1
            self._outstanding = dict.fromkeys(self._generators, 0)
            self._changed.notify_all()
        return self._attempt

    async def begin_segment(self, name: str, first_ticket: int) -> None:
        """Row r of the coming execution of the dataset `name` is ticket first_ticket + r."""
        async with self._changed:
            self._active_stream = self._streams[name]
            self._first_ticket = first_ticket
            self._failures.clear()
            self._changed.notify_all()

    async def claim(self, stream: int, row: int, replacement: int = 0) -> Claim:
        """The claim of a segment's row. Waits until the gate admits its ticket (1) and a generator is healthy.

        replacement k > 0: the ticket's k-th other prompt (dynamic sampling).
        """
        if stream != self._active_stream:
            return _fenced(row)
        ticket = self._first_ticket + row
        step = ticket // self._groups_per_step
        prompt = self._prompts.at(ticket, self._seed, attempt=replacement)
        seeds = [sample_seed(self._seed, ticket, i, attempt=replacement) for i in range(self._group_size)]
        min_version = max(0, step - self._max_staleness)
        failures = self._failures.get(ticket, [])
        if len(failures) >= MAX_ATTEMPTS:
            error = f"{MAX_ATTEMPTS} generators failed: " + "; ".join(failures)
            return Claim(
                ticket=ticket, prompt=prompt, seeds=seeds, min_version=min_version, generator=None, error=error
            )
        async with self._changed:
            await self._changed.wait_for(
                lambda: stream != self._active_stream or (self._admits(ticket) and self._healthy)
            )
            if stream != self._active_stream:
                return _fenced(row)
            name = min(sorted(self._healthy), key=self._outstanding.__getitem__)
            self._outstanding[name] += 1
        return Claim(
            ticket=ticket,
            prompt=prompt,
            seeds=seeds,
            min_version=min_version,
            generator=self._generators[name],
            generator_name=name,
        )

    def _admits(self, ticket: int) -> bool:
        return ticket < (self._version + self._max_staleness + 1) * self._groups_per_step

    async def release(self, stream: int, ticket: int, generator_name: str, generator_error: str | None) -> None:
        """A claimed ticket came back from its generator: with a group (no error), or because the generator failed."""
        if stream != self._active_stream:
            return
        self._outstanding[generator_name] -= 1
        if generator_error is None:
            return
        error = generator_error
        self._warn(f"ticket {ticket} failed on {generator_name}, and goes to another generator: {error}")
        self._failures.setdefault(ticket, []).append(f"{generator_name}: {error}")
        self._quarantine(generator_name)

    async def publish(self, version: int, weights: list[ray.ObjectRef]) -> PublishReport:
        """Give every healthy generator the packed weights, then open the gate for `version`.

        weights: one reference in a list, so that Ray passes the reference and each node pulls the bytes once.
        Raises RuntimeError when no generator could load them.
        """
        start_s = time.time()
        self._weights = weights
        names = sorted(self._healthy)
        results = await asyncio.gather(*(self._load(name, version) for name in names), return_exceptions=True)
        failed = [name for name, result in zip(names, results, strict=True) if isinstance(result, BaseException)]
        for name, result in zip(names, results, strict=True):
            if isinstance(result, BaseException):
                self._warn(f"{name} did not load version {version}: {_last_line(result)}")
        if len(failed) == len(names):
            reason = _last_line(results[0]) if results else "none is healthy"
            raise RuntimeError(f"no generator loaded version {version}: {reason}")
        async with self._changed:
            self._version = version
            self._changed.notify_all()
        for name in failed:
            self._quarantine(name)
        acks = [result for result in results if not isinstance(result, BaseException)]
        return PublishReport(
            version=version,
            num_bytes=acks[0].num_bytes,
            seconds=time.time() - start_s,
            end_s=time.time(),
            num_generators=len(acks),
            failed=failed,
            generator_failures=self._num_generator_failures,
        )

    async def _load(self, name: str, version: int) -> WeightsAck:
        reply = self._generators[name].load_weights.remote(version, self._weights, attempt=self._attempt)
        return await asyncio.wait_for(reply, LOAD_DEADLINE_S)

    def _quarantine(self, name: str) -> None:
        """No more claims for this generator until it has loaded the current version again (Ray restarts a dead
        actor)."""
        if name not in self._healthy:
            return
        self._healthy.discard(name)
        self._num_generator_failures += 1
        task = asyncio.get_running_loop().create_task(self._revive(name))
        self._revivals.add(task)
        task.add_done_callback(self._revivals.discard)

    async def _revive(self, name: str) -> None:
        while True:
            attempt, version = self._attempt, self._version
            if version < 0:  # an attempt begins: its first publish is for healthy generators, we load it after
                await asyncio.sleep(0.1)
                continue
            try:
                await self._load(name, version)
            except Exception as error:
                logger.warning("%s is not back yet: %s", name, _last_line(error))
                await asyncio.sleep(1.0)
                continue
            if (attempt, version) == (self._attempt, self._version):  # else: a publish came between; load that one too
                break
        async with self._changed:
            self._healthy.add(name)
            self._changed.notify_all()
        self._warn(f"{name} is back, with version {self._version}")

    async def status(self, first_warning: int = 0) -> ControllerStatus:
        return ControllerStatus(version=self._version, warnings=self._warnings[first_warning:])

    async def warn(self, text: str) -> None:
        """Tell the person who watches the run."""
        self._warn(text)

    def _warn(self, text: str) -> None:
        logger.warning(text)
        self._warnings.append(text)


def _fenced(row: int) -> Claim:
    prompt = Prompt(prompt_id=-1, prompt_ids=[], text="")
    error = f"row {row} belongs to a stream that has ended"
    return Claim(ticket=-1, prompt=prompt, seeds=[], min_version=0, generator=None, error=error)


def _last_line(error: BaseException) -> str:
    """Ray puts the remote traceback into the message; the cause is its last line."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
