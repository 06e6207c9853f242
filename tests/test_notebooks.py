"""The notebooks run as they are, on runs as the tracker writes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raygrpo.tracking import Tracker
from tests.tracking.conftest import make_config

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"

# Jupyter's own ways, as far as the notebooks use them: all cells in one namespace, the last value of a cell is shown.
RUN = """
import json, sys
import matplotlib
matplotlib.use("Agg")
cells = [cell for cell in json.load(open(sys.argv[1]))["cells"] if cell["cell_type"] == "code"]
namespace = {}
for number, cell in enumerate(cells):
    exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
namespace["plt"].savefig(sys.argv[2])
print(json.dumps({
    "figures": len(namespace["plt"].get_fignums()),
    "varied": namespace["varied"],
    "comparison": namespace["comparison"].T.to_dict(),
}))
"""


def test_notebooks_hold_no_outputs() -> None:
    notebooks = list(NOTEBOOKS.glob("*.ipynb"))
    assert notebooks
    for path in notebooks:
        for cell in json.loads(path.read_text())["cells"]:
            assert not cell.get("outputs") and cell.get("execution_count") is None, path


@pytest.mark.slow
def test_compare_runs_says_of_each_run_where_it_began_and_ended(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/mlflow.db"
    for seed, slope in ((0, 0.01), (1, 0.02)):
        config = make_config(tmp_path, name=f"run{seed}", seed=seed, tracking={"uri": store})
        tracker = Tracker(config, str(tmp_path / f"run{seed}"))
        for step in range(20):
            metrics = {"reward/mean": slope * step, "policy/grad_norm": 1.0 + step % 7, "timing_s/step": 2.0}
            metrics |= {f"timing_s/{stage}": 0.4 for stage in ("generate", "reward", "learn", "publish", "other")}
            metrics |= {"perf/tokens_per_s": 100.0 * (seed + 1), "completions/mean_length": 12.0}
            tracker.log_step(step, metrics)
        tracker.log_step(20, {"eval/held_out/reward": slope * 30})
        tracker.finish()
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(NOTEBOOKS / "compare_runs.ipynb"), str(tmp_path / "last.png")],
        env=os.environ | {"MLFLOW_TRACKING_URI": store},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["varied"] == ["seed"]
    assert said["figures"] == 3
    assert said["comparison"]["run1"] == pytest.approx(
        {
            "steps": 20,
            "reward first": 0.04,
            "reward last": 0.29,
            "eval/held_out/reward": 0.6,
            "largest gradient": 7.0,
            "seconds per step": 2.0,
            "tokens/s": 200.0,
        }
    )
    assert said["comparison"]["run0"]["reward last"] == pytest.approx(0.145)
