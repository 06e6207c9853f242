"""`format`: whether a completion has the form that was asked for."""

from __future__ import annotations

import re

from raygrpo.rewards.score import Score, shown


class Format:
    """1 when the whole completion matches `pattern`, else 0.

    pattern: a Python regular expression in which "." matches line breaks too, e.g.
    "<think>.*</think>\\s*<answer>.*</answer>\\s*".
    """

    def __init__(self, pattern: str):
        self._pattern = re.compile(pattern, re.DOTALL)

    def __call__(self, completion: str) -> Score:
        if self._pattern.fullmatch(completion) is not None:
            return Score(1, "it has the form asked for")
        return Score(0, f"it does not match {shown(self._pattern.pattern)} from beginning to end")
