"""cluster/grafana/raygrpo.json is a dashboard that Grafana loads, of figures that a run exports."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from raygrpo.gauges import FIGURES

DASHBOARD = json.loads((Path(__file__).parents[1] / "cluster" / "grafana" / "raygrpo.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
BY_NAME = {figure.exported_name: figure for figure in FIGURES}


def expressions() -> list[tuple[str, str, str]]:
    """(title of the panel, expression, legend)."""
    return [(panel["title"], t["expr"], t["legendFormat"]) for panel in PANELS for t in panel["targets"]]


def test_names_of_figures_are_valid_and_distinct():
    assert len(BY_NAME) == len(FIGURES)
    for figure in FIGURES:
        assert re.fullmatch(r"raygrpo_[a-z_]+", figure.name)
        assert not figure.name.endswith("_total"), "Ray adds that to a counter"
        assert figure.description and figure.unit and "run" not in figure.tags


def test_every_figure_is_shown_and_nothing_else_is_asked_for():
    asked = {name for _, expression, _ in expressions() for name in re.findall(r"\bray_\w+", expression)}
    assert asked == set(BY_NAME)


@pytest.mark.parametrize(("title", "expression", "legend"), expressions())
def test_an_expression_is_of_the_chosen_run_and_knows_its_figures_tags(title, expression, legend):
    match = re.fullmatch(r"(?:max|sum)(?: by \(([\w, ]+)\) )?\((.+)\)", expression)
    assert match, expression
    by = set(match[1].split(", ")) if match[1] else set()
    [(name, selector)] = re.findall(r"(ray_\w+)\{([^}]*)\}", match[2])
    assert selector == 'run="$run"'
    assert by <= set(BY_NAME[name].tags)
    assert set(re.findall(r"\{\{(\w+)\}\}", legend)) == by, "every line of the panel can be told apart"
    assert match[2].startswith("rate(") == (BY_NAME[name].kind == "counter")


def test_panels_do_not_overlap_and_fit_the_grid():
    boxes = [(panel["title"], panel["gridPos"]) for panel in DASHBOARD["panels"]]
    for title, box in boxes:
        assert box["x"] >= 0 and box["x"] + box["w"] <= 24 and box["h"] > 0, title
    for (one, a), (other, b) in combinations(boxes, 2):
        apart = (
            a["x"] + a["w"] <= b["x"]
            or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"]
            or b["y"] + b["h"] <= a["y"]
        )
        assert apart, (one, other)


def test_it_is_what_grafana_imports():
    assert DASHBOARD["schemaVersion"] >= 36 and DASHBOARD["title"] and DASHBOARD["uid"]
    assert "__inputs" not in DASHBOARD, "a file that is provisioned gets no answers"
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    name = re.fullmatch(r"label_values\((\w+), run\)", variables["run"]["query"]["query"])
    assert name and name[1] in BY_NAME
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert variables["run"]["datasource"] == source
    for panel in PANELS:
        assert panel["datasource"] == source and all(target["datasource"] == source for target in panel["targets"])
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Learning", "Stability", "Speed", "Generators", "Faults"]
