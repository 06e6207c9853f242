"""The generator: one sampling engine behind an asyncio interface; as a Ray actor, one of several.

One thread (engine_thread.py) owns the engine and samples many groups at a time.

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
import logging
import os
import sys
import threading
import time
import traceback
from typing import Any

from raygrpo.config import GeneratorConfig, ModelConfig, SamplingConfig
from raygrpo.direct_transfer import Offer
from raygrpo.engines.sampling import make_engine
from raygrpo.gauges import GENERATOR_BUSY, GENERATOR_GROUPS, GENERATOR_TOKENS, GENERATOR_VERSION, PERIOD_S, Gauges
from raygrpo.logs import open_log
from raygrpo.lora import AdapterMerger
from raygrpo.roles.engine_thread import AbortGroup, EngineThread, LoadWeights, SampleGroup, ScoreCompletion
from raygrpo.roles.reports import GeneratorStatus, WeightsAck
from raygrpo.types import Prompt, RolloutGroup, RunInfo
from raygrpo.weights import PackedWeights

logger = logging.getLogger(__name__)

STACK_DEPTH = 12  # calls of each thread in a report


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
        group = SampleGroup(ticket=ticket, prompt=prompt, seeds=list(seeds), sampling=sampling)
        try:
            return await self._worker.ask(group)
        except asyncio.CancelledError:
            self._worker.inbox.put(AbortGroup(group=group))
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
        self._worker.raise_if_dead()
        served = (self._worker.attempt, self._worker.version)
        if (attempt, version) == served:
            return self._worker.ack()
        if (attempt, version) < served:
            raise ValueError(
                f"{self.name} serves version {served[1]} of attempt {served[0]}: "
                f"version {version} of attempt {attempt} is older"
            )
        published = await weights[0] if isinstance(weights, list) else weights
        ack = await self._worker.ask(LoadWeights(attempt=attempt, version=version, weights=published))
        self._version_changed.set()
        self._version_changed = asyncio.Event()
        return ack

    async def completion_logprobs(self, prompt_ids: list[int], completion_ids: list[int]) -> list[float]:
        """[C]: log-probabilities under the weights now loaded, at temperature 1 and with nothing cut off, computed
        anew.
        """
        return await self._worker.ask(ScoreCompletion(prompt_ids=prompt_ids, completion_ids=completion_ids))

    async def status(self) -> GeneratorStatus:
        self._worker.raise_if_dead()
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
