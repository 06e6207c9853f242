"""`make soak`: a long training of a tiny model, and what its processes hold meanwhile.

Everything is real: `raygrpo train`, vLLM, DeepSpeed, Ray, MLflow; only the model is tiny and the completions are short.
Every few seconds the processes below the command are looked at: private memory, file descriptors and how many there
are, by role, and the pages of the object store that were ever used. After WARM_UP of the run, the last third may not
hold more than the first third, beyond the tolerances below. Medians are compared, for between two segments there are no
stages for a moment. Prints a table; exits with 1 and says what grew.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil
import yaml

from raygrpo.bench.tables import table
from tests.test_train import TASK
from tests.tiny_models import tiny_model

WARM_UP = 0.25  # of the run: caches fill, buffers reach their size
GROWTH_SHARE, GROWTH_MB = 0.05, 15.0  # of a role's memory; whichever is more
GROWTH_FILES, GROWTH_PROCESSES = 8, 1
# Ray's own processes remember workers that have ended, and every segment starts some: their log files (a bounded
# number), their connections, what became of their executions. Counted in the table, and here with more room.
RAYS_OWN = ("GCS", "Ray's agents", "Ray Data's stats", "idle workers")
RAYS_OWN_GROWTH_MB, RAYS_OWN_GROWTH_FILES = 40.0, 80

ROLES = {  # in a process's command line -> role; the first that fits
    "RayTrainWorker": "learner",
    "Generator": "generator",
    "Tracker": "tracker",
    "RolloutController": "controller",
    "MapWorker": "stages",
    "rewards.child": "stages",
    "SplitCoordinator": "Ray Data",
    "_StatsActor": "Ray Data's stats",
    "ActorLocationTracker": "Ray Data's stats",
    "TrainController": "Ray Train",
    "raylet/raylet": "raylet",
    "gcs_server": "GCS",
    "ray::IDLE": "idle workers",
    "agent": "Ray's agents",
    "monitor": "Ray's agents",
}


@dataclass
class Sample:
    """What there is at one moment, by role."""

    time_s: float
    step: int
    memory_mb: Counter[str] = field(default_factory=Counter)  # private: without what processes share
    files: Counter[str] = field(default_factory=Counter)
    processes: Counter[str] = field(default_factory=Counter)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--period", type=float, default=5.0, help="seconds between looks")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        samples = watch_run(Path(directory), arguments.steps, arguments.overrides, arguments.period)
    print(report(samples))
    problems = growth(samples)
    print("\n".join(problems) or "nothing grew")
    sys.exit(bool(problems))


def watch_run(directory: Path, num_steps: int, overrides: Sequence[str], period_s: float) -> list[Sample]:
    """Train in a process of its own and look at it until it ends. Raises RuntimeError when it fails."""
    (directory / "task.py").write_text(TASK)
    config = {
        "num_steps": num_steps,
        "groups_per_step": 4,
        "group_size": 4,
        "max_staleness": 1,
        "output_dir": str(directory / "runs"),
        "model": {"path": str(tiny_model(directory / "model", max_positions=256))},
        "data": {"source": "task:rows"},
        "reward": {"functions": [{"use": "task:share"}]},
        "generator": {"sampling": {"max_tokens": 8}, "num_threads": 1, "vllm": {"kv_cache_memory_bytes": 32 * 2**20}},
        "learner": {"optimizer": {"lr": 1e-5}, "num_threads": 1},  # lengths stay as they are
        "checkpoint": {"every": 25},
        "tracking": {"uri": f"sqlite:///{directory}/mlflow.db"},
    }
    (directory / "soak.yaml").write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("raygrpo")), "train", str(directory / "soak.yaml"), *overrides]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        command,
        env=environment | {"RAY_AUTH_TOKEN": secrets.token_hex(32)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True)
    reader.start()
    samples, start_s = [], time.monotonic()
    try:
        while process.poll() is None:
            step = max((int(found[1]) for line in lines[-20:] if (found := re.search(r"step (\d+)/", line))), default=0)
            if 0 < step < num_steps:
                samples.append(look(process.pid, time.monotonic() - start_s, step))
            time.sleep(period_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(60)
    reader.join()
    if process.returncode:
        raise RuntimeError("the run failed:\n" + "".join(lines[-40:]))
    return samples


def look(pid: int, time_s: float, step: int) -> Sample:
    sample = Sample(time_s, step)
    driver = psutil.Process(pid)
    for process in (driver, *driver.children(recursive=True)):
        try:
            command = " ".join(process.cmdline())
            memory, num_files = process.memory_info(), process.num_fds()
            store_mb = object_store_mb(process.pid) if "raylet/raylet" in command else 0.0
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        role = next((role for part, role in ROLES.items() if part in command), "other")
        role = "driver" if process.pid == pid else role
        sample.memory_mb[role] += (memory.rss - memory.shared) / 1e6
        sample.files[role] += num_files
        sample.processes[role] += 1
        if store_mb:
            sample.memory_mb["object store"] = store_mb
    return sample


def object_store_mb(raylet: int) -> float:
    """Pages of the shared memory behind Ray's object store that were ever used."""
    files = [path for path in Path(f"/proc/{raylet}/fd").iterdir() if "plasma" in os.readlink(path)]
    inodes = {stat.st_ino: stat.st_blocks for path in files if (stat := path.stat())}
    return sum(inodes.values()) * 512 / 1e6


def thirds(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """The first and the last third of what came after the warm-up."""
    settled = list(samples[int(len(samples) * WARM_UP) :])
    third = len(settled) // 3
    if third < 2:
        raise ValueError(f"{len(samples)} looks are too few: more steps, or a shorter period")
    return settled[:third], settled[-third:]


def growth(samples: Sequence[Sample]) -> list[str]:
    """What the last third holds more of than the first, beyond tolerance."""
    early, late = thirds(samples)
    problems = []
    for role in sorted(samples[-1].memory_mb):
        before, after = (median(sample.memory_mb[role] for sample in part) for part in (early, late))
        room_mb = RAYS_OWN_GROWTH_MB if role in RAYS_OWN else max(GROWTH_MB, GROWTH_SHARE * before)
        if after > before + room_mb:
            problems.append(f"memory of {role} grew from {before:.0f} to {after:.0f} MB")
    files = {
        role: median(sample.files[role] for sample in late) - median(sample.files[role] for sample in early)
        for role in sorted(samples[-1].files)
    }
    for roles, room in (
        (set(files) - set(RAYS_OWN), GROWTH_FILES),
        (set(files) & set(RAYS_OWN), RAYS_OWN_GROWTH_FILES),
    ):
        grown = sum(files[role] for role in roles)
        if grown > room:
            most = max(roles, key=files.__getitem__)
            problems.append(f"files grew by {grown:g}, most those of {most}, by {files[most]:g}")
    before, after = (median(sample.processes.total() for sample in part) for part in (early, late))
    if after > before + GROWTH_PROCESSES:
        problems.append(f"processes grew from {before:g} to {after:g}")
    return problems


def report(samples: Sequence[Sample]) -> str:
    roles = sorted({role for sample in samples for role in sample.memory_mb})
    rows = []
    for s in samples:
        memory = [f"{s.memory_mb[role]:.0f}" for role in roles]
        totals = [f"{sum(s.memory_mb.values()):.0f}", str(s.files.total()), str(s.processes.total())]
        rows.append([f"{s.time_s:.0f}", str(s.step), *memory, *totals])
    text = "private memory in MB, by role\n\n" + table(["s", "step", *roles, "all", "files", "processes"], rows)
    early, late = thirds(samples)
    summary = []
    for name, part in (("first third", early), ("last third", late)):
        cells = [f"{median(s.memory_mb[role] for s in part):.0f}" for role in roles]
        cells += [f"{median(sum(s.memory_mb.values()) for s in part):.0f}"]
        cells += [f"{median(getattr(s, kind).total() for s in part):g}" for kind in ("files", "processes")]
        summary.append([name, *cells])
    return text + "\n\n" + table(["after the warm-up", *roles, "all", "files", "processes"], summary)


if __name__ == "__main__":
    main()
