"""What all sections of the configuration share: strictness, number types, and laying settings over one another."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
NonNegativeInt = Annotated[int, Field(ge=0)]

_LABEL = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL_KEY = re.compile(rf"([A-Za-z0-9.-]+/)?{_LABEL}")
_LABEL_VALUES = re.compile(rf"!?({_LABEL}|in\({_LABEL}(, ?{_LABEL})*\))")


def _label_selector(given: Any) -> Any:
    for key, values in given.items() if isinstance(given, dict) else ():
        if not _LABEL_KEY.fullmatch(str(key)):
            raise ValueError(f"{key!r} is no name of a label")
        if not isinstance(values, str) or not _LABEL_VALUES.fullmatch(values):
            raise ValueError(f"a label's value is selected by a, !a, in(a, b) or !in(a, b), not by {values!r}")
    return {} if given is None else given


LabelSelector = Annotated[dict[str, str], BeforeValidator(_label_selector)]
"""Labels of the nodes that may be used, as Ray's label selectors take them; null: any node."""


class Section(BaseModel):
    """Immutable; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key; anything else is replaced whole."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged
