"""`format`: whether a completion has the form that was asked for."""

from __future__ import annotations

import re


class Format:
    """1 when the whole completion matches `pattern`, else 0.

    pattern: a Python regular expression in which "." matches line breaks too, e.g.
    "<think>.*</think>\\s*<answer>.*</answer>\\s*".
    """

    def __init__(self, pattern: str):
        self._pattern = re.compile(pattern, re.DOTALL)

    def __call__(self, completion: str) -> float:
        return float(self._pattern.fullmatch(completion) is not None)
