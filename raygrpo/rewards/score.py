"""A reward that says why."""

from __future__ import annotations

MAX_SHOWN = 80  # characters of a completion or an answer within a rationale


class Score(float):
    """A number, so that rewards can be added up and compared, with `rationale`: what it was given for."""

    __slots__ = ("rationale",)
    rationale: str

    def __new__(cls, value: float, rationale: str = "") -> Score:
        score = super().__new__(cls, value)
        score.rationale = rationale
        return score


def shown(value: object) -> str:
    """A text in quotes, anything else as it is written; shortened, for a rationale."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
