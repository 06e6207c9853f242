"""Claims: what a ticket (or a row of an evaluation) is worth, those that are out, and what went wrong with them.

The controller hands them out; the rollout stage (stream.py) has them served.

Whose fault a failure is. A generator that dies takes all its groups with it, and nobody knows which of them it died of.
So a group that failed goes to a generator again, beside others as before: most deaths have nothing to do with what was
sampled. One that failed MAX_SHARED_FAILURES times in company is sampled with nothing beside it from then on, and only
what fails then counts against it: after MAX_ATTEMPTS of these it is given up. So no group is given up for what another
one does, and one that kills every engine does so at most MAX_SHARED_FAILURES + MAX_ATTEMPTS times.
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
MAX_SHARED_FAILURES = 2  # of generators with one ticket's group and others; then it gets one for itself
MAX_ATTEMPTS = 3  # generators that may fail with one ticket's group alone before it is emitted with an error


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a ticket is worth: always the same prompt and seeds, and the generator that should sample it now."""

    ticket: int
    prompt: Prompt
    seeds: list[int]  # one for each completion
    replacement: int = 0  # which of the ticket's prompts this is: dynamic sampling
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
    node: str = ""  # of the generator, by Ray's ids
    process: str = ""
    is_alone: bool = False  # at the generator, which gets nothing else meanwhile
    replacement: int = 0
    is_evaluation: bool = False

    @property
    def what(self) -> str:
        return f"row {self.ticket} of the evaluation" if self.is_evaluation else f"ticket {self.ticket}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A claimed ticket came back from its generator: with a group, or because the generator failed."""

    ticket: int
    generator_name: str
    failure: str | None = None
    restart: bool = False  # the generator may live, but must not be trusted: it hangs, or returns garbage
    begun: bool = True  # False where it cannot have failed because of the group


@dataclass(frozen=True, slots=True)
class Failure:
    """Of a generator, while it had a claim's group."""

    reason: str
    node: str  # of the generator; "" where it is not known
    was_alone: bool


@dataclass(slots=True)
class Ledger:
    """What is known of a stream's claims."""

    claims: dict[int, PendingClaim] = field(default_factory=dict)  # by ticket
    failures: dict[tuple[int, int], list[Failure]] = field(default_factory=dict)  # so far, by ticket and replacement

    def note_failure(self, pending: PendingClaim, reason: str) -> None:
        failure = Failure(f"{pending.where}: {reason}", pending.node, pending.is_alone)
        self.failures.setdefault((pending.ticket, pending.replacement), []).append(failure)


def goes_alone(failures: list[Failure]) -> bool:
    """Whether the group that met these may be what generators die of."""
    return len(failures) >= MAX_SHARED_FAILURES


def why_given_up(failures: list[Failure]) -> str:
    """Why no generator gets the group that met these any more; "" where one does."""
    failures = [failure for failure in failures if failure.was_alone]
    if len(failures) < MAX_ATTEMPTS or len(of_living_nodes(failures)) < MAX_ATTEMPTS:
        return ""
    return f"{len(failures)} generators failed with it alone: " + "; ".join(f.reason for f in failures)


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
