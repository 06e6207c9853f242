"""The generator: one sampling engine behind an asyncio interface; as a Ray actor, one of several.

One thread owns the engine. It admits up to `max_groups` groups at a time and advances them together, so a group is
ready as soon as its own completions are, whatever the others do.

Versions are exact: a group's `policy_version` is the version under which every one of its tokens was sampled. So
weights change only between groups: when new weights arrive, running groups are finished under the old ones, no further
group is begun, and groups that wait are begun under the new ones. This costs little: the tickets in flight at a publish
are those that the learner needs next in any case.

Version 0 is the model on disk. A version belongs to an attempt of the learner gang: after a restart from a checkpoint
the gang counts from that checkpoint's version again, and what it publishes replaces anything that an earlier attempt
published. A generator that dies is restarted by Ray (`max_restarts`), at version 0 again: whoever watches it (the
controller) loads the current version before it is given work. `generate` never serves a version below `min_version`; it
waits.

An engine that failed cannot be trusted any more: every caller gets EngineDeadError (NeverBegunError, if its group was
not in the engine), then the process exits, for Ray to restart it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import queue
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raygrpo.config import GeneratorConfig, ModelConfig, SamplingConfig
from raygrpo.direct_transfer import Offer, Receiver
from raygrpo.engines.sampling import EngineDeadError, SamplingEngine, make_engine
from raygrpo.gauges import GENERATOR_BUSY, GENERATOR_GROUPS, GENERATOR_TOKENS, GENERATOR_VERSION, PERIOD_S, Gauges
from raygrpo.logs import about_group, always, open_log
from raygrpo.lora import AdapterMerger
from raygrpo.timeline import Interval
from raygrpo.types import NeverBegunError, Prompt, Rollout, RolloutGroup, RunInfo, TransferError
from raygrpo.weights import PackedWeights, unpack

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

STACK_DEPTH = 12  # calls of each thread in a report
EXIT_DELAY_S = 3.0  # for the answers to the callers to leave the process, on a busy machine too


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsAck:
    """A generator's word that it now serves `version`."""

    generator: str
    version: int
    num_bytes: int  # 0 where it had the version already
    drain_s: float  # until the running groups were finished
    load_s: float  # to verify and load
    node: str = ""  # Ray's id of the generator's node; "" without Ray
    sampled: Sequence[Interval] = ()  # unix times in which it sampled groups of the training, since its last word


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorStatus:
    generator: str
    attempt: int
    version: int
    groups_running: int
    groups_waiting: int  # for a place in the engine, or for a version
    num_groups: int  # finished since the process started
    num_tokens: int  # sampled in finished completions since the process started
    num_cached_tokens: int  # of prompts, that completions shared instead of computing them, since the process started
    busy_s: float  # spent in the engine since the process started
    pid: int


@dataclass(slots=True, kw_only=True, eq=False)
class _Group:
    ticket: int
    prompt: Prompt
    seeds: list[int]
    sampling: SamplingConfig | None = None  # of an evaluation
    result: Future[RolloutGroup] = field(default_factory=Future)
    engine_id: str = field(default_factory=map(str, itertools.count()).__next__)
    start_s: float = 0.0  # unix time
    rollouts: dict[int, Rollout] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class _Update:
    attempt: int
    version: int
    weights: PackedWeights | Offer
    result: Future[WeightsAck] = field(default_factory=Future)
    received_s: float = field(default_factory=time.perf_counter)


@dataclass(slots=True, kw_only=True)
class _Score:
    prompt_ids: list[int]
    completion_ids: list[int]
    result: Future[list[float]] = field(default_factory=Future)


@dataclass(slots=True, kw_only=True)
class _Abort:
    group: _Group


_Message = _Group | _Update | _Score | _Abort


class Generator:
    """A plain class: `ray.remote(Generator)` makes it an actor; without Ray it needs no more than an event loop."""

    def __init__(
        self,
        name: str,
        model: ModelConfig,
        generator: GeneratorConfig,
        *,
        max_model_len: int,
        version_timeout_s: float = 900.0,
        deterministic: bool = False,
        run: RunInfo | None = None,
    ):
        """Start the engine; returns when it is ready. Raises what the engine raises.

        max_model_len: tokens of the longest prompt and completion together.
        version_timeout_s: how long `generate` waits for a version that was not published yet.
        deterministic: sample one group at a time, without anything cached from groups before it, so that its tokens
        depend on nothing else.
        run: whose log and gauges this process writes; without it there are none.
        """
        if run is not None:
            open_log(run, name)
            logger.info("starting the engine (%s)", generator.engine)
        self.name = name
        self._version_timeout_s = version_timeout_s
        self._version_changed = asyncio.Event()  # set, and replaced by a new one, at each change
        self._waiting_for_version = 0
        self._worker = EngineThread(
            name,
            1 if deterministic else generator.max_groups,
            keep_cache=not deterministic,
            to_weights=AdapterMerger(model) if model.lora else None,
        )
        num_threads = generator.num_threads or max(1, len(os.sched_getaffinity(0)) // generator.num_actors)
        self._worker.start(lambda: make_engine(model, generator, max_model_len=max_model_len, num_threads=num_threads))
        logger.info("the engine is ready")
        if run is not None:
            threading.Thread(target=self._measure, args=(Gauges(run.name, generator=name),), daemon=True).start()

    async def generate(
        self, ticket: int, prompt: Prompt, seeds: list[int], min_version: int, sampling: SamplingConfig | None = None
    ) -> RolloutGroup:
        """One completion for each seed, all sampled under one version, which is `min_version` or later.

        sampling: of an evaluation, instead of the training's; such a group is begun when no group of the training
        waits.

        Waits while the generator has an older version; raises TimeoutError when none is published in time. Raises
        ValueError for a request that the engine cannot serve as it is (too long, say); EngineDeadError when the engine
        failed with it, NeverBegunError when it failed before. A caller that is cancelled takes its group out of the
        engine.
        """
        await self._reach_version(min_version)
        group = _Group(ticket=ticket, prompt=prompt, seeds=list(seeds), sampling=sampling)
        try:
            return await self._worker.ask(group)
        except asyncio.CancelledError:
            self._worker.inbox.put(_Abort(group=group))
            raise

    async def load_weights(
        self, version: int, weights: PackedWeights | Offer | list[Any], *, attempt: int = 0
    ) -> WeightsAck:
        """Serve `version` from now on: returns when running groups are finished and the weights are loaded.

        weights: the packed weights or an offer of them, or a list with one Ray reference to either; not looked at when
        the generator has the version already. Raises ValueError for an older version, damaged weights or foreign
        tensors, TransferError for an offer whose pull does not begin: the generator then goes on as it was. A pull that
        ends in the middle ends the engine.
        """
        served = (self._worker.attempt, self._worker.version)
        if (attempt, version) == served:
            return WeightsAck(
                generator=self.name, version=version, num_bytes=0, drain_s=0.0, load_s=0.0, node=_node_id()
            )
        if (attempt, version) < served:
            raise ValueError(
                f"{self.name} serves version {served[1]} of attempt {served[0]}: "
                f"version {version} of attempt {attempt} is older"
            )
        published = await weights[0] if isinstance(weights, list) else weights
        ack = await self._worker.ask(_Update(attempt=attempt, version=version, weights=published))
        self._version_changed.set()
        self._version_changed = asyncio.Event()
        return ack

    async def completion_logprobs(self, prompt_ids: list[int], completion_ids: list[int]) -> list[float]:
        """[C]: log-probabilities under the weights now loaded, at temperature 1 and with nothing cut off, computed
        anew.
        """
        return await self._worker.ask(_Score(prompt_ids=prompt_ids, completion_ids=completion_ids))

    async def status(self) -> GeneratorStatus:
        return self._worker.status(waiting_for_version=self._waiting_for_version)

    async def seconds_in_engine(self, ticket: int, *, is_evaluation: bool) -> float:
        """For how long the engine has been sampling this group; while that waits for a place in the engine, for how
        long it has been sampling the group that it began first of those it has."""
        return self._worker.seconds_in_engine(ticket, is_evaluation=is_evaluation)

    def _measure(self, gauges: Gauges) -> None:
        while True:
            status = self._worker.status(waiting_for_version=self._waiting_for_version)
            gauges.set(GENERATOR_GROUPS, status.groups_running, state="running")
            gauges.set(GENERATOR_GROUPS, status.groups_waiting, state="waiting")
            gauges.set(GENERATOR_VERSION, status.version)
            gauges.reach(GENERATOR_TOKENS, status.num_tokens)
            gauges.reach(GENERATOR_BUSY, status.busy_s)
            time.sleep(PERIOD_S)

    async def stacks(self) -> str:
        """Where every thread of the process is, innermost call last: for the watchdog's report."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        parts = []
        for ident, frame in sys._current_frames().items():
            calls = traceback.extract_stack(frame)[-STACK_DEPTH:]
            parts.append(
                "\n".join(
                    [f"thread {names.get(ident, ident)}:", *(f"  {c.filename}:{c.lineno} {c.name}" for c in calls)]
                )
            )
        return "\n".join(parts)

    async def _reach_version(self, min_version: int) -> None:
        self._waiting_for_version += 1
        try:
            async with asyncio.timeout(self._version_timeout_s):
                while self._worker.version < min_version:
                    await self._version_changed.wait()
        except TimeoutError:
            raise TimeoutError(
                f"{self.name} has version {self._worker.version}; version {min_version} did not come within "
                f"{self._version_timeout_s:g} s"
            ) from None
        finally:
            self._waiting_for_version -= 1


class EngineThread:
    """The only thread that touches the engine; messages come in by `inbox`, answers go out by each message's future."""

    def __init__(
        self,
        name: str,
        max_groups: int,
        *,
        keep_cache: bool = True,
        to_weights: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ):
        """to_weights: makes what the engine loads out of what was published."""
        self.inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self.version = 0
        self.attempt = 0
        self._name = name
        self._max_groups = max_groups
        self._keep_cache = keep_cache
        self._to_weights = to_weights
        self._receiver: Receiver | None = None  # of adapters that are pulled
        self._running: dict[str, _Group] = {}
        self._waiting: deque[_Group] = deque()
        self._evaluating: deque[_Group] = deque()  # wait until none of the others does
        self._updates: deque[_Update] = deque()
        self._num_groups = 0
        self._num_tokens = 0
        self._busy_s = 0.0
        self._sampled: list[Interval] = []  # see WeightsAck

    def start(self, make: Callable[[], SamplingEngine]) -> None:
        """Make the engine in the thread, and return when it is ready."""
        ready: Future[None] = Future()
        threading.Thread(target=self._run, args=(make, ready), name=f"{self._name}-engine", daemon=True).start()
        ready.result()

    async def ask(self, message: _Group | _Update | _Score) -> Any:
        self.inbox.put(message)
        return await asyncio.wrap_future(message.result)

    def status(self, *, waiting_for_version: int) -> GeneratorStatus:
        return GeneratorStatus(
            generator=self._name,
            attempt=self.attempt,
            version=self.version,
            groups_running=len(self._running),
            groups_waiting=len(self._waiting) + len(self._evaluating) + waiting_for_version,
            num_groups=self._num_groups,
            num_tokens=self._num_tokens,
            num_cached_tokens=self._engine.num_cached_tokens,
            busy_s=self._busy_s,
            pid=os.getpid(),
        )

    def seconds_in_engine(self, ticket: int, *, is_evaluation: bool) -> float:
        running = list(self._running.values())
        own = [group for group in running if (group.ticket, group.sampling is not None) == (ticket, is_evaluation)]
        now_s = time.time()
        return now_s - min((group.start_s for group in own or running), default=now_s)

    def _run(self, make: Callable[[], SamplingEngine], ready: Future[None]) -> None:
        try:
            self._engine = make()
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result(None)
        try:
            while True:
                self._receive()
                if self._updates and not self._running:
                    self._load(self._updates.popleft())
                while len(self._running) < self._max_groups and not self._updates:
                    if not (waiting := self._waiting or self._evaluating):
                        break
                    self._begin(waiting.popleft())
                if self._running:
                    self._advance()
        except Exception as error:
            logger.exception("%s: the engine failed; the process exits", self._name)
            self._die(error)

    def _receive(self) -> None:
        """Take in all messages; wait for one only where there is nothing else to do."""
        idle = not (self._running or self._waiting or self._evaluating or self._updates)
        while idle or not self.inbox.empty():
            idle = False
            match self.inbox.get():
                case _Abort(group=group):
                    self._abort(group)
                case message if not message.result.set_running_or_notify_cancel():
                    pass  # its caller has gone
                case _Group() as group:
                    (self._waiting if group.sampling is None else self._evaluating).append(group)
                case _Update() as update:
                    self._updates.append(update)
                case _Score() as score:
                    self._score(score)

    def _begin(self, group: _Group) -> None:
        group.start_s = time.time()
        if not self._keep_cache:
            self._engine.reset_prefix_cache()
        try:
            self._engine.add_group(group.engine_id, group.prompt.prompt_ids, group.seeds, group.sampling)
        except ValueError as error:
            group.result.set_exception(error)
            return
        self._running[group.engine_id] = group
        with about_group(group.ticket, is_evaluation=group.sampling is not None):
            logger.debug("begun by version %d, beside %d others", self.version, len(self._running) - 1)

    def _advance(self) -> None:
        start = time.perf_counter()
        finished = self._engine.step()
        self._busy_s += time.perf_counter() - start
        for engine_id, index, rollout in finished:
            group = self._running[engine_id]
            group.rollouts[index] = rollout
            self._num_tokens += len(rollout.completion_ids)
            if len(group.rollouts) < len(group.seeds):
                continue
            del self._running[engine_id]
            self._num_groups += 1
            rollouts = [group.rollouts[i] for i in range(len(group.seeds))]
            sampled = RolloutGroup(
                ticket=group.ticket,
                prompt=group.prompt,
                policy_version=self.version,
                rollouts=rollouts,
                generator=self._name,
                generate_start_s=group.start_s,
                generate_end_s=time.time(),
                attempt=self.attempt,
            )
            if group.sampling is None:
                self._note_sampled(group.start_s, sampled.generate_end_s)
            with about_group(group.ticket, is_evaluation=group.sampling is not None):
                num_tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
                seconds = sampled.generate_end_s - group.start_s
                logger.info("sampled by version %d: %d tokens in %.3f s", self.version, num_tokens, seconds)
            group.result.set_result(sampled)
        missing = sum(len(group.seeds) - len(group.rollouts) for group in self._running.values())
        if missing > self._engine.num_unfinished:  # no later step would bring them
            raise EngineDeadError(
                f"the engine returned too few completions: {missing} are missing, and it works on "
                f"{self._engine.num_unfinished}"
            )

    def _note_sampled(self, start_s: float, end_s: float) -> None:
        if self._sampled and start_s <= self._sampled[-1][1]:
            start_s = min(start_s, self._sampled.pop()[0])
        self._sampled.append((start_s, end_s))

    def _abort(self, group: _Group) -> None:
        if self._running.pop(group.engine_id, None):
            self._engine.abort_group(group.engine_id)
        for waiting in (self._waiting, self._evaluating):
            if group in waiting:
                waiting.remove(group)

    def _load(self, update: _Update) -> None:
        start = time.perf_counter()
        try:
            if (update.attempt, update.version) <= (self.attempt, self.version):
                raise ValueError(f"{self._name} serves version {self.version} already, not {update.version}")
            if isinstance(update.weights, Offer):
                self._pull(update.weights)
            else:
                tensors = unpack(update.weights)
                self._engine.load_weights(self._to_weights(tensors) if self._to_weights else tensors)
        except (ValueError, TransferError) as error:
            logger.error("version %d of attempt %d is refused: %s", update.version, update.attempt, error)
            update.result.set_exception(error)
            return
        self.attempt, self.version = update.attempt, update.version
        always(attempt=update.attempt)
        while self._evaluating:  # of an evaluation that was given up: nobody waits for it
            error = ValueError(f"{self._name} was to evaluate another version than {update.version}")
            self._evaluating.popleft().result.set_exception(error)
        load_s = time.perf_counter() - start
        logger.info("loaded version %d in %.3f s", update.version, load_s)
        self._busy_s += load_s
        sampled, self._sampled = self._sampled, []
        update.result.set_result(
            WeightsAck(
                generator=self._name,
                version=update.version,
                num_bytes=update.weights.num_bytes,
                drain_s=start - update.received_s,
                load_s=load_s,
                node=_node_id(),
                sampled=sampled,
            )
        )

    def _pull(self, offer: Offer) -> None:
        if self._to_weights is None:
            self._engine.pull_weights(offer)
            return
        # Adapters: few bytes, all of which are needed before anything can be loaded.
        self._receiver = offer.receiver(self._receiver)
        adapters = {name: tensor.cpu() for name, tensor in self._receiver.begin(offer)}
        self._engine.load_weights(self._to_weights(adapters))

    def _score(self, score: _Score) -> None:
        try:
            score.result.set_result(self._engine.score(score.prompt_ids, score.completion_ids))
        except ValueError as error:
            score.result.set_exception(error)

    def _die(self, cause: Exception) -> None:
        """Tell all callers, those that still come too, and leave the process."""
        error = cause if isinstance(cause, EngineDeadError) else EngineDeadError(f"{type(cause).__name__}: {cause}")
        for message in (*self._running.values(), *self._updates):
            message.result.set_exception(error)
        never_begun = NeverBegunError(f"another group was in the engine when it failed: {error}")
        for group in (*self._waiting, *self._evaluating):
            group.result.set_exception(never_begun)
        threading.Timer(EXIT_DELAY_S, os._exit, args=(1,)).start()
        while True:
            message = self.inbox.get()
            if not isinstance(message, _Abort) and message.result.set_running_or_notify_cancel():
                message.result.set_exception(never_begun if isinstance(message, _Group) else error)


def _node_id() -> str:
    ray = sys.modules.get("ray")  # a process with a Ray has imported it
    return ray.get_runtime_context().get_node_id() if ray is not None and ray.is_initialized() else ""
