"""Notices that a run stands still, and says where.

A run makes progress when a group comes back from its generator, when weights are published, and when the learners go on
to something else. Without any of that for `watchdog.timeout_s`, something hangs that no deadline of its own catches:
an engine in a kernel, learners in a collective, a stage that lost a call. The report names what waits where; what
happens then is the controller's part.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from raygrpo.config import WatchdogConfig
from raygrpo.roles.claims import AT_THE_GATE, WITHOUT_GENERATOR, PendingClaim


class Watchdog:
    def __init__(self, settings: WatchdogConfig):
        self.settings = settings
        self.learners = "starting"  # what they do
        self.learners_since_s = time.monotonic()
        self._last_progress_s = time.monotonic()

    @property
    def period_s(self) -> float:
        """How often to look."""
        return min(5.0, self.settings.timeout_s / 4)

    def progress(self) -> None:
        self._last_progress_s = time.monotonic()

    def learners_do(self, what: str) -> None:
        self.learners = what
        self.learners_since_s = time.monotonic()
        self.progress()

    @property
    def stalled_s(self) -> float | None:
        """Seconds without progress, once they are too many."""
        seconds = time.monotonic() - self._last_progress_s
        return seconds if seconds > self.settings.timeout_s else None


def stall_report(
    stalled_s: float,
    *,
    state: str,
    learners: str,
    learners_s: float,
    claims: Sequence[PendingClaim],
    generators: dict[str, str],
) -> str:
    """What waits where, for a person. state: version and segment. generators: by name, what each says of itself."""
    now_s = time.monotonic()
    lines = [f"Nothing has moved for {stalled_s:.0f} s: no group finished, nothing was published, no step was trained."]
    lines += ["", state, f"learners: {learners}, for {learners_s:.0f} s", ""]
    lines += [f"claims that have not come back: {len(claims)}"]
    for claim in sorted(claims, key=lambda claim: (claim.is_evaluation, claim.ticket)):
        place = f"waits {claim.where}" if claim.where in (AT_THE_GATE, WITHOUT_GENERATOR) else f"is at {claim.where}"
        lines.append(f"  {claim.what} {place}, for {now_s - claim.since_s:.0f} s")
    if not claims:
        lines.append("  (none: if the learners wait for groups, look at the reward stage, in Ray's dashboard)")
    lines += ["", "generators:"]
    for name, status in generators.items():
        first, *rest = status.splitlines() or [""]
        lines += [f"  {name}: {first}", *(f"    {line}" for line in rest)]
    return "\n".join(lines) + "\n"


def write_report(directory: str | None, text: str) -> str | None:
    """The file with the report, or None where there is no directory to write to."""
    if directory is None:
        return None
    path = Path(directory) / f"watchdog-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    try:
        path.write_text(text)
    except OSError:
        return None
    return str(path)
