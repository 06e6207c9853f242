"""`exact_match`: whether a completion is the reference answer, word for word."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from raygrpo.rewards.score import Score, shown


class ExactMatch:
    """1 when the completion equals the answer, else 0. White space at both ends does not count.

    ignore_case: compare without regard to upper and lower case.
    extract: a regular expression; its last match in the completion is compared instead (its first group, if it has
    one), and without a match the reward is 0. "." matches line breaks too. extract_answer: the same for the reference
    answer, where a match is required.

    An answer that is a list names several right ones. Other answers that are no text are compared in their JSON form.
    """

    def __init__(self, *, ignore_case: bool = False, extract: str | None = None, extract_answer: str | None = None):
        self._ignore_case = ignore_case
        self._extract = None if extract is None else re.compile(extract, re.DOTALL)
        self._extract_answer = None if extract_answer is None else re.compile(extract_answer, re.DOTALL)

    def __call__(self, completion: str, answer: Any) -> Score:
        if answer is None or answer == []:
            raise ValueError("the prompt has no reference answer")
        found = last_match(self._extract, completion)
        expected = [self._normal(text) for text in self._texts(answer)]
        if found is None:
            return Score(0, f"nothing in it matches `extract`; expected {one_of(expected)}")
        found = self._normal(found)
        if found in expected:
            return Score(1, f"{shown(found)} is right")
        return Score(0, f"got {shown(found)}, expected {one_of(expected)}")

    def _texts(self, answer: Any) -> list[str]:
        texts = []
        for value in answer if isinstance(answer, list) else [answer]:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            found = last_match(self._extract_answer, text)
            if found is None:
                raise ValueError(f"extract_answer finds nothing in the reference answer {text[:200]!r}")
            texts.append(found)
        return texts

    def _normal(self, text: str) -> str:
        text = text.strip()
        return text.casefold() if self._ignore_case else text


def one_of(values: Sequence[Any]) -> str:
    """For a rationale: one value, or the first of several."""
    return shown(values[0]) + (f" or another of {len(values)} answers" if len(values) > 1 else "")


def last_match(pattern: re.Pattern[str] | None, text: str) -> str | None:
    """The last match in the text (its first group, if the pattern has one); the text itself without a pattern."""
    if pattern is None:
        return text
    found = None
    for match in pattern.finditer(text):
        found = match.group(1 if pattern.groups else 0)
    return found
