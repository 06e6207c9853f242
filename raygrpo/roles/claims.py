"""Claims: what a ticket (or a row of an evaluation) is worth, those that are out, and what went wrong with them.

The controller hands them out; the rollout stage (stream.py) has them served.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from raygrpo.config import SamplingConfig
from raygrpo.types import FENCED, Prompt

if TYPE_CHECKING:
    from ray.actor import ActorHandle

AT_THE_GATE, WITHOUT_GENERATOR = "at the gate", "for a healthy generator"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a ticket is worth: always the same prompt and seeds, and the generator that should sample it now."""

    ticket: int
    prompt: Prompt
    seeds: list[int]  # one for each completion
    min_version: int
    sampling: SamplingConfig | None = None  # of an evaluation
    generator: ActorHandle | None  # None: given up, or fenced; `error` says why
    generator_name: str = ""
    timeout_s: float = 0.0  # for the generator to answer
    error: str = ""
    attempt: int = 0  # of the learners


@dataclass(slots=True, kw_only=True)
class PendingClaim:
    """A claim that was asked for and has not come back."""

    ticket: int
    where: str  # the generator's name, AT_THE_GATE or WITHOUT_GENERATOR
    since_s: float  # time.monotonic()
    node: str = ""  # of the generator
    is_evaluation: bool = False

    @property
    def what(self) -> str:
        return f"row {self.ticket} of the evaluation" if self.is_evaluation else f"ticket {self.ticket}"


@dataclass(frozen=True, slots=True)
class Failure:
    """Of a generator, while it had a claim's group."""

    reason: str
    node: str  # of the generator; "" where it is not known


@dataclass(slots=True)
class Ledger:
    """What is known of a stream's claims, by ticket."""

    claims: dict[int, PendingClaim] = field(default_factory=dict)
    failures: dict[int, list[Failure]] = field(default_factory=dict)  # so far


def by_state(claims: Iterable[PendingClaim]) -> dict[str, int]:
    """How many wait for the gate, wait for a generator, and are at one."""
    places = [claim.where for claim in claims]
    waiting = {"at_gate": places.count(AT_THE_GATE), "without_generator": places.count(WITHOUT_GENERATOR)}
    return waiting | {"at_generator": len(places) - sum(waiting.values())}


def fenced(row: int) -> Claim:
    prompt = Prompt(prompt_id=-1, prompt_ids=[], text="")
    error = f"row {row} belongs to a stream that has ended"
    return Claim(ticket=FENCED, prompt=prompt, seeds=[], min_version=0, generator=None, error=error)


def of_living_nodes(failures: list[Failure]) -> list[Failure]:
    """Those that no lost node explains."""
    living = living_nodes()
    return [failure for failure in failures if not failure.node or failure.node in living]


def living_nodes() -> set[str]:
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}
