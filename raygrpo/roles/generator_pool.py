"""The generators of a run: which are healthy, what each has to do, how many there are.

Part of the rollout controller's process, in its event loop. A generator is healthy when it holds the latest version of
the policy; only healthy ones are given work. One that fails (it died, hung, refused weights or returned garbage) is
quarantined: it gets nothing until it holds the latest version again. One that may hang is restarted first.

The pool grows and shrinks between generator.num_actors and generator.max_actors with the number of groups in flight. A
newcomer loads the latest version before it is given work, and an actor that waits for a machine is the demand that
Ray's autoscaler sees. Which generator samples a group does not change what is trained.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray.exceptions import ActorDiedError

from raygrpo.config import GeneratorConfig

if TYPE_CHECKING:
    import ray
    from ray.actor import ActorHandle

    from raygrpo.roles.reports import WeightsAck

logger = logging.getLogger(__name__)

REVIVAL_PAUSE_S = 1.0  # between attempts to load a version into a generator that failed
STATUS_DEADLINE_S = 5.0  # for a generator to say how it is
CONFIRM_TIMEOUT_S = 30.0  # for a generator to say that it holds the version
MAX_RELAUNCHES = 3  # of a generator whose constructor fails, until it is healthy


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What a generator has acknowledged last, and where it was then."""

    attempt: int
    version: int
    node: str = ""  # Ray's ids; "" where they are not known
    process: str = ""


class GeneratorPool:
    """Not for several event loops at once. `changed` is notified when a generator becomes healthy or dies for good."""

    def __init__(
        self,
        generators: dict[str, ActorHandle],
        settings: GeneratorConfig,
        changed: asyncio.Condition,
        warn: Callable[[str], None],
        launch: Callable[..., ActorHandle] | None = None,
    ):
        """launch(name, again=False): makes a generator of this name, again where one of that name cannot be started;
        without it the pool stays as it is."""
        self.generators: dict[str, Any] = {}  # handles
        self.healthy: set[str] = set()
        self.dead: dict[str, str] = {}  # those that Ray does not restart (their constructor fails) -> why
        self.num_failures = 0
        self._num_told = 0  # of these
        self.num_unplaced = 0  # those that Ray has no machine for; the controller finds out
        self._settings = settings
        self._changed = changed
        self._warn = warn
        self._launch = launch
        self._num_launched = 0
        self._extra: list[str] = []  # launched here, oldest first: these may go again
        self._leaving: set[str] = set()
        self._outstanding: dict[str, int] = {}
        self._alone: set[str] = set()  # those that have one group, and get no other beside it
        self._peaks: deque[tuple[float, int]] = deque()  # (time, groups in flight), of the last scale_down_after_s
        self._loading: dict[str, asyncio.Lock] = {}  # a generator refuses a version twice
        self._holdings: dict[str, Holding] = {}  # of those that have loaded a version
        self._condemned: dict[str, str] = {}  # of each, the process that was told to end last: it may still answer
        self._relaunches: dict[str, int] = {}  # of each since it was last healthy
        self._attempt = 0
        self._version = -1  # of the latest publish, which may be under way: who is to be healthy must hold it
        self._weights: list[ray.ObjectRef] = []  # of that version
        self._tasks: set[asyncio.Task] = set()
        self.add(generators)

    def add(self, generators: dict[str, ActorHandle]) -> None:
        """Generators that are there from the start, and stay."""
        self.generators |= generators
        self.healthy |= set(generators)
        self._num_launched += len(generators)
        self._outstanding |= dict.fromkeys(generators, 0)
        self._loading |= {name: asyncio.Lock() for name in generators}

    @property
    def all_dead(self) -> bool:
        return len(self.dead) == len(self.generators)

    @property
    def num_loading(self) -> int:
        """Generators that have been given a version and not acknowledged it yet."""
        return sum(lock.locked() for lock in self._loading.values())

    @property
    def cause_of_death(self) -> str:
        return "no generator is left: " + "; ".join(f"{name}: {reason}" for name, reason in self.dead.items())

    def by_state(self) -> dict[str, int]:
        """How many are healthy, dead for good, and neither."""
        total, healthy, dead = len(self.generators), len(self.healthy), len(self.dead)
        return {"healthy": healthy, "not_ready": total - healthy - dead, "dead": dead}

    async def describe_all(self) -> dict[str, str]:
        """By name, what each generator says of itself, with the stacks of its threads: which answer as long as its
        event loop runs."""
        names = list(self.generators)
        return dict(zip(names, await asyncio.gather(*map(self._describe, names)), strict=True))

    async def _describe(self, name: str) -> str:
        generator = self.generators[name]
        try:
            async with asyncio.timeout(STATUS_DEADLINE_S):
                status, stacks = await asyncio.gather(generator.status.remote(), generator.stacks.remote())
        except TimeoutError:
            return f"does not answer within {STATUS_DEADLINE_S:g} s"
        except Exception as error:
            return f"cannot be asked: {last_line(error)}"
        health = "healthy" if name in self.healthy else "in quarantine"
        return (
            f"{health}, version {status.version}, {status.groups_running} groups running, {status.groups_waiting} "
            f"waiting, {status.num_groups} finished\n{stacks}"
        )

    def take_failures(self) -> int:
        """How many there were since this was called last."""
        new, self._num_told = self.num_failures - self._num_told, self.num_failures
        return new

    async def newest_attempt(self) -> int:
        """That the generators have seen: they outlive the controller, and refuse weights of an older attempt."""
        calls = [handle.status.remote() for handle in self.generators.values()]
        done = await asyncio.gather(*(asyncio.wait_for(call, 60.0) for call in calls), return_exceptions=True)
        return max((status.attempt for status in done if not isinstance(status, BaseException)), default=0)

    def begin_attempt(self, attempt: int) -> None:
        """Nothing is in flight, and no version is the latest until the next publish."""
        self._attempt, self._version = attempt, -1
        self._outstanding = dict.fromkeys(self.generators, 0)
        self._alone.clear()

    def has_room(self, alone: bool = False) -> bool:
        """Whether a group can be taken by a generator; alone: by one that has no other, and gets none meanwhile.

        One that is to be alone need not be kept room for: the gate lets only so many others pass before it is trained,
        and when these are done every generator is idle.
        """
        return any(self._fits(name, alone) for name in self.healthy)

    def take(self, alone: bool = False) -> str:
        """The healthy generator with the least to do, which now has one group more. There must be room."""
        fitting = (name for name in sorted(self.healthy) if self._fits(name, alone))
        name = min(fitting, key=self._outstanding.__getitem__)
        self._outstanding[name] += 1
        if alone:
            self._alone.add(name)
        return name

    def _fits(self, name: str, alone: bool) -> bool:
        return name not in self._alone and not (alone and self._outstanding[name])

    def give_back(self, name: str) -> bool:
        """A group that `take` gave to this generator is no longer there. Returns whether that makes room where there
        was none: the caller notifies."""
        if name not in self._outstanding:
            return False
        self._outstanding[name] -= 1
        self._alone.discard(name)
        return self._outstanding[name] == 0

    def holding(self, name: str) -> Holding:
        return self._holdings.get(name, Holding(attempt=self._attempt, version=0))

    # Weights.

    async def publish(self, version: int, weights: list[ray.ObjectRef]) -> tuple[list[WeightsAck], list[str]]:
        """Have every healthy generator load the version; returns (acknowledgements, names of those that did not).

        While all generators restart, waits for the first. Raises RuntimeError when no generator can load it.
        """
        self._version, self._weights = version, weights
        names = sorted(self.healthy)
        results = await asyncio.gather(*(self._load(name) for name in names), return_exceptions=True)
        acks, failed = [], {}
        for name, result in zip(names, results, strict=True):
            if not isinstance(result, BaseException):
                acks.append(result)
                continue
            if name not in self.generators:  # it has left meanwhile
                continue
            failed[name] = result
            self._warn(f"{name} did not load version {version}: {last_line(result)}")
            self.quarantine(name, restart=self._hangs(result))
        if not acks:
            await self._wait_for_a_revival(version, failed)
        return acks, list(failed)

    async def _wait_for_a_revival(self, version: int, failed: dict[str, BaseException]) -> None:
        """Until a generator came back with the version, which _revive sees to. Raises RuntimeError when that is
        hopeless (all refuse the weights, or are dead) or takes too long, though Ray has a machine for each."""
        reason = "; ".join(last_line(error) for error in failed.values()) or "all are restarting"
        if failed and all(isinstance(error, ValueError) for error in failed.values()):
            raise RuntimeError(f"no generator loaded version {version}: {reason}")
        async with self._changed:
            while not (self.healthy or self.all_dead):
                try:
                    async with asyncio.timeout(self._settings.load_timeout_s):
                        await self._changed.wait_for(lambda: self.healthy or self.all_dead)
                except TimeoutError:
                    if not self.num_unplaced:
                        limit = f"{self._settings.load_timeout_s:g} s"
                        raise RuntimeError(f"no generator loaded version {version} within {limit}: {reason}") from None
        if self.all_dead:
            raise RuntimeError(self.cause_of_death)

    def _hangs(self, error: BaseException) -> bool:
        """One that waits for a machine does not answer either."""
        return isinstance(error, TimeoutError) and not self.num_unplaced

    async def _load(self, name: str) -> WeightsAck:
        """Load what is the latest version now."""
        attempt, version, weights = self._attempt, self._version, self._weights
        async with asyncio.timeout(self._settings.load_timeout_s), self._loading[name]:
            ack = await self.generators[name].load_weights.remote(version, weights, attempt=attempt)
        if ack.process and ack.process == self._condemned.get(name):
            raise RuntimeError(f"{name} was told to end, and has answered once more")
        if name in self.generators:
            self._holdings[name] = Holding(attempt=attempt, version=version, node=ack.node, process=ack.process)
        return ack

    async def confirm(self, name: str) -> bool:
        """Whether this generator lives and holds the version that it has acknowledged last, or a later one, in its own
        words. Quarantines it otherwise.

        A node takes all its generators with it, and the first groups to fail say so of one of them only. One that
        finishes its groups before it loads the next version answers all the same.
        """
        if self._version < 0:
            return False
        held = self.holding(name)
        try:
            async with asyncio.timeout(CONFIRM_TIMEOUT_S):
                status = await self.generators[name].status.remote()
            if (status.attempt, status.version) < (held.attempt, held.version):
                raise RuntimeError(f"it has restarted, with version {status.version} of attempt {status.attempt}")
        except Exception as error:
            logger.warning("%s does not say that it is well: %s", name, last_line(error))
            self.quarantine(name, restart=False)
            return False
        return name in self.healthy

    # Failures.

    def quarantine(self, name: str, *, restart: bool, process: str = "") -> None:
        """No more work for this generator until it holds the latest version again. A dead actor is restarted by Ray;
        restart: this one may live, but cannot be trusted to answer. process: where the failure was, if that is known;
        one that has gone, or was told to, says nothing of the next."""
        if name not in self.generators:
            return
        newest = self.holding(name).process
        if process and (process != newest or process == self._condemned.get(name)):
            return
        if restart:
            self._condemned[name] = newest
            restart_actor(self.generators[name])
        if name not in self.healthy:
            return
        self.healthy.discard(name)
        self.num_failures += 1
        self._spawn(self._revive(name, f"{name} is back"))

    async def _revive(self, name: str, what: str) -> None:
        """Load the latest version, again and again until that is still the latest when it is loaded."""
        while self._stays(name):
            attempt, version = self._attempt, self._version
            if version < 0:  # an attempt begins
                await asyncio.sleep(0.1)
                continue
            try:
                await self._load(name)
            except Exception as error:
                if not self._stays(name):
                    return
                if isinstance(error, ActorDiedError) and not self._relaunch(name, error):
                    break
                logger.warning("%s is not back yet: %s", name, last_line(error))
                if self._hangs(error):
                    restart_actor(self.generators[name])
                await asyncio.sleep(REVIVAL_PAUSE_S)
                continue
            if not self._stays(name):
                return
            if (attempt, version) == (self._attempt, self._version):
                self._relaunches.pop(name, None)
                self.healthy.add(name)  # without an await since the check: the next publish will count on it
                self._warn(f"{what}, with version {version}")
                break
        async with self._changed:
            self._changed.notify_all()

    def _stays(self, name: str) -> bool:
        return name in self.generators and name not in self._leaving

    def _relaunch(self, name: str, error: ActorDiedError) -> bool:
        """Replace a generator that Ray does not start again, because its constructor failed; returns False where that
        is given up. It is not tried where no generator of the run has ever loaded a version: the error is then more
        likely the configuration's than the machine's."""
        num = self._relaunches[name] = self._relaunches.get(name, 0) + 1
        if self._launch is None or not self._holdings or num > MAX_RELAUNCHES:
            self._warn(f"{name} cannot be started: {last_line(error)}")
            self.dead[name] = last_line(error)
            return False
        self._warn(f"{name} could not be started: launched again ({num} of {MAX_RELAUNCHES}): {last_line(error)}")
        self.generators[name] = self._launch(name, again=True)
        return True

    # Size.

    def resize(self, now_s: float, num_waiting: int = 0) -> None:
        """Grow at once to what the groups in flight need; shrink to what they needed over the last
        generator.scale_down_after_s. num_waiting: groups that no generator has yet.
        """
        if self._launch is None or self._settings.max_actors is None or self._version < 0:
            return
        in_flight = sum(self._outstanding.values()) + num_waiting
        self._peaks.append((now_s, in_flight))
        while self._peaks[0][0] < now_s - self._settings.scale_down_after_s:
            self._peaks.popleft()
        size = len(self.generators) - len(self.dead) - len(self._leaving)
        for _ in range(size, self._size_for(in_flight)):
            self._grow()
        for _ in range(self._size_for(max(peak for _, peak in self._peaks)), size):
            self._shrink()

    def _size_for(self, num_groups: int) -> int:
        target = self._settings.target_groups or self._settings.max_groups
        most = self._settings.max_actors or self._settings.num_actors
        return min(max(math.ceil(num_groups / target), self._settings.num_actors), most)

    def _grow(self) -> None:
        assert self._launch is not None
        name = f"generator-{self._num_launched}"
        self._num_launched += 1
        self._extra.append(name)
        self._loading[name] = asyncio.Lock()
        self._outstanding[name] = 0
        self.generators[name] = self._launch(name)
        self._spawn(self._revive(name, f"{name} has joined"))

    def _shrink(self) -> None:
        """The newest goes, when what it has to do is done."""
        name = next((name for name in reversed(self._extra) if name not in self._leaving), None)
        if name is None:
            return
        self._leaving.add(name)
        self.healthy.discard(name)
        self._spawn(self._leave(name))

    async def _leave(self, name: str) -> None:
        deadline_s = time.monotonic() + self._settings.group_timeout_s
        while self._outstanding[name] > 0 and time.monotonic() < deadline_s:
            await asyncio.sleep(0.1)
        handle = self.generators.pop(name)
        for record in (self._outstanding, self._loading, self._holdings, self._condemned, self._relaunches, self.dead):
            record.pop(name, None)
        self._alone.discard(name)
        self._extra.remove(name)
        self._leaving.discard(name)
        end_actor(handle)
        self._warn(f"{name} has left: it was not needed for {self._settings.scale_down_after_s:g} s")

    def _spawn(self, coroutine) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._on_end)

    def _on_end(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a task of the pool failed", exc_info=error)
            self._warn(f"a task of the pool failed: {type(error).__name__}: {last_line(error)}")


def restart_actor(handle: ActorHandle) -> None:
    """End its process; Ray starts another (max_restarts)."""
    import ray

    ray.kill(handle, no_restart=False)


def end_actor(handle: ActorHandle) -> None:
    import ray

    ray.kill(handle)


def last_line(error: BaseException) -> str:
    """Ray puts the remote traceback into the message; the cause is its last line."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
