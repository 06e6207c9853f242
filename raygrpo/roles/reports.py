"""What generators tell the rollout controller, and what that tells the learners and the driver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raygrpo.timeline import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsAck:
    """A generator's word that it now serves `version`."""

    generator: str
    version: int
    num_bytes: int  # 0 where it had the version already
    drain_s: float  # until the running groups were finished
    load_s: float  # to verify and load
    node: str = ""  # Ray's ids of the generator's node and process; "" without Ray
    process: str = ""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReport:
    """How a publish went."""

    version: int
    num_bytes: int  # that each generator loaded
    seconds: float  # from the call to the last acknowledgement
    load_s: float  # of that, to verify and load in the slowest generator
    end_s: float  # unix time of the last acknowledgement
    num_generators: int  # healthy ones, which hold the version
    failed: list[str]  # generators that did not load it
    generator_failures: int  # since the publish before
    sampled: Sequence[Interval] = ()  # when generators sampled for the training, since the publish before
    evaluated: Interval | None = None  # when the evaluation before this publish ran, if there was one
    evaluations_failed: int = 0  # since the publish before


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerStatus:
    version: int  # latest that was published; -1 before the first
    warnings: list[str]  # from the one asked for on
    stop_reason: str | None  # why the run must not go on
    is_set_up: bool  # False: it waits for `set_up`, maybe once more
    num_evictions: int  # how often learners were told to leave, to be started again
    waits_for: str  # what the run waits for, for a person
    claims: dict[str, int]  # that have not come back, by what they wait for
    generators: dict[str, int]  # by state
