"""`numeric_match`: whether a completion arrives at the right number.

Numbers are compared as decimals, not as binary fractions: 0.1 is 0.1, and large integers keep their last digits.
Understood are signs, thousands commas, decimal points, exponents, a currency sign in front, and fractions such as 3/4.
Whether two formulas mean the same is for `verifier: math_verify`.
"""

from __future__ import annotations

import re
from decimal import Context, Decimal
from typing import Any, Literal

from raygrpo.rewards.exact_match import last_match, one_of
from raygrpo.rewards.score import Score, shown

_ARITHMETIC = Context(prec=60, traps=[])  # what cannot be computed becomes NaN or infinity
_UNSIGNED = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,6}(?!\d))?"
_NUMBER = re.compile(rf"((?<![\w)])[-+])?[$€£]?({_UNSIGNED})(?:\s?/\s?({_UNSIGNED}))?")
_BRACES = re.compile(r"\\boxed\{|\\.|[{}]", re.DOTALL)
_DECORATION = re.compile(r"\\[,!;: ]|\\?[%$]|(?<=\d)\{(?=,)|(?<=,)\}(?=\d)")  # of a number in LaTeX


class NumericMatch:
    r"""1 when the completion's number equals the answer's, else 0 (also when there is no number).

    extract: where the number is. "last" takes the last one in the completion; "boxed" the content of the last \boxed{},
    which must be a number and nothing else; anything else is a regular expression, and the last number in its last
    match counts (in its first group, if it has one). tolerance, relative_tolerance: a difference up to `tolerance`, or
    up to this share of the answer, counts as equal. verifier: "math_verify" compares formulas with the math-verify
    package instead; "boxed" and "last" are then left to it.

    An answer may be a number or a text; of a text, the last number counts. An answer that is a list names several right
    ones.
    """

    def __init__(
        self,
        *,
        extract: str = "last",
        tolerance: float = 0.0,
        relative_tolerance: float = 0.0,
        verifier: Literal["decimal", "math_verify"] = "decimal",
    ):
        if not (tolerance >= 0 and relative_tolerance >= 0):
            raise ValueError(f"tolerances must not be negative, got {tolerance} and {relative_tolerance}")
        if verifier not in ("decimal", "math_verify"):
            raise ValueError(f"verifier must be decimal or math_verify, got {verifier!r}")
        if verifier == "math_verify" and (tolerance or relative_tolerance):
            raise ValueError(f"tolerances ({tolerance}, {relative_tolerance}) have no meaning for verifier math_verify")
        self._extract = extract
        self._pattern = None if extract in ("last", "boxed") else re.compile(extract, re.DOTALL)
        self._tolerance = Decimal(repr(tolerance))
        self._relative_tolerance = Decimal(repr(relative_tolerance))
        self._math_verify: Any = _import_math_verify() if verifier == "math_verify" else None

    def __call__(self, completion: str, answer: Any) -> Score:
        answers = answer if isinstance(answer, list) else [answer]
        if answer is None or not answers:
            raise ValueError("the prompt has no reference answer")
        if self._math_verify is not None:
            right = any([self._means(completion, value) for value in answers])
            return Score(right, f"math-verify finds it {'' if right else 'not '}equal to {one_of(answers)}")
        expected = [_answer_number(value) for value in answers]
        found = self._number(completion)
        if found is None:
            return Score(0, f"no number where it should be ({shown(self._extract)}); expected {one_of(expected)}")
        if any([self._equal(found, value) for value in expected]):
            return Score(1, f"extracted {shown(found)}, which is right")
        return Score(0, f"extracted {shown(found)}, expected {one_of(expected)}")

    def _number(self, completion: str) -> Decimal | None:
        if self._extract == "boxed":
            return _whole_number(last_boxed(completion))
        return last_number(last_match(self._pattern, completion))

    def _equal(self, found: Decimal, expected: Decimal) -> bool:
        allowed = max(self._tolerance, _ARITHMETIC.multiply(self._relative_tolerance, expected.copy_abs()))
        return found == expected or _ARITHMETIC.subtract(found, expected).copy_abs() <= allowed

    def _means(self, completion: str, answer: Any) -> bool:
        text = str(answer)
        if "$" not in text and r"\boxed" not in text:
            text = f"${text}$"  # math-verify reads formulas only where LaTeX has them
        if self._pattern is not None:
            extracted = last_match(self._pattern, completion)
            completion = "" if extracted is None else f"${extracted.strip().strip('$')}$"
        # their timeouts use signal.alarm; ours is the process's deadline
        expected = self._math_verify.parse(text, parsing_timeout=None)
        if not expected:
            raise ValueError(f"math-verify cannot read the reference answer {str(answer)[:200]!r}")
        return self._math_verify.verify(
            expected, self._math_verify.parse(completion, parsing_timeout=None), timeout_seconds=None
        )


def last_number(text: str | None) -> Decimal | None:
    """The last number in the text; None when there is none."""
    matches = list(_NUMBER.finditer((text or "").replace("\N{MINUS SIGN}", "-")))
    return _value(matches[-1]) if matches else None


def last_boxed(text: str) -> str | None:
    r"""The content of the \boxed{...} that opens last, of those whose braces are balanced.

    One pass over the text: a policy caught in a loop writes thousands of them.
    """
    open_braces: list[int | None] = []  # where the content of a box starts, or None for any other brace
    boxes = []
    for match in _BRACES.finditer(text):
        if match.group() == "}" and open_braces:
            start = open_braces.pop()
            if start is not None:
                boxes.append((start, match.start()))
        elif match.group().endswith("{") and match.group() != r"\{":
            open_braces.append(match.end() if match.group() != "{" else None)
    return text[slice(*max(boxes))] if boxes else None


def _whole_number(text: str | None) -> Decimal | None:
    match = _NUMBER.fullmatch(_DECORATION.sub("", text or "").replace("\N{MINUS SIGN}", "-").strip())
    return None if match is None else _value(match)


def _value(match: re.Match[str]) -> Decimal | None:
    sign, numerator, denominator = match.groups()
    value = Decimal(numerator.replace(",", ""))
    if denominator is not None:
        value = _ARITHMETIC.divide(value, Decimal(denominator.replace(",", "")))
    if not value.is_finite():
        return None
    return value.copy_negate() if sign == "-" else value  # -value would round


def _answer_number(answer: Any) -> Decimal:
    number = None
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        number = Decimal(repr(answer))
    elif isinstance(answer, str) and r"\boxed{" in answer:
        number = _whole_number(last_boxed(answer))
    elif isinstance(answer, str) and "\\" not in answer:
        number = last_number(answer)
    if number is None or not number.is_finite():
        hint = "; for LaTeX set args: {verifier: math_verify}" if "\\" in str(answer) else ""
        raise ValueError(f"the reference answer {str(answer)[:200]!r} is no number{hint}")
    return number


def _import_math_verify() -> Any:
    try:
        import math_verify
    except ImportError as error:
        raise ValueError(f"verifier math_verify needs `pip install 'raygrpo[math]'`: {error}") from None
    return math_verify
