"""Finding the user's Python: `module:name` from a configuration -> the object it names."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any


def is_object_name(text: str) -> bool:
    """Whether the text has the form `module:name` (both may have dots)."""
    return re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w.]*", text) is not None


def import_object(name: str, import_paths: Sequence[str] = ()) -> Any:
    """The object that `module:name` names.

    import_paths: directories searched before the others. They stay on `sys.path`, because the module may import its
    neighbours later. Raises ValueError that says which half was not found, or where in the user's module the import
    failed.
    """
    module_name, _, attribute = name.partition(":")
    sys.path[:0] = [path for path in import_paths if path not in sys.path]
    importlib.invalidate_caches()
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(f"importing {module_name} for {name!r} failed: {describe_exception(error)}") from error
        searched = ", ".join(path or "the current directory" for path in sys.path[:4])
        raise ValueError(f"{name!r}: there is no module {error.name!r}; searched first: {searched}") from None
    except Exception as error:
        raise ValueError(f"importing {module_name} for {name!r} failed: {describe_exception(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            nearest = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"{name!r}: {module_name} has no {part!r}{hint}")
        found = getattr(found, part)
    return found


def describe_exception(error: BaseException) -> str:
    """One line: type, message, and the innermost line of Python that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' * bool(message)}{message[:1000]}{place}"
