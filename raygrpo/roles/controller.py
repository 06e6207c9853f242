"""The rollout controller: who may sample what, when, and under which version of the policy.

One actor, asyncio, no tensors. It owns the prompts, the gate, the pool of generators (generator_pool.py) and the
watchdog; rollouts never pass through it.

The gate. Ticket t belongs to step t // groups_per_step, and is admitted when

    t < (version + max_staleness + 1) * groups_per_step                                            (1)

where `version` is the latest published version; the learner that trains step s holds version s. A generator samples the
ticket under a version v_g >= the version at admission >= step(t) - max_staleness, and tickets are trained in their
order, so the staleness step(t) - v_g is at most max_staleness. 0 is on-policy by the same rule.

Streams and attempts. Each time the gang of learners starts, it is a new attempt, with streams of its own (stream.py
registers them). A claim from any stream but the one whose segment is running is fenced: it gets no prompt, and its row
goes nowhere.

Evaluations (evaluation_turns.py). After a publish whose version is due, its evaluation's rows are claimed from a stream
of their own, beside the segment's and behind no gate. The next publish waits until that is done or given up.

Publish order: every healthy generator has acknowledged version v before the gate moves to v. The other order lets a
generator serve an admitted ticket with weights that are one version too old.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from raygrpo.config import GeneratorConfig, WatchdogConfig
from raygrpo.data import PromptSet, sample_seed
from raygrpo.eval_config import EvalConfig
from raygrpo.evaluation import Evaluation
from raygrpo.gauges import CLAIMS, GATE, GENERATOR_FAILURES, GENERATORS, PERIOD_S, VERSION, Gauges
from raygrpo.logs import about_group, always, open_log
from raygrpo.roles.background import keep_running
from raygrpo.roles.claims import (
    AT_THE_GATE,
    WITHOUT_GENERATOR,
    Claim,
    Ledger,
    PendingClaim,
    Release,
    by_state,
    fenced,
    goes_alone,
    why_given_up,
)
from raygrpo.roles.demand import Unplaced, look_again_and_again
from raygrpo.roles.evaluation_turns import EvaluationTurns
from raygrpo.roles.generator_pool import GeneratorPool
from raygrpo.roles.reports import ControllerStatus, PublishReport
from raygrpo.roles.watchdog import Watchdog, stall_report, write_report
from raygrpo.types import GroupRequest, RunInfo

if TYPE_CHECKING:
    import ray
    from ray.actor import ActorHandle

logger = logging.getLogger(__name__)

RESIZE_PERIOD_S = 1.0


class RolloutController:
    def __init__(
        self,
        prompts: PromptSet | None = None,
        generators: dict[str, ActorHandle] | None = None,
        *,
        seed: int,
        groups_per_step: int,
        group_size: int,
        max_staleness: int,
        settings: GeneratorConfig | None = None,
        eval_settings: EvalConfig | None = None,
        num_steps: int = sys.maxsize,
        watchdog: WatchdogConfig | None = None,
        launch: Callable[..., ActorHandle] | None = None,
        find_unplaced: Callable[[], Unplaced] | None = None,
        run: RunInfo | None = None,
    ):
        """prompts, generators: None where `set_up` brings them. launch: makes further generators, as the
        pool needs them. find_unplaced: asks Ray what of the run waits for a machine. run: whose log, gauges and
        watchdog's reports this writes; without it there are none."""
        if run is not None:
            open_log(run, "controller")
        self._prompts = prompts
        self._is_set_up = asyncio.Event()
        if generators is not None:
            self._is_set_up.set()
        self._seed = seed
        self._groups_per_step = groups_per_step
        self._group_size = group_size
        self._max_staleness = max_staleness
        self._settings = settings or GeneratorConfig()
        self._find_unplaced = find_unplaced
        self._report_dir = run.directory if run else None
        self._gauges = Gauges(run.name) if run else None
        self._version = -1  # nothing published: the gate is shut
        self._attempt = 0
        self._streams: dict[str, int] = {}  # name of a dataset -> its newest stream
        self._active_stream = -1
        self._first_ticket = 0  # of the current segment
        self._num_tickets = 0
        self._ledger = Ledger()  # of the current segment
        self._stop_reason: str | None = None
        self._num_evictions = 0
        self._warnings: list[str] = []  # for the person who watches
        self._changed = asyncio.Condition()
        self._pool = GeneratorPool(generators or {}, self._settings, self._changed, self._warn, launch)
        self._evaluations = EvaluationTurns(
            eval_settings, num_steps, self._changed, self._warn, self._on_evaluation_end
        )
        self._watchdog = Watchdog(watchdog or WatchdogConfig())
        self._background: list[asyncio.Task] = []

    async def set_up(
        self,
        prompts: PromptSet,
        generators: dict[str, ActorHandle],
        evaluation: Evaluation | None = None,
        evaluator: ActorHandle | None = None,
    ) -> None:
        """What tickets and an evaluation's rows stand for, who samples, and who evaluates. Not arguments of the
        constructor, which Ray repeats after this actor died: it does not promise to keep large arguments and handles
        until then. The driver calls this again."""
        if not self._is_set_up.is_set():
            self._prompts = prompts
            self._evaluations.rows, self._evaluations.evaluator = evaluation, evaluator
            self._pool.add(generators)
            self._is_set_up.set()
        self._start_background()

    async def new_stream(self, name: str) -> int:
        """Register a dataset that was built under this name; its claims carry the number that this returns."""
        self._streams[name] = time.time_ns()  # unlike any other, also after a restart of this actor
        self._start_background()
        return self._streams[name]

    async def begin_attempt(self, at_least: int) -> int:
        """The gang has started (again), and will publish before it trains: shut the gate. Returns the attempt's
        number, higher than any before."""
        self._start_background()
        await self._is_set_up.wait()
        if _was_restarted():
            at_least = max(at_least, await self._pool.newest_attempt() + 1)
        is_again = self._attempt > 0
        self._attempt = max(self._attempt + 1, at_least)
        async with self._changed:
            self._evaluations.end_attempt()
            self._version = -1
            self._active_stream = -1
            self._ledger = Ledger()
            self._pool.begin_attempt(self._attempt)
            self._changed.notify_all()
        self._watchdog.progress()
        always(attempt=self._attempt)
        logger.info("attempt %d of the learners begins", self._attempt)
        if is_again:
            self._warn(f"the learners have started again, attempt {self._attempt}: their logs say why")
        return self._attempt

    async def begin_segment(self, name: str, first_ticket: int, num_tickets: int | None = None) -> None:
        """Row r of the coming execution of the dataset `name` is ticket first_ticket + r. From row num_tickets on, if
        that is given, rows are fenced: the dataset has more than the segment."""
        async with self._changed:
            self._active_stream = self._streams[name]
            self._first_ticket = first_ticket
            self._num_tickets = sys.maxsize if num_tickets is None else num_tickets
            self._ledger = Ledger()
            self._changed.notify_all()
        self._watchdog.progress()
        logger.info("a segment begins with ticket %d, of %s rows", first_ticket, num_tickets or "all its")

    async def claim_block(self, stream: int, rows: list[int], replacement: int = 0) -> list[Claim]:
        """The claims of rows that travel together: one call instead of many.

        A group that may be what generators die of (claims.py) is alone with one, if it is also alone in this call: of
        several the first would be sampled only when the last has a generator, which may be the one that the first
        holds.
        """
        return await asyncio.gather(*(self.claim(stream, row, replacement, len(rows) == 1) for row in rows))

    async def claim(self, stream: int, row: int, replacement: int = 0, may_be_alone: bool = True) -> Claim:
        """The claim of a segment's row. Waits until the gate admits its ticket (1) and a generator is healthy.

        replacement k > 0: the ticket's k-th other prompt (dynamic sampling). Raises RuntimeError when no generator is
        left that could come back.
        """
        await self._is_set_up.wait()
        if (evaluation := self._evaluations.of_stream(stream)) is not None:
            assert self._evaluations.rows is not None
            claim = self._claim_for(self._evaluations.rows.request(row), evaluation.version)
            return await self._assign(
                claim, evaluation.ledger, lambda: self._evaluations.running is evaluation, lambda: True, may_be_alone
            )
        if stream != self._active_stream or row >= self._num_tickets:
            return fenced(row)
        assert self._prompts is not None
        ticket = self._first_ticket + row
        request = GroupRequest(
            ticket=ticket,
            prompt=self._prompts.at(ticket, self._seed, replacement=replacement),
            seeds=[sample_seed(self._seed, ticket, i, replacement) for i in range(self._group_size)],
        )
        claim = self._claim_for(request, max(0, ticket // self._groups_per_step - self._max_staleness), replacement)
        return await self._assign(
            claim, self._ledger, lambda: stream == self._active_stream, lambda: self._admits(ticket), may_be_alone
        )

    def _claim_for(self, request: GroupRequest, min_version: int, replacement: int = 0) -> Claim:
        """Not assigned to a generator yet."""
        return Claim(
            ticket=request.ticket,
            prompt=request.prompt,
            seeds=request.seeds,
            replacement=replacement,
            min_version=min_version,
            sampling=request.sampling,
            generator=None,
            timeout_s=self._settings.group_timeout_s,
            attempt=self._attempt,
        )

    async def _assign(
        self,
        claim: Claim,
        ledger: Ledger,
        is_open: Callable[[], bool],
        is_admitted: Callable[[], bool],
        may_be_alone: bool,
    ) -> Claim:
        """The claim with a generator, as soon as it is admitted and one has room for it. is_open: of its stream."""
        ticket, pool = claim.ticket, self._pool
        failures = ledger.failures.get((ticket, claim.replacement), [])
        if error := why_given_up(failures):
            return replace(claim, error=error)
        where, waits_since_s = WITHOUT_GENERATOR if is_admitted() else AT_THE_GATE, time.monotonic()
        pending = PendingClaim(
            ticket=ticket,
            where=where,
            since_s=waits_since_s,
            is_alone=may_be_alone and goes_alone(failures),
            replacement=claim.replacement,
            is_evaluation=claim.sampling is not None,
        )
        makes_room = False
        if ticket in ledger.claims:  # of a stage that died: its work is repeated
            makes_room = pool.give_back(ledger.claims[ticket].where)
        ledger.claims[ticket] = pending
        while True:
            async with self._changed:
                if makes_room:
                    self._changed.notify_all()
                await self._changed.wait_for(
                    lambda: not is_open() or pool.all_dead or (is_admitted() and pool.has_room(pending.is_alone))
                )
                if not is_open() or ledger.claims.get(ticket) is not pending:
                    return fenced(ticket)
                if pool.all_dead:
                    raise RuntimeError(pool.cause_of_death)
                name = pool.take(pending.is_alone)
            pending.where, pending.since_s = name, time.monotonic()
            if not failures or await pool.confirm(name):
                break
            if ledger.claims.get(ticket) is not pending:
                return fenced(ticket)
            makes_room = pool.give_back(name)
            pending.where = WITHOUT_GENERATOR
        if ledger.claims.get(ticket) is not pending:
            return fenced(ticket)
        holding = pool.holding(name)
        pending.node, pending.process = holding.node, holding.process
        with about_group(ticket, is_evaluation=pending.is_evaluation):
            alone = ", alone" if pending.is_alone else ""
            logger.info("goes to %s%s after %.3f s %s", name, alone, pending.since_s - waits_since_s, where)
        return replace(claim, generator=pool.generators[name], generator_name=name)

    def _admits(self, ticket: int) -> bool:
        return ticket < self._gate

    @property
    def _gate(self) -> int:
        """Tickets below this number are admitted: none before the first publish, when generators may hold anything."""
        return (self._version + self._max_staleness + 1) * self._groups_per_step if self._version >= 0 else 0

    async def release_block(self, stream: int, releases: list[Release]) -> None:
        """Claimed tickets came back from their generators."""
        makes_room = [self._release(stream, release) for release in releases]
        if any(makes_room):
            async with self._changed:
                self._changed.notify_all()

    def _release(self, stream: int, release: Release) -> bool:
        """Whether a claim that waits may now find a generator."""
        ledger = self._ledger_of(stream)
        pending = ledger.claims.get(release.ticket) if ledger is not None else None
        if ledger is None or pending is None or pending.where != release.generator_name:
            return False  # its stream has ended, or it was claimed anew meanwhile
        del ledger.claims[release.ticket]
        if release.failure is None:
            self._watchdog.progress()
        else:
            with about_group(pending.ticket, is_evaluation=pending.is_evaluation):
                what = f"{pending.what} failed on {pending.where}"
                self._warn(f"{what}, and goes to another generator: {release.failure}")
            if release.begun:
                ledger.note_failure(pending, release.failure)
            self._pool.quarantine(pending.where, restart=release.restart, process=pending.process)
        return self._pool.give_back(pending.where)

    def _ledger_of(self, stream: int) -> Ledger | None:
        if (evaluation := self._evaluations.of_stream(stream)) is not None:
            return evaluation.ledger
        return self._ledger if stream == self._active_stream else None

    async def publish(self, version: int, weights: list[ray.ObjectRef]) -> PublishReport:
        """Give every healthy generator the packed weights, then open the gate for `version`.

        weights: one reference in a list, so that Ray passes the reference and each node pulls the bytes once.
        Waits for the evaluation of the version before. While all generators restart, waits for the first. Raises
        RuntimeError when no generator can load them.
        """
        attempt = self._attempt
        await self._evaluations.over()
        self._check_attempt(attempt, version)
        start_s = time.time()
        acks, failed = await self._pool.publish(version, weights)
        self._check_attempt(attempt, version)
        is_first = self._version < 0
        async with self._changed:
            self._version = version
            self._changed.notify_all()
        self._watchdog.progress()
        logger.info("version %d is published: the gate admits tickets below %d", version, self._gate)
        evaluated = self._evaluations.take_interval()
        self._evaluations.begin(version, is_first=is_first)
        return PublishReport(
            version=version,
            num_bytes=max((ack.num_bytes for ack in acks), default=0),
            seconds=time.time() - start_s,
            load_s=max((ack.load_s for ack in acks), default=0.0),
            end_s=time.time(),
            num_generators=len(self._pool.healthy),
            failed=failed,
            generator_failures=self._pool.take_failures(),
            sampled=[interval for ack in acks for interval in ack.sampled],
            evaluated=evaluated,
            evaluations_failed=self._evaluations.take_failures(),
        )

    def _check_attempt(self, attempt: int, version: int) -> None:
        """Learners that died while their publish waited must not publish into the attempt of the next ones."""
        if attempt != self._attempt:
            raise RuntimeError(f"version {version} was published by attempt {attempt}, and this is {self._attempt}")

    async def evaluated(self) -> None:
        """Wait until no evaluation is under way."""
        await self._evaluations.over()

    def _on_evaluation_end(self, ledger: Ledger) -> None:
        for claim in ledger.claims.values():  # their releases come too late to count
            self._pool.give_back(claim.where)
        self._watchdog.progress()

    async def learners_do(self, what: str) -> None:
        """The learners went on to something else; for the watchdog and its report."""
        self._watchdog.learners_do(what)

    async def status(self, first_warning: int = 0) -> ControllerStatus:
        return ControllerStatus(
            version=self._version,
            warnings=self._warnings[first_warning:],
            stop_reason=self._stop_reason,
            is_set_up=self._is_set_up.is_set(),
            num_evictions=self._num_evictions,
            waits_for=self._waits_for(),
            claims=by_state(self._pending_claims()),
            generators=self._pool.by_state(),
        )

    def _waits_for(self) -> str:
        if self._attempt == 0:
            return "starting learners and generators"
        if self._version >= 0:
            return self._watchdog.learners
        if (num_loading := self._pool.num_loading) == 0:
            return "waiting for the learners' weights"
        return f"waiting for {num_loading} of {len(self._pool.generators)} generators to load the weights"

    async def stop(self, reason: str) -> None:
        """End the run: learners that start from now on return at once."""
        logger.error("the run must stop: %s", reason)
        self._stop_reason = self._stop_reason or reason

    async def warn(self, text: str) -> None:
        """Tell the person who watches the run."""
        self._warn(text)

    def _warn(self, text: str) -> None:
        logger.warning(text)
        self._warnings.append(text)

    def _pending_claims(self) -> list[PendingClaim]:
        """Of the segment, and of the evaluation that is under way."""
        running = self._evaluations.running
        return [*self._ledger.claims.values(), *(running.ledger.claims.values() if running else ())]

    # What goes on beside the calls.

    def _start_background(self) -> None:
        if self._background:
            return
        loops = {"resizing the pool": self._resize, "the watchdog": self._watch}
        if (gauges := self._gauges) is not None:
            loops["measuring"] = lambda: self._measure(gauges)
        if (find := self._find_unplaced) is not None:
            loops["looking for room"] = lambda: look_again_and_again(find, self._on_unplaced, self._warn)
        create_task = asyncio.get_running_loop().create_task
        self._background = [create_task(keep_running(name, loop, self._warn)) for name, loop in loops.items()]

    async def _resize(self) -> None:
        while True:
            await asyncio.sleep(RESIZE_PERIOD_S)
            waiting = sum(claim.where == WITHOUT_GENERATOR for claim in self._pending_claims())
            self._pool.resize(time.monotonic(), waiting)

    async def _measure(self, gauges: Gauges) -> None:
        while True:
            gauges.set(VERSION, self._version)
            gauges.set(GATE, self._gate)
            gauges.set(GENERATOR_FAILURES, self._pool.num_failures)
            for state, count in by_state(self._pending_claims()).items():
                gauges.set(CLAIMS, count, state=state)
            for state, count in self._pool.by_state().items():
                gauges.set(GENERATORS, count, state=state)
            await asyncio.sleep(PERIOD_S)

    def _on_unplaced(self, unplaced: Unplaced) -> None:
        """A run that cannot go on without a machine does not stand still because it hangs."""
        self._pool.num_unplaced = unplaced.generators
        if unplaced and (unplaced.learners or unplaced.scorers or self._version < 0 or not self._pool.healthy):
            self._watchdog.progress()

    async def _watch(self) -> None:
        while self._stop_reason is None:
            await asyncio.sleep(self._watchdog.period_s)
            stalled_s = self._watchdog.stalled_s
            if stalled_s is not None:
                await self._on_stall(stalled_s)
                self._watchdog.progress()  # the next verdict after as long a time

    async def _on_stall(self, stalled_s: float) -> None:
        """Report, and do what watchdog.action says."""
        pool, settings = self._pool, self._watchdog.settings
        claims = self._pending_claims()
        text = stall_report(
            stalled_s,
            state=f"version {self._version}, attempt {self._attempt}, segment from ticket {self._first_ticket}"
            + (", an evaluation is under way" if self._evaluations.running else ""),
            learners=self._watchdog.learners,
            learners_s=time.monotonic() - self._watchdog.learners_since_s,
            claims=claims,
            generators=await pool.describe_all(),
        )
        path = write_report(self._report_dir, text)
        summary = (
            f"nothing has moved for {stalled_s:.0f} s (watchdog.timeout_s {settings.timeout_s:g}): "
            f"{len(claims)} claims are pending, the learners are {self._watchdog.learners}"
            + (f"; see {path}" if path else f"\n{text}")
        )
        if settings.action == "fail":
            await self.stop(summary)
            self._num_evictions += 1
            return
        holders = sorted({claim.where for claim in claims} & set(pool.generators))
        if holders:
            self._warn(f"{summary}; restarting {', '.join(holders)}")
            for name in holders:
                pool.quarantine(name, restart=True)
        else:
            self._warn(f"{summary}; restarting the learners")
            self._num_evictions += 1


def _was_restarted() -> bool:
    """Whether Ray made this actor anew after it died."""
    import ray

    if not ray.is_initialized() or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return False  # no actor
    return bool(ray.get_runtime_context().was_current_actor_reconstructed)
