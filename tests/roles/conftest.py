"""For pools of generators that are plain objects."""

from __future__ import annotations

import pytest

from raygrpo.roles import generator_pool


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generators are restarted and ended by a method of theirs, and come back at once."""
    monkeypatch.setattr(generator_pool, "REVIVAL_PAUSE_S", 0.001)
    monkeypatch.setattr(generator_pool, "restart_actor", lambda generator: generator.restart())
    monkeypatch.setattr(generator_pool, "end_actor", lambda generator: generator.end())
