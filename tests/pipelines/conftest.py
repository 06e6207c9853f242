from __future__ import annotations

from pathlib import Path

import pytest

PIPELINES = Path(__file__).parents[2] / "pipelines"


@pytest.fixture(autouse=True)
def _pipelines_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Task modules are found as a run finds them: beside its YAML."""
    monkeypatch.syspath_prepend(str(PIPELINES))
