"""CPU time of the processes of a stream, by what they do."""

from __future__ import annotations

import threading
import time

import psutil


class CpuWatch:
    """CPU seconds of this process and all below it, by kind, sampled while the body runs."""

    def __init__(self, period_s: float = 0.5):
        self._period_s = period_s
        self._samples: list[tuple[float, dict[int, tuple[str, float]]]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> CpuWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def between(self, start_s: float, end_s: float) -> tuple[float, dict[str, float]]:
        """(seconds, CPU seconds by kind) from the last sample before start_s to the first after end_s (unix times)."""
        before = [sample for sample in self._samples if sample[0] <= start_s][-1:] or self._samples[:1]
        after = [sample for sample in self._samples if sample[0] >= end_s][:1] or self._samples[-1:]
        (first_s, first), (last_s, _) = before[0], after[0]
        inside = [(at, usage) for at, usage in self._samples if first_s <= at <= last_s]
        newest = {
            pid: entry for _, usage in inside for pid, entry in usage.items()
        }  # of those that ended meanwhile too
        totals: dict[str, float] = {}
        for pid, (kind, seconds) in newest.items():
            totals[kind] = totals.get(kind, 0.0) + seconds - first.get(pid, (kind, 0.0))[1]
        return last_s - first_s, totals

    def _watch(self) -> None:
        done = False
        while not done:
            self._samples.append((time.time(), cpu_seconds()))
            done = self._done.wait(self._period_s)
        self._samples.append((time.time(), cpu_seconds()))


THIS, REST = "this process", "the rest"
KINDS = {  # in a process's command line -> what the table calls it
    "RolloutController": "controller",
    "InstantGenerator": "generators",
    "RolloutStage": "rollout proxies",
    "RewardStage": "reward workers",
    "rewards.child": "reward workers",
    "SplitCoordinator": "Ray Data's loop",
    "_StatsActor": "Ray Data's loop",
    "ActorLocationTracker": "Ray Data's loop",
    "NullLearner": "learner",
    "raylet": "raylet, GCS",
    "gcs_server": "raylet, GCS",
}


def cpu_seconds() -> dict[int, tuple[str, float]]:
    """pid -> (kind, CPU seconds so far): of this process and all below it."""
    me = psutil.Process()
    usage = {}
    for process in (me, *me.children(recursive=True)):
        try:
            times, command = process.cpu_times(), " ".join(process.cmdline())
        except psutil.NoSuchProcess:  # or a zombie
            continue
        kind = THIS if process == me else next((k for part, k in KINDS.items() if part in command), REST)
        usage[process.pid] = (kind, times.user + times.system)
    return usage


def cpu_seconds_of(kind: str) -> float:
    return sum(seconds for name, seconds in cpu_seconds().values() if name == kind)
