"""A generator without a model, as a Ray actor: what it samples depends on prompt and seeds alone; a script says what
goes wrong."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray

from raygrpo.roles.reports import WeightsAck
from raygrpo.types import Prompt, Rollout, RolloutGroup


@dataclass(frozen=True)
class Script:
    """By ticket. marks: directory of the files that say what went wrong already."""

    seconds: dict[int, float] = field(default_factory=dict)  # a straggler takes so long
    refuse: frozenset[int] = frozenset()  # the request cannot be served, by no generator
    die: frozenset[int] = frozenset()  # the process exits, once for each of these tickets
    kill: frozenset[int] = frozenset()  # the process exits, whenever it samples one of these tickets
    hang: frozenset[int] = frozenset()  # never comes back, once for each of these tickets
    at_a_time: int = 1000  # groups; further ones wait
    shorten: frozenset[int] = frozenset()  # the group lacks a completion, once for each of these tickets
    marks: str = ""
    flat_prompts: frozenset[int] = frozenset()  # prompt ids whose completions are all the same


class FakeGenerator:
    def __init__(self, name: str, script: Script):
        self._name = name
        self._script = script
        self._engine = asyncio.Semaphore(script.at_a_time)
        self._since_s: dict[int, float] = {}  # by ticket, of the groups in the engine
        self._attempt = 0
        self._version = -1  # nothing: a restarted one must be given weights before it serves

    async def load_weights(self, version: int, weights: list[Any], *, attempt: int = 0) -> WeightsAck:
        assert (await weights[0])["version"] == version
        self._attempt, self._version = attempt, version
        context = ray.get_runtime_context()
        return WeightsAck(
            generator=self._name,
            version=version,
            num_bytes=8,
            drain_s=0.0,
            load_s=0.0,
            node=context.get_node_id(),
            process=context.get_worker_id(),
        )

    async def status(self) -> Any:
        return SimpleNamespace(attempt=self._attempt, version=self._version)

    async def seconds_in_engine(self, ticket: int, *, is_evaluation: bool) -> float:
        return time.time() - self._since_s.get(ticket, min(self._since_s.values(), default=time.time()))

    async def generate(
        self, ticket: int, prompt: Prompt, seeds: list[int], min_version: int, sampling: Any = None
    ) -> RolloutGroup:
        async with self._engine:
            self._since_s[ticket] = time.time()
            try:
                return await self._generate(ticket, prompt, seeds, min_version)
            finally:
                del self._since_s[ticket]

    async def _generate(self, ticket: int, prompt: Prompt, seeds: list[int], min_version: int) -> RolloutGroup:
        script, start_s, version = self._script, time.time(), self._version
        if version < min_version or version < 0:
            raise TimeoutError(f"{self._name} has version {version}")
        if ticket in script.refuse:
            raise ValueError(f"ticket {ticket} is too long")
        if ticket in script.die and not Path(script.marks, str(ticket)).exists():
            Path(script.marks, str(ticket)).touch()
            os._exit(1)
        if ticket in script.kill:
            await asyncio.sleep(0.1)
            Path(script.marks, f"{ticket} at {time.time_ns()}").touch()
            os._exit(1)
        if ticket in script.hang and not Path(script.marks, str(ticket)).exists():
            Path(script.marks, str(ticket)).touch()
            await asyncio.Event().wait()
        if ticket in script.shorten and not Path(script.marks, str(ticket)).exists():
            Path(script.marks, str(ticket)).touch()
            seeds = seeds[:-1]
        await asyncio.sleep(script.seconds.get(ticket, 0.02))
        right = (
            [False] * len(seeds) if prompt.prompt_id in script.flat_prompts else [i % 2 == 0 for i in range(len(seeds))]
        )
        return RolloutGroup(
            ticket=ticket,
            prompt=prompt,
            policy_version=version,
            rollouts=[
                Rollout(
                    completion_ids=[seed % 1000, i],
                    behaviour_logprobs=[-0.5, -0.25],
                    finish_reason="stop",
                    text=prompt.answer if is_right else "no",
                    end_s=time.time(),
                )
                for i, (seed, is_right) in enumerate(zip(seeds, right, strict=True))
            ],
            generator=self._name,
            generate_start_s=start_s,
            generate_end_s=time.time(),
        )
