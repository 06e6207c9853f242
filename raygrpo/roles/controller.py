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

from ray.exceptions import ActorDiedError

from raygrpo.data import PromptSet, sample_seed
from raygrpo.types import Prompt

if TYPE_CHECKING:
    import ray
    from ray.actor import ActorHandle

    from raygrpo.roles.generator import WeightsAck

logger = logging.getLogger(__name__)

LOAD_DEADLINE_S = 600.0  # for one generator to load a version; later it counts as failed and is restarted
REVIVAL_PAUSE_S = 1.0  # between attempts to load a version into a generator that failed
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
    stop_reason: str | None  # why the run must not go on


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
        self._target = -1  # version of the latest publish, which may be under way: who is to be healthy must hold it
        self._weights: list[ray.ObjectRef] = []  # of self._target; a restarted generator loads them
        self._loading = {
            name: asyncio.Lock() for name in generators
        }  # one at a time: a generator refuses a version twice
        self._healthy = set(generators)
        self._dead: dict[str, str] = {}  # generators that Ray does not restart (their constructor fails) -> why
        self._outstanding: dict[str, int] = dict.fromkeys(generators, 0)
        self._failures: dict[int, list[str]] = {}  # ticket -> what went wrong so far
        self._num_generator_failures = 0
        self._stop_reason: str | None = None
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
            self._version = self._target = -1
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

        replacement k > 0: the ticket's k-th other prompt (dynamic sampling). Raises RuntimeError when no generator is
        left that could come back.
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
                lambda: stream != self._active_stream or self._all_dead or (self._admits(ticket) and self._healthy)
            )
            if stream != self._active_stream:
                return _fenced(row)
            if self._all_dead:
                raise RuntimeError(self._cause_of_death)
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
        bound = (self._version + self._max_staleness + 1) * self._groups_per_step
        return self._version >= 0 and ticket < bound  # before the first publish generators may hold anything

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
        While all generators restart, waits for the first. Raises RuntimeError when no generator can load them.
        """
        start_s = time.time()
        self._target, self._weights = version, weights
        names = sorted(self._healthy)
        results = await asyncio.gather(*(self._load(name) for name in names), return_exceptions=True)
        acks, failed = [], {}
        for name, result in zip(names, results, strict=True):
            if not isinstance(result, BaseException):
                acks.append(result)
                continue
            failed[name] = result
            self._warn(f"{name} did not load version {version}: {_last_line(result)}")
            self._quarantine(name)
        if not acks:
            await self._wait_for_a_revival(version, failed)
        async with self._changed:
            self._version = version
            self._changed.notify_all()
        return PublishReport(
            version=version,
            num_bytes=max((ack.num_bytes for ack in acks), default=0),
            seconds=time.time() - start_s,
            end_s=time.time(),
            num_generators=len(self._healthy),
            failed=list(failed),
            generator_failures=self._num_generator_failures,
        )

    async def _wait_for_a_revival(self, version: int, failed: dict[str, BaseException]) -> None:
        """Until a generator came back with the version, which _revive sees to. Raises RuntimeError when that is
        hopeless (all refuse the weights, or are dead) or takes too long."""
        reason = "; ".join(_last_line(error) for error in failed.values()) or "all are restarting"
        if failed and all(isinstance(error, ValueError) for error in failed.values()):
            raise RuntimeError(f"no generator loaded version {version}: {reason}")
        async with self._changed:
            try:
                async with asyncio.timeout(LOAD_DEADLINE_S):
                    await self._changed.wait_for(lambda: self._healthy or self._all_dead)
            except TimeoutError:
                raise RuntimeError(
                    f"no generator loaded version {version} within {LOAD_DEADLINE_S:g} s: {reason}"
                ) from None
        if self._all_dead:
            raise RuntimeError(self._cause_of_death)

    @property
    def _all_dead(self) -> bool:
        return len(self._dead) == len(self._generators)

    @property
    def _cause_of_death(self) -> str:
        return "no generator is left: " + "; ".join(f"{name}: {reason}" for name, reason in self._dead.items())

    async def _load(self, name: str) -> WeightsAck:
        """Load what is the latest version now."""
        attempt, version, weights = self._attempt, self._target, self._weights
        async with asyncio.timeout(LOAD_DEADLINE_S), self._loading[name]:
            return await self._generators[name].load_weights.remote(version, weights, attempt=attempt)

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
        """Load the latest version, again and again until that is still the latest when it is loaded."""
        while True:
            attempt, version = self._attempt, self._target
            if version < 0:  # an attempt begins
                await asyncio.sleep(0.1)
                continue
            try:
                await self._load(name)
            except ActorDiedError as error:
                self._warn(f"{name} cannot be started: {_last_line(error)}")
                self._dead[name] = _last_line(error)
                break
            except Exception as error:
                logger.warning("%s is not back yet: %s", name, _last_line(error))
                await asyncio.sleep(REVIVAL_PAUSE_S)
                continue
            if (attempt, version) == (self._attempt, self._target):
                self._healthy.add(name)  # without an await since the check: the next publish will count on it
                self._warn(f"{name} is back, with version {version}")
                break
        async with self._changed:
            self._changed.notify_all()

    async def status(self, first_warning: int = 0) -> ControllerStatus:
        warnings = self._warnings[first_warning:]
        return ControllerStatus(version=self._version, warnings=warnings, stop_reason=self._stop_reason)

    async def stop(self, reason: str) -> None:
        """End the run: learners that start from now on return at once."""
        self._stop_reason = self._stop_reason or reason

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
