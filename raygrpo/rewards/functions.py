"""What a reward function may look like, and finding it.

`use` in the configuration names a built-in reward, or `module:name` of

    a function    called once per completion; `args` are further keyword arguments
    a class       made once per scoring process with `args`; the instance is called once per completion. Expensive
    things (a model, a
                  connection) belong there
    an object     any other callable; as a function

each plain or `async`. It gets, by name, those of ARGUMENTS that its signature names (all, if it takes **kwargs), and
returns a number, or a pair of a number and a short text that says what it was given for: `return 0.5, "2 of 4 tests
pass"`. That text stands beside the reward in MLflow's traces. The built-in ones return a `Score`: a number that carries
such a text.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from raygrpo.imports import describe_exception, import_object, is_object_name

ARGUMENTS = {
    "completion": "text of the completion",
    "answer": "the dataset's reference answer",
    "prompt": "text of the prompt, as the chat template rendered it",
    "row": "the dataset's other columns, a dict",
    "finish_reason": "'stop' or 'length'",
}
BUILT_IN = {
    "exact_match": "raygrpo.rewards.exact_match:ExactMatch",
    "numeric_match": "raygrpo.rewards.numeric_match:NumericMatch",
    "format": "raygrpo.rewards.format:Format",
}


@dataclass(frozen=True, slots=True)
class RewardFunction:
    call: Callable[..., Any]  # takes the `arguments`, by name
    arguments: list[str]
    is_async: bool


def load_function(use: str, args: dict[str, Any]) -> RewardFunction:
    """Raises ValueError when there is no such function, or when it cannot be called with what there is to give."""
    if use not in BUILT_IN and not is_object_name(use):
        nearest = difflib.get_close_matches(use, BUILT_IN, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ValueError(f"unknown reward {use!r}: {hint}built in are {', '.join(BUILT_IN)}; your own is `module:name`")
    found = import_object(BUILT_IN.get(use, use))
    if not callable(found):
        raise ValueError(f"{use} is not callable: {type(found).__name__}")
    if inspect.isclass(found):
        found, args = _make(use, found, args), {}
    arguments = _arguments_to_give(use, found, args)
    is_async = inspect.iscoroutinefunction(found) or inspect.iscoroutinefunction(getattr(found, "__call__", None))  # noqa: B004
    return RewardFunction(functools.partial(found, **args), arguments, is_async)


def _make(use: str, cls: type, args: dict[str, Any]) -> Any:
    try:
        inspect.signature(cls).bind(**args)
    except TypeError as error:
        accepted = ", ".join(inspect.signature(cls).parameters) or "none"
        raise ValueError(f"{use}: args {args!r} do not fit, {error}; it accepts: {accepted}") from None
    try:
        instance = cls(**args)
    except Exception as error:
        raise ValueError(f"{use} could not be made with args {args!r}: {describe_exception(error)}") from error
    if not callable(instance):
        raise ValueError(f"{use} is a class without __call__: its instances cannot score a completion")
    return instance


def _arguments_to_give(use: str, function: Callable[..., Any], args: dict[str, Any]) -> list[str]:
    """Those of ARGUMENTS that the function names; refuses what could not be called."""
    available = ", ".join(f"{name} ({meaning})" for name, meaning in ARGUMENTS.items())
    if reserved := [name for name in args if name in ARGUMENTS]:
        raise ValueError(f"{use}: args may not set {', '.join(reserved)}, which every call gets from the rollout")
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise ValueError(
            f"{use} has no signature to read: wrap it in a Python function that names its arguments"
        ) from None
    kinds = inspect.Parameter
    takes_all = any(parameter.kind is kinds.VAR_KEYWORD for parameter in parameters.values())
    named = {
        name: parameter.default is kinds.empty
        for name, parameter in parameters.items()
        if parameter.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    }
    for name, parameter in parameters.items():
        if parameter.kind is kinds.POSITIONAL_ONLY and parameter.default is kinds.empty:
            raise ValueError(f"{use}: its parameter {name!r} is positional-only, but arguments are given by name")
    for name, is_required in named.items():
        if is_required and name not in ARGUMENTS and name not in args:
            raise ValueError(
                f"{use}: nothing gives its parameter {name!r}; available are {available}, and what args sets"
            )
    if not takes_all and (unknown := [name for name in args if name not in named]):
        raise ValueError(f"{use}: args sets {', '.join(unknown)}, but the function only has: {', '.join(named)}")
    return [name for name in ARGUMENTS if takes_all or name in named]
