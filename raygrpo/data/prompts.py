"""Rows -> checked and tokenised prompts. Every row is checked before the run starts.

A text becomes the tokens of tokenizer(text), the special tokens that it adds by itself (BOS) included. What a chat
template wrote is tokenised as it is: the template writes its own special tokens, and a second BOS would be an error.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from raygrpo.data.order import prompt_index
from raygrpo.data.render import BadRow, render_prompt
from raygrpo.data.sources import SourceRow, read_rows
from raygrpo.types import Prompt

pc: Any = pyarrow.compute  # its functions are made at import, unseen by type checkers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from raygrpo.config import DataConfig

NUM_EXAMPLES = 10  # of dropped rows that a report or an error quotes
BATCH_ROWS = 1024  # tokenised at a time

PROMPT_SET_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.int64()),
        ("prompt_ids", pa.large_list(pa.int32())),
        ("text", pa.large_string()),
        ("answer", pa.large_string()),  # JSON
        ("row", pa.large_string()),  # JSON
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What became of the rows of a source."""

    source: str
    num_rows: int
    dropped: dict[str, int]  # reason ("invalid", "overlong") -> rows left out
    examples: list[str]  # the first of them: "place: what is wrong"
    columns_left_out: dict[str, str]  # column with values that are no JSON -> their type; not in Prompt.row

    def __str__(self) -> str:
        num_prompts = self.num_rows - sum(self.dropped.values())
        lines = [f"{self.source}: {num_prompts} prompts from {self.num_rows} rows"]
        lines += [f"  {count} {reason} rows dropped" for reason, count in self.dropped.items()]
        lines += [f"    {example}" for example in self.examples]
        lines += [f"  column {name!r} ({kind}) is left out" for name, kind in self.columns_left_out.items()]
        return "\n".join(lines)


class PromptSet(Sequence[Prompt]):
    """All prompts of a run, in the order of their source; one Arrow table, so that it is small and cheap to send."""

    def __init__(self, table: pa.Table, report: DataReport, *, shuffle: bool):
        self.table = table  # PROMPT_SET_SCHEMA
        self.report = report
        self.shuffle = shuffle

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> Prompt:
        if not -len(self) <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        row = self.table.slice(index % len(self), 1).to_pylist()[0]
        return Prompt(**row | {"answer": json.loads(row["answer"]), "row": json.loads(row["row"])})

    def at(self, ticket: int, seed: int, *, replacement: int = 0) -> Prompt:
        """The prompt that a ticket of a run stands for; replacement k > 0: its k-th other one (see `prompt_index`)."""
        return self[prompt_index(ticket, len(self), seed=seed, shuffle=self.shuffle, replacement=replacement)]

    @property
    def num_prompt_tokens(self) -> np.ndarray:
        """[number of prompts] tokens of each."""
        return pc.list_value_length(self.table["prompt_ids"]).to_numpy()

    @property
    def digest(self) -> str:
        """Of everything that makes the prompts: a ticket means the same only as long as this is the same."""
        state = blake2b(digest_size=16)
        state.update(self.table["prompt_id"].to_numpy().tobytes())
        state.update(self.num_prompt_tokens.tobytes())
        state.update(pc.list_flatten(self.table["prompt_ids"]).to_numpy().tobytes())
        for name in ("text", "answer", "row"):
            state.update(pc.binary_length(self.table[name]).to_numpy().tobytes())
            state.update("".join(self.table[name].to_pylist()).encode())
        return state.hexdigest()


def load_prompts(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    import_paths: Sequence[str] = (),
) -> PromptSet:
    """Read, render, check and tokenise all rows.

    max_prompt_tokens: the longest prompt accepted. import_paths: where to look for the module of a `module:function`
    source. Raises ValueError when the source cannot be read, when a row is bad and the configuration does not say to
    drop it (naming file and line of the first ones), or when no prompt is left.
    """
    if max_prompt_tokens < 1:
        raise ValueError(
            f"prompts may have {max_prompt_tokens} tokens: the completions leave them no room in the model's context"
        )
    checks = _Checks(config, max_prompt_tokens)
    rendered = _render_rows(islice(read_rows(config, import_paths), config.max_rows), config, tokenizer, checks)
    batches = []
    while batch := list(islice(rendered, BATCH_ROWS)):
        batches.append(_tokenise(batch, tokenizer, checks))
    checks.stop_if_fatal()
    table = pa.Table.from_batches(batches, PROMPT_SET_SCHEMA).combine_chunks()
    if not table.num_rows:
        raise ValueError(f"no prompt is left to train on.\n{checks.report()}")
    return PromptSet(table, checks.report(), shuffle=config.shuffle)


class _Checks:
    """Counts the rows, collects what is wrong with them, and ends the load where the configuration asks for that."""

    def __init__(self, config: DataConfig, max_prompt_tokens: int):
        self.max_prompt_tokens = max_prompt_tokens
        self.num_rows = 0
        self.columns_left_out: dict[str, str] = {}
        self._source = config.source
        self._policy = {"invalid": config.invalid_rows, "overlong": config.overlong_prompts}
        self._dropped: Counter[str] = Counter()
        self._examples: list[str] = []
        self._fatal: dict[str, list[str]] = {}

    def reject(self, reason: str, where: str, problem: str) -> None:
        """reason: "invalid" or "overlong"."""
        if self._policy[reason] == "error":
            self._fatal.setdefault(reason, []).append(f"{where}: {problem}")
            if sum(map(len, self._fatal.values())) >= NUM_EXAMPLES:
                self.stop_if_fatal()
            return
        self._dropped[reason] += 1
        if len(self._examples) < NUM_EXAMPLES:
            self._examples.append(f"{where}: {problem}")

    def stop_if_fatal(self) -> None:
        if not self._fatal:
            return
        settings = {"invalid": "data.invalid_rows=drop", "overlong": "data.overlong_prompts=drop"}
        ways_out = " and ".join(settings[reason] for reason in self._fatal)
        lines = [line for found in self._fatal.values() for line in found]
        raise ValueError(
            "\n  ".join(["bad rows in the data:", *lines, f"({ways_out} leaves such rows out and counts them)"])
        )

    def report(self) -> DataReport:
        return DataReport(
            source=self._source,
            num_rows=self.num_rows,
            dropped=dict(self._dropped),
            examples=list(self._examples),
            columns_left_out=dict(self.columns_left_out),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _RenderedRow:
    prompt_id: int
    where: str
    text: str
    is_chat: bool
    answer: str  # JSON
    row: str  # JSON


def _render_rows(
    rows: Iterable[SourceRow], config: DataConfig, tokenizer: PreTrainedTokenizerBase, checks: _Checks
) -> Iterator[_RenderedRow]:
    for prompt_id, row in enumerate(rows):
        checks.num_rows += 1
        try:
            yield _render_row(prompt_id, row, config, tokenizer, checks)
        except BadRow as problem:
            checks.reject("invalid", row.where, str(problem))


def _render_row(
    prompt_id: int, row: SourceRow, config: DataConfig, tokenizer: PreTrainedTokenizerBase, checks: _Checks
) -> _RenderedRow:
    if row.error:
        raise BadRow(row.error)
    prompt = _column(row.columns, config.prompt, "data.prompt")
    answer = None if config.answer is None else _column(row.columns, config.answer, "data.answer")
    text, is_chat = render_prompt(prompt, config, tokenizer)
    try:
        answer_json = _json_text(answer)
    except (TypeError, ValueError) as error:
        raise BadRow(f"the answer is no JSON value: {error}") from None
    others = {}
    for name, value in row.columns.items():
        if name in (config.prompt, config.answer):
            continue
        try:
            others[name] = _json_text(value)
        except (TypeError, ValueError):
            checks.columns_left_out.setdefault(name, type(value).__name__)
    others_json = "{" + ", ".join(f"{json.dumps(str(name))}: {value}" for name, value in others.items()) + "}"
    return _RenderedRow(
        prompt_id=prompt_id, where=row.where, text=text, is_chat=is_chat, answer=answer_json, row=others_json
    )


def _column(columns: dict[str, Any], name: str, setting: str) -> Any:
    if name in columns:
        return columns[name]
    nearest = difflib.get_close_matches(name, map(str, columns), n=1, cutoff=0.5)
    hint = f"did you mean {setting}={nearest[0]}?" if nearest else f"set {setting} to one of them"
    if setting == "data.answer":
        hint += " Without reference answers: data.answer=null"
    raise BadRow(f"no column {name!r} among {', '.join(map(repr, columns)) or 'none'}: {hint}")


def _tokenise(batch: list[_RenderedRow], tokenizer: PreTrainedTokenizerBase, checks: _Checks) -> pa.RecordBatch:
    """The rows of the batch that are not too long, as PROMPT_SET_SCHEMA."""
    token_ids: dict[int, list[int]] = {}
    for is_chat in (False, True):
        rows = [row for row in batch if row.is_chat == is_chat]
        if rows:
            encoded = tokenizer([row.text for row in rows], add_special_tokens=not is_chat, verbose=False)["input_ids"]
            token_ids |= {row.prompt_id: ids for row, ids in zip(rows, encoded, strict=True)}
    kept = []
    for row in batch:
        ids = token_ids[row.prompt_id]
        if (
            not row.is_chat
            and ids
            and ids[-1] == tokenizer.eos_token_id
            and not row.text.endswith(str(tokenizer.eos_token))
        ):
            raise ValueError(
                f"the tokenizer ends every text with its end-of-text token {tokenizer.eos_token!r}, so that nothing "
                "could follow a prompt: set add_eos_token=false in its tokenizer_config.json; or give chats"
            )
        if not ids:
            checks.reject("invalid", row.where, "the prompt has no tokens")
        elif len(ids) > checks.max_prompt_tokens:
            problem = f"the prompt has {len(ids)} tokens; at most {checks.max_prompt_tokens} are accepted"
            checks.reject("overlong", row.where, problem)
        else:
            kept.append(
                {"prompt_id": row.prompt_id, "prompt_ids": ids, "text": row.text, "answer": row.answer, "row": row.row}
            )
    return pa.RecordBatch.from_pylist(kept, PROMPT_SET_SCHEMA)


def _json_text(value: Any) -> str:
    return json.dumps(value, default=_as_json)


def _as_json(value: Any) -> Any:
    """Values of columnar files that have an obvious JSON form."""
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")
