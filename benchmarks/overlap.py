"""What max_staleness 1 brings: the same training at 0 and at 1, its timeline and the learner's idle share.

    python benchmarks/overlap.py                     # the quickstart: two minutes on two cores
    python benchmarks/overlap.py --yaml pipelines/smollm2_cpu.yaml --steps 12

Generator and learner have one thread each, so that neither takes the other's core. Prints a table and draws
docs/images/overlap-NAME.png from the runs' logs. Runs that are already in the output directory with the same settings
are not repeated.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from datetime import datetime
from pathlib import Path

from runs import QUICKSTART, REPOSITORY, markdown_table, study_arguments, train

from raygrpo.timeline import Interval

ONE_THREAD_EACH = ["generator.num_threads=1", "learner.num_threads=1", "eval=null", "checkpoint.every=1000"]
WARM_UP = 3  # steps: engines and the stream start, and memory is touched for the first time
DRAWN = 6  # steps, after those
Bars = dict[str, list[tuple[int, Interval]]]  # by what works: (step, when)
ENDS = {  # by role: the line that ends a piece of work, and says how long it took
    "generator": re.compile(r"sampled by version \d+: \d+ tokens in ([\d.]+) s"),
    "learner": re.compile(r"trained in ([\d.]+) s"),
}


def main() -> int:
    parser = study_arguments(__doc__, "runs/overlap")
    parser.add_argument("--yaml", type=Path, default=QUICKSTART, help="what is trained; default: the quickstart")
    arguments = parser.parse_args()
    rows, timelines = [], {}
    steps = [f"num_steps={arguments.steps}"] if arguments.steps else []
    for staleness in (0, 1):
        shares: dict[str, list[float]] = {}
        for seed in arguments.seeds:
            name = f"{arguments.yaml.stem}-staleness{staleness}-seed{seed}"
            overrides = [f"max_staleness={staleness}", f"seed={seed}", *ONE_THREAD_EACH, *steps]
            history = train(name, overrides, arguments.output, arguments.yaml.absolute())[WARM_UP:]
            for metrics in history:
                for key in ("step", "generate", "learn", "publish", "other"):
                    shares.setdefault(key, []).append(metrics[f"timing_s/{key}"])
                shares.setdefault("idle", []).append(metrics["perf/learner_idle_fraction"])
                shares.setdefault("staleness", []).append(metrics["staleness/mean"])
            timelines.setdefault(staleness, read_bars(arguments.output / f"{name}-latest" / "logs"))
        mean = {key: statistics.fmean(values) for key, values in shares.items()}
        seconds = [f"{mean[key]:.2f}" for key in ("step", "generate", "learn", "publish", "other")]
        rows.append([str(staleness), *seconds, f"{100 * mean['idle']:.0f} %", f"{mean['staleness']:.2f}"])
    print(markdown_table(["max_staleness", "s a step", "generating", "learning", "publishing", "other",
                          "learner idle", "staleness, mean"], rows))  # fmt: skip
    picture = REPOSITORY / "docs" / "images" / f"overlap-{arguments.yaml.stem}.png"
    draw(timelines, picture)
    print(f"\n{picture.relative_to(REPOSITORY)}")
    return 0


def read_bars(logs: Path) -> Bars:
    """When each group was sampled and each step was trained."""
    bars: Bars = {}
    for role, pattern in ENDS.items():
        for path in sorted(logs.glob(f"{role}-*.jsonl")):
            for line in map(json.loads, path.read_text().splitlines()):
                if (found := pattern.match(line["message"])) and "evaluation_row" not in line:
                    end_s = datetime.fromisoformat(line["time"]).timestamp()
                    bars.setdefault(path.stem, []).append((line["step"], (end_s - float(found[1]), end_s)))
    return bars


def draw(timelines: dict[int, Bars], path: Path) -> None:
    """One panel for each staleness, a row for each process, a colour for each step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(len(timelines), 1, figsize=(9, 1.6 * len(timelines)), sharex=True, squeeze=False)
    colours = plt.get_cmap("tab10")
    for panel, (staleness, bars) in zip(panels[:, 0], timelines.items(), strict=True):
        drawn = {
            who: [(step, when) for step, when in work if WARM_UP <= step < WARM_UP + DRAWN]
            for who, work in bars.items()
        }
        first_s = min(start for work in drawn.values() for _, (start, _) in work)
        for row, (_, work) in enumerate(sorted(drawn.items(), reverse=True)):
            for step, (start, end) in work:
                panel.broken_barh([(start - first_s, end - start)], (row - 0.4, 0.8), color=colours(step % 10))
        panel.set_yticks(range(len(drawn)), sorted(drawn, reverse=True))
        panel.set_title(f"max_staleness {staleness}, steps {WARM_UP} to {WARM_UP + DRAWN - 1}", fontsize=10)
    panels[-1, 0].set_xlabel("seconds; one colour is one step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
