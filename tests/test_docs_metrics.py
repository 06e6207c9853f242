"""docs/metrics.md explains every metric that the code names."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
FAMILIES = "reward|policy|completions|prompts|sampling|staleness|prefix|timing_s|perf|faults|weights|checkpoint"


def documented() -> set[str]:
    """Names in the first cells of the tables; `family/a`, `b` means family/a and family/b."""
    names = set()
    for line in (REPOSITORY / "docs" / "metrics.md").read_text().splitlines():
        if not line.startswith("| `"):
            continue
        family = ""
        for name in re.findall(r"`([^`]+)`", line.split("|")[1]):
            family = name.rpartition("/")[0] or family
            names.add(name if "/" in name else f"{family}/{name}")
    return names


def test_every_metric_in_the_code_is_documented() -> None:
    in_code = set()
    for path in (REPOSITORY / "raygrpo").rglob("*.py"):
        in_code |= set(re.findall(rf'"((?:{FAMILIES})/[a-z_0-9]+)"', path.read_text()))
    assert len(in_code) > 40
    internal = {"sampling/is_ratio_square_mean"}  # becomes effective_sample_size
    known = documented()
    missing = {name for name in in_code - internal if not any(other.startswith(name) for other in known)}
    assert not missing, f"say in docs/metrics.md what these mean: {sorted(missing)}"
