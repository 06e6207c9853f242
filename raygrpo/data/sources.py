"""Rows of a dataset, each with the place it came from: JSON lines, Parquet, Hugging Face datasets, or the user's
function.

A row that cannot be read is yielded too, with an error instead of columns, so that whoever reads them decides what it
is worth. What concerns the source as a whole (no such file, no network) raises ValueError.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raygrpo.imports import describe_exception, import_object

if TYPE_CHECKING:
    from raygrpo.config import DataConfig


@dataclass(frozen=True, slots=True)
class SourceRow:
    where: str  # for messages: "train.jsonl:12", "train.parquet, row 11"
    columns: dict[str, Any]
    error: str = ""  # why there are no columns


def read_rows(config: DataConfig, import_paths: Sequence[str] = ()) -> Iterator[SourceRow]:
    """All rows of `config.source`, always in the same order; files of a glob in the order of their names."""
    source = config.source
    if config.source_kind == "files":
        for path in _matching_files(source):
            yield from _jsonl_rows(path) if path.endswith(".jsonl") else _parquet_rows(path)
    elif config.source_kind == "function":
        yield from _function_rows(source, config.args, import_paths)
    elif os.path.isfile(source) or glob.has_magic(source):
        raise ValueError(f"data.source {source!r}: files must be .jsonl (one JSON object a line) or .parquet")
    elif source.startswith(("/", "./", "../")) and not os.path.isdir(source):
        raise ValueError(f"data.source: there is no {source}")
    else:
        yield from _hub_rows(source, config.subset, config.split)


def _matching_files(pattern: str) -> list[str]:
    if os.path.isfile(pattern):  # first: a file's own name may hold brackets
        return [pattern]
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not paths:
        kind = "no file matches" if glob.has_magic(pattern) else "there is no file"
        raise ValueError(f"data.source: {kind} {pattern}")
    return paths


def _jsonl_rows(path: str) -> Iterator[SourceRow]:
    with open(path, "rb") as lines:  # in binary, only \n ends a line: U+2028 and the like may stand in a string
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                columns = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                yield SourceRow(where, {}, f"not UTF-8: {error.reason} at byte {error.start + 1} of the line")
                continue
            except json.JSONDecodeError as error:
                yield SourceRow(where, {}, f"malformed JSON: {error.msg} at column {error.colno}")
                continue
            except (ValueError, RecursionError) as error:  # a number with too many digits, too deep a nesting
                yield SourceRow(where, {}, f"malformed JSON: {error}")
                continue
            if isinstance(columns, dict):
                yield SourceRow(where, columns)
            else:
                yield SourceRow(where, {}, f"a row must be a JSON object, not {type(columns).__name__}")


def _parquet_rows(path: str) -> Iterator[SourceRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for columns in batch.to_pylist():
                    yield SourceRow(f"{path}, row {number}", columns)
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"cannot read {path} as Parquet: {error}") from error


def _hub_rows(name: str, subset: str | None, split: str) -> Iterator[SourceRow]:
    import datasets

    try:
        dataset = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # datasets raises many kinds; all mean that there is no data
        raise ValueError(
            f"cannot load the Hugging Face dataset {name!r} (data.subset {subset!r}, data.split {split!r}): {error}\n"
            "  A name is looked up on the hub, which needs network or a copy in the local cache (HF_HOME); "
            "a local file is named by a path that ends in .jsonl or .parquet."
        ) from error
    for number, columns in enumerate(dataset):
        yield SourceRow(f"{name} ({split}), row {number}", dict(columns))


def _function_rows(name: str, args: dict[str, Any], import_paths: Sequence[str]) -> Iterator[SourceRow]:
    function = import_object(name, import_paths)
    count = 0
    try:
        rows: Iterable[Any] = function(**args)
        for columns in rows:
            where = f"{name}, row {count}"
            count += 1
            if isinstance(columns, dict):
                yield SourceRow(where, columns)
            else:
                yield SourceRow(where, {}, f"a row must be a dict, not {type(columns).__name__}")
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in args.items())
        raise ValueError(
            f"data.source {name}({given}) failed after {count} rows: {describe_exception(error)}"
        ) from error
