"""The built-in rewards, value by value."""

import time
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygrpo.rewards.exact_match import ExactMatch
from raygrpo.rewards.format import Format
from raygrpo.rewards.numeric_match import NumericMatch, last_boxed, last_number


@pytest.mark.parametrize(
    ("args", "completion", "answer", "reward"),
    [
        ({}, " Paris\n", "Paris", 1),
        ({}, "paris", "Paris", 0),
        ({}, "", "Paris", 0),
        ({}, "", "", 1),
        ({"ignore_case": True}, "STRASSE", "straße", 1),
        ({"ignore_case": True}, "pariss", "Paris", 0),
        ({}, "b", ["a", "b"], 1),
        ({}, "c", ["a", "b"], 0),
        ({}, "3", 3, 1),
        ({}, "3.0", 3, 0),
        ({}, "true", True, 1),
        ({}, '{"a": "é"}', {"a": "é"}, 1),
        ({"extract": "<answer>(.*?)</answer>"}, "<answer>1</answer> no, <answer>\n2\n</answer>", "2", 1),
        ({"extract": "<answer>(.*?)</answer>"}, "2", "2", 0),
        ({"extract": r"\d+"}, "7 or 12.", "12", 1),
        ({"extract_answer": "#### (.*)"}, "72", "48 / 2 = 24\n#### 72", 1),
        ({"extract_answer": "#### (.*)"}, "24", "48 / 2 = 24\n#### 72", 0),
    ],
)
def test_exact_match(args, completion, answer, reward):
    assert ExactMatch(**args)(completion, answer) == reward


@pytest.mark.parametrize(
    ("reward", "completion", "answer", "rationale"),
    [
        (ExactMatch(), " Paris", "Paris", "'Paris' is right"),
        (ExactMatch(), "Rome", ["Paris", "Nice"], "got 'Rome', expected 'Paris' or another of 2 answers"),
        (ExactMatch(extract="#(.*)"), "Paris", "Paris", "nothing in it matches `extract`; expected 'Paris'"),
        (NumericMatch(), "so it is 42", 41, "extracted 42, expected 41"),
        (NumericMatch(tolerance=1), "so it is 42", 41, "extracted 42, which is right"),
        (NumericMatch(extract="boxed"), "42", 42, "no number where it should be ('boxed'); expected 42"),
        (NumericMatch(verifier="math_verify"), r"$\frac{1}{2}$", "0.5", "math-verify finds it equal to '0.5'"),
    ],
)
def test_a_built_in_reward_says_why(reward, completion, answer, rationale):
    assert reward(completion, answer).rationale == rationale


def test_what_a_rationale_shows_is_short():
    assert len(ExactMatch()("x" * 10_000, "y" * 10_000).rationale) < 200
    assert "does not match 'a+' from" in Format("a+")("b").rationale
    assert Format("a+")("aa").rationale == "it has the form asked for"


def test_exact_match_refuses_what_has_no_answer():
    for answer in (None, []):
        with pytest.raises(ValueError, match="no reference answer"):
            ExactMatch()("a", answer)
    with pytest.raises(ValueError, match="extract_answer finds nothing in the reference answer '72'"):
        ExactMatch(extract_answer="#### (.*)")("72", "72")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 42.", "42"),
        ("1, 2, 3", "3"),
        ("$1,234,567.50", "1234567.50"),
        ("1,2345", "2345"),
        ("-7", "-7"),
        ("\N{MINUS SIGN}7", "-7"),
        ("10-3", "3"),
        ("f(2)-3", "3"),
        ("= -3", "-3"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("+.5", "0.5"),
        ("1e3", "1000"),
        ("2.5E-3 m", "0.0025"),
        ("50%", "50"),
        ("x=7apples", "7"),
        ("3/4", "0.75"),
        ("-1 / 8", "-0.125"),
        ("7.", "7"),
        ("007", "7"),
        ("1/0", None),
        ("no number", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(),
    st.text(st.characters(exclude_categories=["Nd"], exclude_characters="-+/.,eE\N{MINUS SIGN}$€£"), max_size=20),
)
def test_every_integer_is_read_back_from_any_text(number, around):
    assert last_number(f"{around} {number} {around}") == number
    assert last_number(f"{around} {number:,} {around}") == number


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} and \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{a \boxed{b} c}", "b"),
        (r"\boxed{a} \boxed{b", "a"),
        (r"}} \boxed{a} {{", "a"),
        (r"\boxed{}", ""),
        (r"\boxed a}", None),
        ("", None),
    ],
)
def test_the_last_box_of_a_text(text, content):
    assert last_boxed(text) == content


@settings(max_examples=40, deadline=None)
@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12, places=6))
def test_every_decimal_is_read_back(number):
    assert last_number(f"x = {number:f}") == number


@pytest.mark.parametrize(
    ("args", "completion", "answer", "reward"),
    [
        ({}, "so 72", "48/2 = <<48/2=24>>24\n#### 72", 1),
        ({}, "so 24", "48/2 = <<48/2=24>>24\n#### 72", 0),
        ({}, "0.1", 0.1, 1),
        ({}, "0.30000000000000004", 0.3, 0),
        ({}, "9007199254740993", 9007199254740993, 1),
        ({}, "9007199254740992", 9007199254740993, 0),
        ({}, "5.0", 5, 1),
        ({}, "five", 5, 0),
        ({}, "5", [4, "5"], 1),
        ({"tolerance": 0.01}, "3.14", 3.14159, 1),
        ({"tolerance": 0.001}, "3.14", 3.14159, 0),
        ({"tolerance": 0.5}, "1.5", 1, 1),
        ({"relative_tolerance": 0.01}, "101", 100, 1),
        ({"relative_tolerance": 0.01}, "102", 100, 0),
        ({"relative_tolerance": 0.01}, "-101", -100, 1),
        ({"tolerance": 1}, "1e999999", 5, 0),
        ({"extract": "boxed"}, r"\boxed{3} so \boxed{1{,}234}", 1234, 1),
        ({"extract": "boxed"}, r"\boxed{\$5\%}", 5, 1),
        ({"extract": "boxed"}, r"\boxed{\frac{3}{4}}", 4, 0),
        ({"extract": "boxed"}, r"\boxed{x = 4}", 4, 0),
        ({"extract": "boxed"}, r"\boxed{4", 4, 0),
        ({"extract": "boxed"}, "4", 4, 0),
        ({"extract": "boxed"}, r"\boxed{5} \boxed{4", 5, 1),
        ({"extract": "boxed"}, r"} \boxed{\boxed{4}} {", 4, 1),
        ({"extract": "boxed"}, r"\boxed{3/4}", r"it is \boxed{0.75}", 1),
        ({"extract": "Answer: (.*)"}, "Answer: 1\nAnswer: about 12 apples", 12, 1),
        ({"extract": "Answer: (.*)"}, "12", 12, 0),
    ],
)
def test_numeric_match(args, completion, answer, reward):
    assert NumericMatch(**args)(completion, answer) == reward


@pytest.mark.parametrize("answer", [True, "none", r"\frac{3}{4}", float("nan"), {"a": 1}])
def test_numeric_match_refuses_answers_that_are_no_numbers(answer):
    with pytest.raises(ValueError, match="is no number"):
        NumericMatch()("1", answer)


def test_numeric_match_refuses_settings_without_effect():
    for args in ({"tolerance": -1}, {"verifier": "sympy"}, {"verifier": "math_verify", "tolerance": 0.1}):
        with pytest.raises(ValueError, match=r"tolerance|verifier"):
            NumericMatch(**args)


@pytest.mark.parametrize("text", ["9" * 200_000, "1," * 100_000, "1,234" * 40_000, "1/" * 100_000, "$-" * 100_000])
def test_numbers_are_found_in_linear_time(text):
    start = time.process_time()
    last_number(text)
    last_boxed(r"\boxed{" * 50_000 + text)
    assert time.process_time() - start < 10  # a second where it is linear, hours where it is not


@pytest.mark.parametrize(
    ("args", "completion", "answer", "reward"),
    [
        ({}, r"so $\frac{3}{4}$", "0.75", 1),
        ({}, r"\boxed{\frac{6}{8}}", r"\frac{3}{4}", 1),
        ({}, r"\boxed{\frac{6}{7}}", r"\frac{3}{4}", 0),
        ({}, r"$x^2 + 2x + 1$", r"$(x+1)^2$", 1),
        ({}, "nothing", 3, 0),
        ({}, r"\boxed{4}", [3, 4], 1),
        ({"extract": "Answer: (.*)"}, r"Answer: \sqrt{16}", 4, 1),
        ({"extract": "Answer: (.*)"}, r"\sqrt{16}", 4, 0),
    ],
)
def test_math_verify_compares_formulas(args, completion, answer, reward):
    pytest.importorskip("math_verify")
    assert NumericMatch(verifier="math_verify", **args)(completion, answer) == reward


def test_math_verify_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"pip install 'raygrpo\[math\]'"):
        NumericMatch(verifier="math_verify")


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think>a\nb</think>\n<answer>1</answer>", 1),
        ("<think></think><answer></answer>", 1),
        ("x<think></think><answer></answer>", 0),
        ("<think></think><answer></answer>x", 0),
        ("", 0),
    ],
)
def test_format_matches_the_whole_completion(completion, reward):
    assert Format(r"<think>.*</think>\s*<answer>.*</answer>")(completion) == reward
