"""What a reward function may look like, and what is said of those that cannot be called."""

import asyncio
import sys

import pytest

from raygrpo.rewards.functions import ARGUMENTS, load_function

MODULE = """
import functools, os

def some(answer, completion): return 1
def everything(**kwargs): return len(kwargs)
def with_settings(completion, *, scale, offset=1): return scale
def unknown(completion, ground_truth): return 1
def positional(completion, /): return 1
def optional(completion, answer=None, *rest): return 1
async def judge(completion): return 1
half = functools.partial(with_settings, scale=2)
number = 5

class Stateful:
    def __init__(self, size=3):
        self.size = size
    def __call__(self, completion, row): return self.size

class AsyncJudge:
    async def __call__(self, completion): return 1

class Broken:
    def __init__(self): raise KeyError("no key")

class NotCallable: pass

class Namespace:
    @staticmethod
    def inner(completion): return 1
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("import json\njson.loads('{')\n")
    (tmp_path / "needs_rewards.py").write_text("import package_that_is_missing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_rewards", None)


@pytest.mark.parametrize(
    ("use", "args", "arguments", "is_async"),
    [
        ("my_rewards:some", {}, ["completion", "answer"], False),
        ("my_rewards:everything", {"x": 1}, list(ARGUMENTS), False),
        ("my_rewards:with_settings", {"scale": 2}, ["completion"], False),
        ("my_rewards:half", {}, ["completion"], False),
        ("my_rewards:optional", {}, ["completion", "answer"], False),
        ("my_rewards:Stateful", {"size": 7}, ["completion", "row"], False),
        ("my_rewards:Namespace.inner", {}, ["completion"], False),
        ("my_rewards:judge", {}, ["completion"], True),
        ("my_rewards:AsyncJudge", {}, ["completion"], True),
        ("exact_match", {"ignore_case": True}, ["completion", "answer"], False),
        ("numeric_match", {}, ["completion", "answer"], False),
        ("format", {"pattern": ".*"}, ["completion"], False),
    ],
)
def test_functions_get_the_arguments_that_they_name(use, args, arguments, is_async):
    function = load_function(use, args)
    assert function.arguments == arguments and function.is_async == is_async


def test_args_reach_functions_and_classes():
    assert load_function("my_rewards:with_settings", {"scale": 2.5}).call(completion="") == 2.5
    assert load_function("my_rewards:Stateful", {"size": 7}).call(completion="", row={}) == 7
    assert load_function("my_rewards:everything", {"x": 1}).call(**dict.fromkeys(ARGUMENTS)) == len(ARGUMENTS) + 1
    assert asyncio.run(load_function("my_rewards:judge", {}).call(completion="")) == 1


@pytest.mark.parametrize(
    ("use", "args", "message"),
    [
        ("exact_mach", {}, r"unknown reward 'exact_mach': did you mean 'exact_match'\? built in are"),
        ("format", {}, r"format: args {} do not fit, missing a required argument: 'pattern'; it accepts: pattern"),
        ("format", {"pattern": "("}, r"format could not be made with args .*unterminated subpattern"),
        (
            "exact_match",
            {"ignorecase": True},
            r"got an unexpected keyword argument 'ignorecase'; it accepts: ignore_case",
        ),
        ("my_rewards:unknown", {}, r"nothing gives its parameter 'ground_truth'; available are completion \(.*row"),
        ("my_rewards:with_settings", {}, r"nothing gives its parameter 'scale'"),
        ("my_rewards:some", {"scal": 1}, r"args sets scal, but the function only has: answer, completion"),
        ("my_rewards:everything", {"row": 1}, r"args may not set row"),
        ("my_rewards:positional", {}, r"its parameter 'completion' is positional-only"),
        ("my_rewards:number", {}, r"is not callable: int"),
        ("my_rewards:NotCallable", {}, r"without __call__"),
        ("my_rewards:Broken", {}, r"could not be made with args {}: KeyError: 'no key' \(.*my_rewards.py:23\)"),
        ("my_rewards:somme", {}, r"my_rewards has no 'somme'; did you mean 'some'\?"),
        ("my_reward:some", {}, r"there is no module 'my_reward'; searched first: "),
        ("broken_rewards:f", {}, r"importing broken_rewards for .* failed: JSONDecodeError"),
        (
            "needs_rewards:f",
            {},
            r"importing needs_rewards for .* failed: ModuleNotFoundError: No module named 'package_that",
        ),
    ],
)
def test_what_cannot_be_called_is_explained(use, args, message):
    with pytest.raises(ValueError, match=message):
        load_function(use, args)
