"""Does every preset learn? Trains the quickstart with each of them on several seeds and prints a table.

    python benchmarks/presets.py                        # all presets, seeds 0 1 2: about half an hour on two cores
    python benchmarks/presets.py --presets gspo cispo --seeds 7

Each run is a `raygrpo train` in a process of its own. Runs that are already in the output directory with the same
settings are not repeated, so an interrupted study goes on where it was. Ends with 1 if a preset did not improve the
reward in every seed.
"""

from __future__ import annotations

import sys

from runs import Summary, markdown_table, study_arguments, train

from raygrpo.presets import PRESETS
from raygrpo.summary import FIRST_STEPS, LAST_STEPS


def main() -> int:
    parser = study_arguments(__doc__, "runs/presets")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS), help="default: all")
    arguments = parser.parse_args()
    rows, learnt = [], True
    for preset in arguments.presets:
        rewards, seconds = [], []
        for seed in arguments.seeds:
            overrides = [f"algorithm={preset}", f"seed={seed}"]
            overrides += [f"num_steps={arguments.steps}"] if arguments.steps else []
            history = train(f"{preset}-seed{seed}", overrides, arguments.output)
            rewards.append([metrics["reward/mean"] for metrics in history])
            seconds.append([metrics["timing_s/step"] for metrics in history])
        gains = [sum(run[-LAST_STEPS:]) / LAST_STEPS - sum(run[:FIRST_STEPS]) / FIRST_STEPS for run in rewards]
        learnt &= min(gains) > 0
        summary = Summary.of(rewards, seconds)
        rows.append([preset, *summary.cells(), f"{min(gains):+.3f}"])
    header = [
        "preset",
        f"reward, first {FIRST_STEPS} steps",
        f"last {LAST_STEPS} steps",
        "s per step",
        "gain of the worst seed",
    ]
    print(markdown_table(header, rows))
    return 0 if learnt else 1


if __name__ == "__main__":
    sys.exit(main())
