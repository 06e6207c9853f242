"""The thread that owns a generator's engine.

It admits up to `max_groups` groups at a time and advances them together, so a group is ready as soon as its own
completions are, whatever the others do. Weights change between groups only: see generator.py.
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
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raygrpo.config import SamplingConfig
from raygrpo.direct_transfer import Offer, Receiver
from raygrpo.engines.sampling import EngineDeadError, SamplingEngine
from raygrpo.logs import about_group, always
from raygrpo.roles.reports import GeneratorStatus, WeightsAck
from raygrpo.timeline import Interval
from raygrpo.types import NeverBegunError, Prompt, Rollout, RolloutGroup, TransferError
from raygrpo.weights import PackedWeights, unpack

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

EXIT_DELAY_S = 3.0  # for the answers to the callers to leave the process, on a busy machine too


@dataclass(slots=True, kw_only=True, eq=False)
class SampleGroup:
    ticket: int
    prompt: Prompt
    seeds: list[int]
    sampling: SamplingConfig | None = None  # of an evaluation
    result: Future[RolloutGroup] = field(default_factory=Future)
    engine_id: str = field(default_factory=map(str, itertools.count()).__next__)
    start_s: float = 0.0  # unix time
    rollouts: dict[int, Rollout] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class LoadWeights:
    attempt: int
    version: int
    weights: PackedWeights | Offer
    result: Future[WeightsAck] = field(default_factory=Future)
    received_s: float = field(default_factory=time.perf_counter)


@dataclass(slots=True, kw_only=True)
class ScoreCompletion:
    prompt_ids: list[int]
    completion_ids: list[int]
    result: Future[list[float]] = field(default_factory=Future)


@dataclass(slots=True, kw_only=True)
class AbortGroup:
    group: SampleGroup


Message = SampleGroup | LoadWeights | ScoreCompletion | AbortGroup


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
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.version = 0
        self.attempt = 0
        self._name = name
        self._max_groups = max_groups
        self._keep_cache = keep_cache
        self._to_weights = to_weights
        self._receiver: Receiver | None = None  # of adapters that are pulled
        self._running: dict[str, SampleGroup] = {}
        self._waiting: deque[SampleGroup] = deque()
        self._evaluating: deque[SampleGroup] = deque()  # wait until none of the others does
        self._updates: deque[LoadWeights] = deque()
        self._num_groups = 0
        self._num_tokens = 0
        self._busy_s = 0.0
        self._sampled: list[Interval] = []  # see WeightsAck
        self._death: EngineDeadError | None = None

    def start(self, make: Callable[[], SamplingEngine]) -> None:
        """Make the engine in the thread, and return when it is ready."""
        ready: Future[None] = Future()
        threading.Thread(target=self._run, args=(make, ready), name=f"{self._name}-engine", daemon=True).start()
        ready.result()

    async def ask(self, message: SampleGroup | LoadWeights | ScoreCompletion) -> Any:
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

    def raise_if_dead(self) -> None:
        """The process lives on for a moment after its engine, and must not pass for well."""
        if self._death is not None:
            raise self._death

    def ack(
        self, *, num_bytes: int = 0, drain_s: float = 0.0, load_s: float = 0.0, sampled: Sequence[Interval] = ()
    ) -> WeightsAck:
        """Of the version that is loaded."""
        node, process = _place()
        return WeightsAck(
            generator=self._name,
            version=self.version,
            num_bytes=num_bytes,
            drain_s=drain_s,
            load_s=load_s,
            node=node,
            process=process,
            sampled=sampled,
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
                case AbortGroup(group=group):
                    self._abort(group)
                case message if not message.result.set_running_or_notify_cancel():
                    pass  # its caller has gone
                case SampleGroup() as group:
                    (self._waiting if group.sampling is None else self._evaluating).append(group)
                case LoadWeights() as update:
                    self._updates.append(update)
                case ScoreCompletion() as score:
                    self._score(score)

    def _begin(self, group: SampleGroup) -> None:
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

    def _abort(self, group: SampleGroup) -> None:
        if self._running.pop(group.engine_id, None):
            self._engine.abort_group(group.engine_id)
        for waiting in (self._waiting, self._evaluating):
            if group in waiting:
                waiting.remove(group)

    def _load(self, update: LoadWeights) -> None:
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
        drain_s = start - update.received_s
        ack = self.ack(num_bytes=update.weights.num_bytes, drain_s=drain_s, load_s=load_s, sampled=sampled)
        update.result.set_result(ack)

    def _pull(self, offer: Offer) -> None:
        if self._to_weights is None:
            self._engine.pull_weights(offer)
            return
        # Adapters: few bytes, all of which are needed before anything can be loaded.
        self._receiver = offer.receiver(self._receiver)
        adapters = {name: tensor.cpu() for name, tensor in self._receiver.begin(offer)}
        self._engine.load_weights(self._to_weights(adapters))

    def _score(self, score: ScoreCompletion) -> None:
        try:
            score.result.set_result(self._engine.score(score.prompt_ids, score.completion_ids))
        except ValueError as error:
            score.result.set_exception(error)

    def _die(self, cause: Exception) -> None:
        """Tell all callers, those that still come too, and leave the process."""
        error = cause if isinstance(cause, EngineDeadError) else EngineDeadError(f"{type(cause).__name__}: {cause}")
        self._death = error
        for message in (*self._running.values(), *self._updates):
            message.result.set_exception(error)
        never_begun = NeverBegunError(f"another group was in the engine when it failed: {error}")
        for group in (*self._waiting, *self._evaluating):
            group.result.set_exception(never_begun)
        threading.Timer(EXIT_DELAY_S, os._exit, args=(1,)).start()
        while True:
            message = self.inbox.get()
            if not isinstance(message, AbortGroup) and message.result.set_running_or_notify_cancel():
                message.result.set_exception(never_begun if isinstance(message, SampleGroup) else error)


def _place() -> tuple[str, str]:
    """Node and process, see WeightsAck."""
    ray = sys.modules.get("ray")  # a process with a Ray has imported it
    if ray is None or not ray.is_initialized():
        return "", ""
    context = ray.get_runtime_context()
    return context.get_node_id(), context.get_worker_id()
