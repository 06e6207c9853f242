"""Reading a run's YAML with command-line overrides into a RunConfig, and saying what is wrong with it.

`load_config` is what others need (jobs/ also asks where the paths of evaluation sets stand). What a setting means and
which values it takes is config.py's.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from raygrpo.config import RunConfig
from raygrpo.eval_config import ONLY_SET
from raygrpo.section import Section, merge


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a run's YAML, apply `key.subkey=value` overrides (values are YAML) and validate the whole.

    Relative paths of model and data are meant from the YAML's directory in the file, from the current directory in an
    override. Raises ValueError with one line for each problem; an unknown key names the nearest known one.
    """
    tree = _read_tree(Path(path), overrides or [])
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ValueError(f"{path}:\n" + "\n".join(_explain(problem) for problem in error.errors())) from None


def eval_source_keys(path: str | Path, overrides: list[str]) -> dict[str, str]:
    """By evaluation set, the key of its data's source: a single set's settings may stand in `eval` itself."""
    sets = _mapping(_mapping(_read_tree(Path(path), overrides), "eval"), "sets")
    return {name: f"eval.sets.{name}.data.source" for name in sets} or {ONLY_SET: "eval.data.source"}


def _read_tree(path: Path, overrides: list[str]) -> dict[str, Any]:
    """The settings as they are given, paths absolute, before validation."""
    try:
        tree = _parse_yaml(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read the configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read the configuration {path}: it is no text ({error})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold a mapping of settings, not {type(tree).__name__}")
    if isinstance(tree.get("algorithm"), str):  # short for its preset, beside which an override may set fields
        tree["algorithm"] = {"preset": tree["algorithm"]}
    _resolve_paths(tree, path.parent)
    overridden: dict[str, Any] = {}
    for override in overrides:
        _set_override(overridden, override)
    _resolve_paths(overridden, Path.cwd())
    return {"name": path.stem} | merge(tree, overridden)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: PyYAML takes 1e-5 for a text, which options that are passed through would keep."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _set_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"an override is key=value, for example seed=1 or learner.optimizer.lr=1e-5; got {override!r}")
    try:
        value = _parse_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"the value in {override!r} is not valid YAML: {error}") from None
    key = "algorithm.preset" if key == "algorithm" and isinstance(value, str) else key
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ValueError(f"{override!r} sets a key inside {parent!r}, which another override set to {tree!r}")
    tree[leaf] = value


def _resolve_paths(tree: dict[str, Any], directory: Path) -> None:
    """Make local paths absolute, in place. A name that is no path here (hub name, module:function) stays as it is."""
    evaluation = _mapping(tree, "eval")
    sets = _mapping(evaluation, "sets")
    sources = [_mapping(holder, "data") for holder in (tree, evaluation, *(_mapping(sets, name) for name in sets))]
    for section, key in [(_mapping(tree, "model"), "path"), *((data, "source") for data in sources)]:
        value = section.get(key)
        if not isinstance(value, str):
            continue
        expanded = Path(value).expanduser()
        local = value.startswith(("./", "../", "/", "~")) or value.endswith((".jsonl", ".parquet"))
        if local or (directory / expanded).exists():
            section[key] = os.path.normpath((directory / expanded).absolute())


def _mapping(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """The mapping at this key; an empty one where there is none."""
    value = tree.get(key)
    return value if isinstance(value, dict) else {}


def _explain(problem: Any) -> str:
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        *parents, unknown = problem["loc"]
        known = _keys_at(parents)
        nearest = difflib.get_close_matches(str(unknown), known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known here: {', '.join(known)}"
        return f"  unknown key {location!r}: {hint}"
    if problem["type"] == "missing":
        return f"  missing key {location!r}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"  {location}: {message} (got {problem['input']!r})" if problem["type"] != "value_error" else f"  {message}"


def _keys_at(location: list[Any]) -> list[str]:
    """The known keys of the section at this place of the tree."""
    section: Any = RunConfig
    for part in location:
        if part not in section.model_fields:  # place in a list, or a name of the user's choice
            continue
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *_arguments(annotation)]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), section)
    return list(section.model_fields)


def _arguments(annotation: Any) -> list[Any]:
    """What a generic type is made of, at any depth."""
    return [inner for outer in getattr(annotation, "__args__", ()) for inner in (outer, *_arguments(outer))]
