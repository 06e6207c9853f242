"""Short trainings in which processes are killed, or stop answering, at random moments: `make chaos`.

test_recovery.py runs a few of them.

Every run is `raygrpo train` as a user starts it, on a tiny model. In deterministic mode it must end with the weights of
an undisturbed run, to the last bit: nothing else shows as sharply that every group was trained exactly once, in its
order, by the policy that it belongs to. At max_staleness 1, where tokens depend on timing, it must end with every step
trained and no group too old. A kill of the driver is followed by `--resume`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

NUM_STEPS, EVERY, GROUPS_PER_STEP, GROUP_SIZE = 8, 2, 4, 4
RUN_LIMIT_S = 900.0
POLL_S = 0.05

TITLES = {  # kind of fault -> how the process calls itself
    "generator": "ray::Generator",
    "rollout stage": "RolloutStage",
    "reward stage": "RewardStage",
    "reward functions": "raygrpo.rewards.child",
    "learner": "RayTrainWorker",
    "stream": "ray::SplitCoordinator",
    "controller": "ray::RolloutController",
    "tracker": "ray::Tracker",
    "evaluator": "ray::Evaluator",
}
DRIVER, HANG = "driver", "generator hangs"
KINDS = [*TITLES, HANG, DRIVER]
EVALUATED = "eval={every: 2, data: {source: 'chaos_task:rows', max_rows: 3}}"

TASK = """
def rows():
    for i in range(10):
        letter = chr(97 + i)
        yield {"prompt": f"Write the letter {letter} as often as you can. " * 3, "answer": letter}


def share(completion, answer):
    return sum(-abs(ord(c) - ord(answer)) for c in completion) / 100 / max(1, len(completion))
"""


@dataclass(frozen=True)
class Fault:
    kind: str
    after_step: int  # of the run's record
    delay_s: float

    @classmethod
    def draw(cls, kind: str, generator: random.Random) -> Fault:
        return cls(kind, generator.randrange(NUM_STEPS - 2), generator.uniform(0.0, 1.5))


@dataclass
class Outcome:
    seconds: float
    digest: str  # of the exported weights
    steps: dict[int, dict[str, float]]  # the record, last values
    killed: list[str] = field(default_factory=list)  # kinds, in order
    warnings: str = ""


def write_task(directory: Path) -> Path:
    """A tiny model and a run's YAML in an empty directory; returns the YAML."""
    from tests.tiny_models import tiny_model

    tiny_model(directory / "model", max_positions=256)
    (directory / "chaos_task.py").write_text(TASK)
    settings = {
        "num_steps": NUM_STEPS,
        "groups_per_step": GROUPS_PER_STEP,
        "group_size": GROUP_SIZE,
        "output_dir": str(directory / "runs"),
        "model": {"path": "model"},
        "data": {"source": "chaos_task:rows"},
        "reward": {"functions": [{"use": "chaos_task:share"}]},
        "generator": {
            "num_actors": 2,
            "num_threads": 1,
            "group_timeout_s": 40.0,
            "load_timeout_s": 120.0,
            "sampling": {"max_tokens": 12},
            "vllm": {"kv_cache_memory_bytes": 32 * 2**20},
        },
        "learner": {"num_workers": 2, "num_threads": 1, "max_restarts": 5, "optimizer": {"lr": 1e-2}},
        "checkpoint": {"every": EVERY},
        "tracking": {"samples_every": 0, "figure_every": 0, "system_metrics": False},
    }
    path = directory / "chaos.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def train(config: Path, name: str, faults: Sequence[Fault] = (), *options: str) -> Outcome:
    """One run with these faults, in their order, to its end. Raises AssertionError when it does not end well."""
    run_dir = config.parent / "runs" / f"{name}-latest"
    log = config.parent / f"{name}.log"
    command = [str(Path(sys.executable).parent / "raygrpo"), "train", str(config), f"name={name}", *options]
    outcome = Outcome(0.0, "", {})
    start_s = time.monotonic()
    remaining = sorted(faults, key=lambda fault: fault.after_step)
    resumed: list[str] = []
    with open(log, "w") as stream:
        while True:
            with started([*command, *resumed], config.parent, stream) as process:
                while process.poll() is None:
                    assert time.monotonic() < start_s + RUN_LIMIT_S, f"{name} did not end: see {log}"
                    time.sleep(POLL_S)
                    if remaining and max(record(run_dir), default=-1) >= remaining[0].after_step:
                        fault = remaining.pop(0)
                        time.sleep(fault.delay_s)
                        while process.poll() is None:
                            if kill(process, fault.kind):
                                outcome.killed.append(fault.kind)
                                break
                            time.sleep(POLL_S)  # between two segments there is no stage
            if process.returncode != -signal.SIGKILL:
                break
            resumed = ["--resume"]
    outcome.warnings = log.read_text()
    assert process.returncode == 0, f"{name} ended with {process.returncode}: {outcome.warnings[-3000:]}"
    outcome.seconds = time.monotonic() - start_s
    outcome.digest = hashlib.sha256((run_dir / "model" / "model.safetensors").read_bytes()).hexdigest()
    outcome.steps = record(run_dir)
    return outcome


@contextlib.contextmanager
def started(command: list[str], directory: Path, log) -> Iterator[subprocess.Popen]:
    """The process, and at the end nothing left of what it started."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    process = subprocess.Popen(command, cwd=directory, stdout=log, stderr=log, env=environment, start_new_session=True)
    family: set[psutil.Process] = set()
    try:
        process.family = family  # type: ignore[attr-defined]
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family |= set(psutil.Process(process.pid).children(recursive=True))
        if process.poll() is None:
            process.kill()
        process.wait()
        _, alive = psutil.wait_procs(family, timeout=20)  # Ray's processes leave by themselves
        for left in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()


def kill(process: subprocess.Popen, kind: str) -> bool:
    """SIGKILL (SIGSTOP for one that is to hang) to a process of this kind that the run has started; False where there
    is none just now."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return False
    process.family |= set(family)  # type: ignore[attr-defined]
    if kind == DRIVER:
        process.kill()
        process.wait()
        return True
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if TITLES["generator" if kind == HANG else kind] in " ".join(member.cmdline()):
                member.suspend() if kind == HANG else member.kill()
                return True
    return False


def record(run_dir: Path) -> dict[int, dict[str, float]]:
    """The metrics by step that the run has written so far; of a step trained again, the last."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return {}
    steps = {}
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # the line that is being written
            entry = json.loads(line)
            if "reward/mean" in entry["metrics"]:  # else an evaluation's
                steps[entry["step"]] = entry["metrics"]
    return steps


def check(outcome: Outcome, max_staleness: int, reference: Outcome | None) -> None:
    """Every step was trained, on all its groups, none too old; and with the same result as the reference."""
    assert sorted(outcome.steps) == list(range(NUM_STEPS)), sorted(outcome.steps)
    for step, metrics in outcome.steps.items():
        assert metrics["staleness/max"] <= max_staleness, (step, metrics["staleness/max"])
        assert metrics["completions/num"] == GROUPS_PER_STEP * GROUP_SIZE, (step, metrics["completions/num"])
    if reference is not None:
        rewards = {step: metrics["reward/mean"] for step, metrics in outcome.steps.items()}
        expected = {step: metrics["reward/mean"] for step, metrics in reference.steps.items()}
        assert rewards == expected, (rewards, expected)
        assert outcome.digest == reference.digest, "other weights than without the fault"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="an empty directory for the runs")
    parser.add_argument("--runs", type=int, default=len(KINDS), help="with one fault or two each")
    parser.add_argument("--seed", type=int, default=None, help="of kinds and moments; drawn and printed by default")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.randrange(10**6)
    print(f"seed {seed}", flush=True)
    arguments.directory.mkdir(parents=True, exist_ok=True)
    config = write_task(arguments.directory)
    generator = random.Random(seed)
    reference = train(config, "reference", (), "deterministic=true", EVALUATED)
    print(f"undisturbed: {reference.seconds:.0f} s", flush=True)
    seconds: dict[str, list[float]] = defaultdict(list)
    failures: dict[str, list[str]] = defaultdict(list)
    for number in range(arguments.runs):
        faults = [Fault.draw(KINDS[number % len(KINDS)], generator)]
        if generator.random() < 0.5:
            faults.append(Fault.draw(generator.choice(KINDS), generator))
        overlapped = generator.random() < 0.25
        options = ["max_staleness=1"] if overlapped else ["deterministic=true"]
        label = " + ".join(f"{fault.kind} after step {fault.after_step} and {fault.delay_s:.1f} s" for fault in faults)
        try:
            outcome = train(config, f"run-{number}", faults, *options, EVALUATED)
            check(outcome, int(overlapped), None if overlapped else reference)
            result = f"whole, {outcome.seconds:.0f} s, killed {', '.join(outcome.killed) or 'nothing'}"
            for kind in outcome.killed:
                seconds[kind].append(outcome.seconds)
        except AssertionError as error:
            result = f"FAILED: {error}"
            for fault in faults:
                failures[fault.kind].append(f"run-{number}")
        print(f"run-{number} ({options[0]}): {label}: {result}", flush=True)
    print(f"\n{'killed':18} {'runs':>4} {'whole':>6} {'median s':>9}   (undisturbed {reference.seconds:.0f} s)")
    for kind in KINDS:
        done, failed = seconds[kind], failures[kind]
        median = f"{statistics.median(done):.0f}" if done else "-"
        print(f"{kind:18} {len(done) + len(failed):4} {len(done):6} {median:>9}   {' '.join(failed)}")
    sys.exit(bool(any(failures.values())))


if __name__ == "__main__":
    main()
