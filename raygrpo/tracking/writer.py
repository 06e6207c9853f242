"""The thread that carries a run's journal to MLflow, in order, for as long as it takes.

Whatever fails, it waits, connects anew and goes on; it waits for MLflow so that training does not. Delivered means that
MLflow has acknowledged it.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable

from raygrpo.tracking.journal import Item, Journal, Record, Spooled
from raygrpo.tracking.store import MAX_METRICS_PER_BATCH, MlflowRun, without_password

logger = logging.getLogger(__name__)

LONGEST_PAUSE_S = 30.0  # between attempts to reach a store that does not answer
CLOSING_PAUSE_S = 1.0  # the same, while somebody waits for the end
NUM_RECENT = 32  # records in memory; whoever follows a run asks for the last ones
REMIND_S = 300.0  # between reminders that it still does not
NEVER_ACCEPTED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")  # MLflow's codes for what no repetition helps
# Of models, which older and foreign servers do not know, and which a registry may refuse: a run goes on without them.
MODELS_NEVER_ACCEPTED = (
    "ENDPOINT_NOT_FOUND",
    "FEATURE_DISABLED",
    "NOT_IMPLEMENTED",
    "PERMISSION_DENIED",
    "RESOURCE_DOES_NOT_EXIST",
)


class Writer:
    """Delivers `journal` to `run`, beginning with what an earlier process left there. Thread-safe.

    on_connect: called in the thread after each connection. on_record: called with every record, those of an earlier
    process first; where a step was logged again, the later record comes later.
    """

    def __init__(
        self, run: MlflowRun, journal: Journal, on_connect: Callable[[], None], on_record: Callable[[Record], None]
    ) -> None:
        self.run = run
        self.connected = False
        self._journal = journal
        self._on_connect = on_connect
        self._on_record = on_record
        self._spool: deque[Spooled] = deque(journal.load_spool())
        self._chores: deque[Callable[[], None]] = deque()  # work for the thread that is no delivery
        self._pending: deque[Record] = deque()  # that MLflow may lack; the journal has them all
        self._compared_with: str | None = None  # the MLflow run with which the whole journal was compared
        self._recent: deque[Record] = deque(maxlen=NUM_RECENT)
        self._older_step = -1  # the highest of a record that is no longer recent
        self._num_uncompared = self._review()  # records of an earlier process
        self._adopt = not self._num_uncompared
        self._closing = False
        self._outage_began = self._outage_said = 0.0  # time.monotonic(); 0: there is none
        self._changed = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to deliver, unless that goes on already or is over."""
        with self._changed:
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._work, name="mlflow-writer", daemon=True)
                self._thread.start()

    def add_record(self, record: Record) -> None:
        with self._changed:
            self._journal.append(record)
            self._pending.append(record)
            self._remember(record)
            self._changed.notify_all()
        self.start()

    def add_item(self, item: Item) -> None:
        """An item that waits already, word for word, is not added again (the first in the queue may be on its way)."""
        with self._changed:
            if not any(waiting.item == item for waiting in list(self._spool)[1:]):
                self._spool.append(self._journal.spool(item))
            self._changed.notify_all()
        self.start()

    def add_chore(self, chore: Callable[[], None]) -> None:
        """Run `chore` in the thread, once, before the next delivery; it must not raise."""
        with self._changed:
            if chore not in self._chores:
                self._chores.append(chore)
            self._changed.notify_all()
        self.start()

    def records(self, first_step: int) -> list[Record]:
        """What was logged of `first_step` and later ones, in order; of long ago it is read from the journal."""
        with self._changed:
            source = self._recent if first_step > self._older_step else self._journal.records()
            return [record for record in source if record.step >= first_step]

    def undelivered(self) -> int:
        """Steps and items that MLflow does not have for certain."""
        with self._changed:
            return self._num_uncompared + len(self._pending) + len(self._spool)

    def wait_connected(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.connected, timeout=timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` until everything is delivered, then stop the thread; True if it was."""
        self.start()
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: self.connected and self.undelivered() == 0, timeout=timeout_s)
            thread, self._thread = self._thread, None
            self._changed.notify_all()
        if done and thread is not None:
            thread.join(timeout=5.0)
        return done

    # In the thread.

    def _work(self) -> None:
        failures = 0
        while self._wait_for_work():
            while self._chores:
                self._chores.popleft()()
            try:
                self._deliver()
            except Exception as error:
                self.connected = False
                self._say_lost(error)
                self._pause(min(2.0**failures, LONGEST_PAUSE_S))
                failures += 1
            else:
                failures = 0
                self._say_found()
                with self._changed:
                    self._changed.notify_all()  # whoever waits in `close`

    def _wait_for_work(self) -> bool:
        """False when the writer was closed."""

        def closed() -> bool:
            return self._thread is not threading.current_thread()

        with self._changed:
            self._changed.wait_for(lambda: closed() or self._chores or not self.connected or self.undelivered())
            return not closed()

    def _deliver(self) -> None:
        """Everything there is. Where it raises, the next call connects anew, which finds out what has arrived."""
        if not self.connected:
            self.run.connect()
            self._on_connect()
            with self._changed:
                self._compare()
                self.connected = True
                self._changed.notify_all()
        while True:
            with self._changed:
                records = _first_batch(self._pending)
                spooled = self._spool[0] if self._spool else None
            if records:
                self.run.log_metrics(records)
                with self._changed:
                    for _ in records:
                        self._pending.popleft()
            elif spooled is not None:
                self._deliver_spooled(spooled)
            else:
                return

    def _deliver_spooled(self, spooled: Spooled) -> None:
        try:
            self.run.deliver(spooled.item)
            self._journal.delivered(spooled)
        except Exception as error:
            if not _never_accepted(spooled.item, error):
                raise
            logger.error(
                "MLflow will not take this %s, which is left out: %s", spooled.item["kind"], _first_line(error)
            )
            self._journal.reject(spooled)
        with self._changed:
            self._spool.popleft()

    def _compare(self) -> None:
        """Once for each MLflow run: what the journal has and the run lacks is pending. Where the journal was lost but
        the run has points (a run_id was given), the history begins with those."""
        if self._compared_with == self.run.run_id:
            return
        if self._adopt and (history := self.run.read_history()):
            self._journal.prepend(history)
            self._review()
        self._pending = deque(record for record in self._journal.records() if self.run.lacks(record))
        self._adopt, self._num_uncompared, self._compared_with = False, 0, self.run.run_id

    def _review(self) -> int:
        """Remember all of the journal; returns how many records it has."""
        number = 0
        for record in self._journal.records():
            self._remember(record)
            number += 1
        return number

    def _remember(self, record: Record) -> None:
        if len(self._recent) == NUM_RECENT:
            self._older_step = max(self._older_step, self._recent[0].step)
        self._recent.append(record)
        self._on_record(record)

    def _pause(self, seconds: float) -> None:
        """Cut short when somebody begins to wait for the end."""
        with self._changed:
            if not self._closing:
                self._changed.wait_for(lambda: self._closing, timeout=seconds)
            else:
                self._changed.wait_for(lambda: self._thread is None, timeout=min(seconds, CLOSING_PAUSE_S))

    def _say_lost(self, error: Exception) -> None:
        now = time.monotonic()
        self._outage_began = self._outage_began or now
        if not self._outage_said or now - self._outage_said > REMIND_S:
            self._outage_said = now
            logger.warning(
                "MLflow at %s does not work (%s: %s). Training goes on; %d steps and files wait in %s until it does",
                without_password(self.run.uri),
                type(error).__name__,
                _first_line(error),
                self.undelivered(),
                self._journal.run_dir,
            )

    def _say_found(self) -> None:
        if self._outage_began:
            seconds = time.monotonic() - self._outage_began
            uri = without_password(self.run.uri)
            logger.warning("MLflow at %s works again after %.0f s: everything is delivered", uri, seconds)
        self._outage_began = self._outage_said = 0.0


def _first_batch(pending: deque[Record]) -> list[Record]:
    """As many records as go into one call, at least one where there is one."""
    batch, num_metrics = [], 0
    for record in pending:
        num_metrics += len(record.metrics)
        if batch and num_metrics > MAX_METRICS_PER_BATCH:
            break
        batch.append(record)
    return batch


def _never_accepted(item: Item, error: Exception) -> bool:
    """Whether it is the item's fault: it would hold up the rest for ever."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        codes = NEVER_ACCEPTED + MODELS_NEVER_ACCEPTED * (item["kind"] in ("checkpoint", "scores", "policy"))
        return getattr(error, "error_code", "") in codes
    if isinstance(error, OSError):
        return item["kind"] in ("artifact", "policy") and not os.path.exists(item["path"])
    if isinstance(error, json.JSONDecodeError):  # what a proxy answers when the server is away
        return False
    return isinstance(error, ValueError | TypeError | KeyError | NotImplementedError)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]
