"""What a run has tracked, on the local disk: nothing is lost when MLflow, or this process, goes away.

`metrics.jsonl` holds one line per logged step, for ever: the local truth, from which a store that missed something is
filled. `spool/` holds one file per thing that is not a metric (a table, a trace, an artifact, a change of status) until
the store has it. Neither raises for a full or broken disk: what cannot be written is kept in memory, until it can be,
and said loudly.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
SPOOL_DIR = "spool"

Item = dict[str, Any]  # JSON; `kind` says what it is and so how store.py delivers it


@dataclass(frozen=True, slots=True)
class Record:
    """The metrics of one call of `log_step`. With the step, `time_ms` tells a point sent again from one logged anew."""

    step: int
    time_ms: int
    metrics: dict[str, float]

    def to_line(self) -> str:
        """One line of strict JSON: a value that is not finite becomes the text "nan", "inf" or "-inf"."""
        metrics = {name: value if math.isfinite(value) else str(value) for name, value in self.metrics.items()}
        return json.dumps({"step": self.step, "time_ms": self.time_ms, "metrics": metrics}) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Record:
        fields = json.loads(line)
        metrics = {name: float(value) for name, value in fields["metrics"].items()}
        return cls(int(fields["step"]), int(fields["time_ms"]), metrics)


@dataclass(slots=True)
class Spooled:
    """An item that the store does not have yet; `path` is None where the disk refused it."""

    item: Item
    path: Path | None


@dataclass(slots=True)
class Journal:
    """The two, under one run's directory."""

    run_dir: Path
    _next_number: int = field(default=0, init=False)
    _disk_failed: bool = field(default=False, init=False)
    _unwritten: list[Record] = field(default_factory=list, init=False)  # that the disk refused
    _torn: bool = field(default=False, init=False)  # metrics.jsonl may end within a line
    _said_torn: set[int] = field(default_factory=set, init=False)  # lines

    @property
    def metrics_path(self) -> Path:
        return self.run_dir / METRICS_FILE

    @property
    def spool_dir(self) -> Path:
        return self.run_dir / SPOOL_DIR

    def records(self) -> Iterator[Record]:
        """Everything logged so far, in order, read anew. A line torn by a crash is skipped, and said."""
        try:
            with self.metrics_path.open() as file:
                for number, line in enumerate(file, start=1):
                    self._torn = not line.endswith("\n")
                    record = self._parsed(number, line)
                    if record is not None:
                        yield record
        except FileNotFoundError:
            pass
        except (OSError, UnicodeDecodeError) as error:
            self._complain(error)
        yield from self._unwritten

    def _parsed(self, number: int, line: str) -> Record | None:
        try:
            return Record.from_line(line)
        except (ValueError, KeyError, TypeError, AttributeError):
            if line.strip() and number not in self._said_torn:
                self._said_torn.add(number)
                logger.warning(
                    "%s, line %d is not a record of metrics (torn by a crash?): left out", self.metrics_path, number
                )
            return None

    def append(self, record: Record) -> None:
        self._unwritten.append(record)
        lines = "".join(record.to_line() for record in self._unwritten)
        if self._write(self.metrics_path, "\n" * self._torn + lines, mode="a"):
            self._unwritten.clear()
            self._torn = False
        else:  # maybe half of it was written: what is appended next must not join a torn line
            self._torn = True

    def prepend(self, records: list[Record]) -> None:
        """Make these the beginning of the history."""
        text = "".join(record.to_line() for record in [*records, *self.records()])
        if self._write(self.metrics_path, text, mode="w"):
            self._unwritten.clear()
            self._torn = False

    def load_spool(self) -> list[Spooled]:
        """What an earlier process could not deliver, oldest first."""
        spooled = []
        for path in sorted(self.spool_dir.glob("*.json")):
            try:
                self._next_number = max(self._next_number, int(path.stem.partition("-")[0]) + 1)
                spooled.append(Spooled(json.loads(path.read_text()), path))
            except (OSError, ValueError) as error:
                logger.warning("the spooled file %s cannot be read (%s): left out", path, error)
        return spooled

    def spool(self, item: Item) -> Spooled:
        path = self.spool_dir / f"{self._next_number:08d}-{item['kind']}.json"
        self._next_number += 1
        written = self._write(path, json.dumps(item), mode="w")
        return Spooled(item, path if written else None)

    def delivered(self, spooled: Spooled) -> None:
        self._leave_spool(spooled, lambda path: path.unlink(missing_ok=True))

    def reject(self, spooled: Spooled) -> None:
        """The store will never take it: out of the way, but not thrown away."""
        self._leave_spool(spooled, lambda path: path.replace(path.with_suffix(".rejected")))

    def _leave_spool(self, spooled: Spooled, leave: Callable[[Path], object]) -> None:
        if spooled.path is None:
            return
        try:
            leave(spooled.path)
        except OSError as error:  # delivered once more by a later process, which does no harm
            self._complain(error)

    def _write(self, path: Path, text: str, mode: str) -> bool:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if mode == "w":  # whole or not at all
                partial = path.with_suffix(".partial")
                partial.write_text(text)
                os.replace(partial, path)
            else:
                with path.open(mode) as file:
                    file.write(text)
        except OSError as error:
            self._complain(error)
            return False
        self._disk_failed = False
        return True

    def _complain(self, error: OSError | UnicodeDecodeError) -> None:
        if not self._disk_failed:  # once for each time the disk fails, not once a step
            logger.error(
                "tracking cannot use %s (%s): metrics are kept in memory only, until it can", self.run_dir, error
            )
        self._disk_failed = True
