"""Datasets -> prompts: sources, templates, tokens, and every kind of bad row."""

import datetime
import decimal
import json
import pickle
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raygrpo.config import DataConfig
from raygrpo.data import load_prompts
from raygrpo.types import RolloutGroup, group_to_row, row_to_group
from tests.tiny_models import CHAT_TEMPLATE, tiny_tokenizer

GSM = {"prompt": "2 + 2?", "answer": 4}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def bos_tokenizer(*, eos=False):
    """Adds a BOS to every text by itself, as Llama's does; its chat template writes that BOS too."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    special = [("<|endoftext|>", tokenizer.pad_token_id), ("<|im_end|>", tokenizer.eos_token_id)]
    form = "<|endoftext|> $A <|im_end|>" if eos else "<|endoftext|> $A"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=form, special_tokens=special)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def load(tmp_path, tokenizer):
    """load(rows, **data settings) writes the rows (dicts, or raw lines) as JSON lines and loads them."""

    def load(rows, *, tokenizer=tokenizer, max_prompt_tokens=1000, **settings):
        path = tmp_path / "train.jsonl"
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"\n".join(lines) + b"\n")
        config = DataConfig(source=str(path), **settings)
        return load_prompts(config, tokenizer, max_prompt_tokens=max_prompt_tokens)

    return load


def bad_row(load, rows, **settings):
    """The message that a bad row gets; with invalid_rows=drop the others must come through."""
    with pytest.raises(ValueError) as refused:
        load([*rows, GSM], **settings)
    kept = load([*rows, GSM], **settings | {"invalid_rows": "drop", "overlong_prompts": "drop"})
    assert [prompt.text[-6:] for prompt in kept] == ["2 + 2?"] and sum(kept.report.dropped.values()) == len(rows)
    assert kept[0].prompt_id == len(rows)
    return str(refused.value)


# Sources


def test_jsonl_rows_become_prompts(load, tokenizer):
    prompts = load([GSM | {"level": 1, "tags": ["a", None]}, GSM | {"prompt": "3?", "answer": None}])
    assert len(prompts) == 2
    assert (
        prompts[0].text == "2 + 2?" and prompts[0].answer == 4 and prompts[0].row == {"level": 1, "tags": ["a", None]}
    )
    assert prompts[0].prompt_ids == tokenizer("2 + 2?")["input_ids"]
    assert prompts[1].prompt_id == 1 and prompts[1].answer is None and prompts[1].row == {}
    assert prompts[-1] == prompts[1] and list(prompts.num_prompt_tokens) == [6, 2]
    with pytest.raises(IndexError):
        prompts[2]


def test_jsonl_tolerates_what_editors_leave(load):
    """A byte order mark, blank lines, Windows line ends, and U+2028 inside a string, which str.splitlines would break
    at."""
    rows = [
        b"\xef\xbb\xbf" + json.dumps(GSM).encode() + b"\r",
        b"",
        b"  ",
        '{"prompt": "a\u2028b", "answer": 1}'.encode(),
    ]
    assert [prompt.text for prompt in load(rows)] == ["2 + 2?", "a\u2028b"]


def test_parquet_and_jsonl_give_the_same_prompts(tmp_path, load, tokenizer):
    rows = [
        {"prompt": f"{i}?", "answer": {"x": [i + 0.5, None]}, "extra": [{"a": i}], "flag": i % 2 == 0}
        for i in range(3000)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet", row_group_size=700)
    config = DataConfig(source=str(tmp_path / "train.parquet"))
    from_parquet, from_jsonl = load_prompts(config, tokenizer, max_prompt_tokens=100), load(rows)
    assert list(from_parquet) == list(from_jsonl) and from_parquet.digest == from_jsonl.digest


def test_globs_read_files_in_the_order_of_their_names(tmp_path, tokenizer):
    for name in ("b", "a", "c"):
        rows = [{"prompt": f"{name}{i}", "answer": i} for i in range(2)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = load_prompts(DataConfig(source=str(tmp_path / "*.jsonl")), tokenizer, max_prompt_tokens=9)
    assert [prompt.text for prompt in prompts] == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert [prompt.prompt_id for prompt in prompts] == list(range(6))


def test_a_name_with_brackets_is_a_file_before_it_is_a_glob(tmp_path, tokenizer):
    (tmp_path / "part[1].jsonl").write_text(json.dumps(GSM))
    prompts = load_prompts(DataConfig(source=str(tmp_path / "part[1].jsonl")), tokenizer, max_prompt_tokens=9)
    assert len(prompts) == 1


def test_hugging_face_datasets_load_through_their_library(tmp_path, tokenizer, monkeypatch):
    """From a local directory, which takes the same path as a name on the hub."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    directory = tmp_path / "sums"
    directory.mkdir()
    table = pa.Table.from_pylist([{"question": f"{i}?", "solution": str(i)} for i in range(10)])
    pq.write_table(table, directory / "train.parquet")
    pq.write_table(table.slice(0, 3), directory / "test.parquet")
    columns = {"prompt": "question", "answer": "solution"}
    config = DataConfig(source=str(directory), split="train[5:]", **columns)
    prompts = load_prompts(config, tokenizer, max_prompt_tokens=9)
    assert [prompt.answer for prompt in prompts] == ["5", "6", "7", "8", "9"]
    prompts = load_prompts(DataConfig(source=str(directory), split="test", **columns), tokenizer, max_prompt_tokens=9)
    assert len(prompts) == 3
    with pytest.raises(ValueError, match=r"data.split 'dev'"):
        load_prompts(DataConfig(source=str(directory), split="dev", **columns), tokenizer, max_prompt_tokens=9)


def test_the_subset_reaches_the_library(tokenizer, monkeypatch):
    import datasets

    seen = {}

    def load_dataset(name, subset, *, split):
        seen.update(name=name, subset=subset, split=split)
        return datasets.Dataset.from_list([GSM])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = DataConfig(source="openai/gsm8k", subset="main", split="test")
    assert len(load_prompts(config, tokenizer, max_prompt_tokens=9)) == 1
    assert seen == {"name": "openai/gsm8k", "subset": "main", "split": "test"}


def test_without_network_a_hub_name_is_a_clear_error(tokenizer, monkeypatch):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"(?s)openai/gsm8k.*Couldn't reach.*network or a copy in the local cache"):
        load_prompts(DataConfig(source="openai/gsm8k", subset="main"), tokenizer, max_prompt_tokens=9)


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A directory with a module of the user's, not on sys.path."""
    (tmp_path / "my_task.py").write_text(
        "def rows(count, start=0):\n"
        "    row = {}\n"
        "    for i in range(start, start + count):\n"
        "        row.update(prompt=f'{i}?', answer=i, level=i)  # the same dict again and again\n"
        "        yield row\n"
        "def broken():\n"
        "    yield {'prompt': 'a', 'answer': 1}\n"
        "    raise OSError('disk on fire')\n"
        "def not_dicts():\n"
        "    return [('a', 1), {'prompt': 'b', 'answer': 2}]\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield str(tmp_path)
    sys.modules.pop("my_task", None)


def test_a_function_is_a_source(task, tokenizer):
    config = DataConfig(source="my_task:rows", args={"count": 3, "start": 5})
    prompts = load_prompts(config, tokenizer, max_prompt_tokens=9, import_paths=[task])
    assert [(prompt.text, prompt.answer, prompt.row) for prompt in prompts] == [
        (f"{i}?", i, {"level": i}) for i in (5, 6, 7)
    ]


@pytest.mark.parametrize(
    ("source", "args", "message"),
    [
        ("my_task:broken", {}, r"my_task:broken\(\) failed after 1 rows: OSError: disk on fire \(.*my_task.py:8\)"),
        ("my_task:rows", {}, r"TypeError: rows\(\) missing 1 required positional argument: 'count'"),
        ("my_task:row", {}, r"my_task has no 'row'; did you mean 'rows'\?"),
        ("no_such_task:rows", {}, r"there is no module 'no_such_task'"),
        ("my_task:not_dicts", {}, r"my_task:not_dicts, row 0: a row must be a dict, not tuple"),
    ],
)
def test_functions_that_fail_are_named(task, tokenizer, source, args, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(DataConfig(source=source, args=args), tokenizer, max_prompt_tokens=9, import_paths=[task])


def test_max_rows_reads_only_the_first(task, tokenizer):
    config = DataConfig(source="my_task:rows", args={"count": 10**12}, max_rows=7)
    assert len(load_prompts(config, tokenizer, max_prompt_tokens=9, import_paths=[task])) == 7


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{dir}/none.jsonl", "there is no file .*none.jsonl"),
        ("{dir}/none*.parquet", "no file matches .*none"),
        ("{dir}/none", "there is no .*none"),
        ("{dir}/rows.csv", "files must be .jsonl .* or .parquet"),
        ("{dir}/broken.parquet", "cannot read .*broken.parquet as Parquet"),
    ],
)
def test_sources_that_are_not_there_are_named(tmp_path, tokenizer, source, message):
    (tmp_path / "rows.csv").write_text("prompt,answer\n1,2\n")
    (tmp_path / "broken.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match=message):
        load_prompts(DataConfig(source=source.format(dir=tmp_path)), tokenizer, max_prompt_tokens=9)


@pytest.mark.parametrize(
    "setting",
    [{"source": "a.jsonl", "subset": "main"}, {"source": "m:f", "split": "test"}, {"source": "a/b", "args": {"x": 1}}],
)
def test_settings_that_the_source_would_ignore_are_refused(setting):
    with pytest.raises(ValueError, match=r"data.source is"):
        DataConfig(**setting)


# Bad rows


def test_malformed_lines_are_named_by_file_and_line(load, tmp_path):
    lines = [b'{"prompt": "a", "answer": 1}', b'{"prompt": "b", "answer": }', b"\xff\xfe", b"[1]", b"1" * 5000]
    with pytest.raises(ValueError) as refused:
        load(lines)
    message = str(refused.value)
    assert f"{tmp_path}/train.jsonl:2: malformed JSON: Expecting value at column 27" in message
    assert "train.jsonl:3: not UTF-8" in message
    assert "train.jsonl:4: a row must be a JSON object, not list" in message
    assert "train.jsonl:5: malformed JSON: Exceeds the limit" in message
    assert "data.invalid_rows=drop" in message


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "", "answer": 1}, "train.jsonl:1: the prompt is empty"),
        ({"prompt": " \n\t", "answer": 1}, "the prompt is empty"),
        ({"prompt": [], "answer": 1}, "not an empty list"),
        ({"prompt": None, "answer": 1}, "not NoneType"),
        ({"prompt": 5, "answer": 1}, "not int"),
        ({"prompt": [{"role": "user", "content": " "}], "answer": 1}, "its last message has no content"),
        ({"prompt": [{"role": "user"}], "answer": 1}, "a chat message must be {role, content}"),
        ({"prompt": ["hello"], "answer": 1}, "a chat message must be"),
        (
            {"prompt": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "42"}], "answer": 1},
            "the last message is the assistant's",
        ),
        ({"promt": "a", "answer": 1}, "no column 'prompt' among 'promt', 'answer': did you mean data.prompt=promt?"),
        ({"prompt": "a", "solution": 1}, "no column 'answer'"),
        ({"prompt": "a\ud800", "answer": 1}, "the prompt is no valid Unicode: surrogates not allowed"),
        ({"prompt": "x" * 1001, "answer": 1}, "the prompt has 1001 tokens; at most 1000 are accepted"),
    ],
)
def test_bad_rows_are_errors_or_dropped_and_counted(load, row, message):
    assert message in bad_row(load, [row])


def test_overlong_prompts_and_invalid_rows_have_policies_of_their_own(load):
    rows = [GSM, {"prompt": "x" * 30, "answer": 1}, {"prompt": "", "answer": 1}]
    with pytest.raises(ValueError, match="the prompt is empty"):
        load(rows, max_prompt_tokens=20, overlong_prompts="drop")
    with pytest.raises(ValueError, match="30 tokens; at most 20"):
        load(rows, max_prompt_tokens=20, invalid_rows="drop")
    prompts = load(rows, max_prompt_tokens=20, overlong_prompts="drop", invalid_rows="drop")
    assert prompts.report.dropped == {"overlong": 1, "invalid": 1} and prompts.report.num_rows == 3
    assert "1 prompts from 3 rows" in str(prompts.report) and "train.jsonl:2: the prompt has 30" in str(prompts.report)


def test_an_error_shows_the_first_bad_rows_and_stops_there(load):
    with pytest.raises(ValueError) as refused:
        load([{"prompt": "", "answer": 1}] * 500)
    assert str(refused.value).count("the prompt is empty") == 10


def test_the_limit_is_inclusive(load):
    assert len(load([{"prompt": "x" * 20, "answer": 1}], max_prompt_tokens=20)) == 1


def test_no_prompt_left_is_an_error_that_says_why(load):
    with pytest.raises(ValueError, match=r"(?s)no prompt is left.*2 overlong rows dropped"):
        load([{"prompt": "x" * 30, "answer": 1}] * 2, max_prompt_tokens=20, overlong_prompts="drop")
    with pytest.raises(ValueError, match="no prompt is left"):
        load([b""])
    with pytest.raises(ValueError, match="leave them no room"):
        load([GSM], max_prompt_tokens=0)


def test_answers_are_not_needed_when_the_configuration_says_so(load):
    assert load([{"prompt": "a", "score": 1}], answer=None)[0].answer is None


# Templates and tokens


def test_chats_are_what_the_tokenizer_makes_of_them(load, tokenizer):
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "1+1"},
    ]
    prompt = load([{"prompt": chat, "answer": 2}])[0]
    assert prompt.prompt_ids == tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert prompt.text.endswith("<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n")


def test_fields_that_parquet_adds_to_messages_do_not_reach_the_template(tmp_path, load, tokenizer):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% if m.name is defined %}!{% endif %}{% endfor %}"
    rows = [
        {"prompt": [{"role": "system", "content": "a", "name": "n"}, {"role": "user", "content": "b"}], "answer": 1}
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    prompts = load_prompts(DataConfig(source=str(tmp_path / "t.parquet")), tokenizer, max_prompt_tokens=99)
    assert prompts[0].text == "a!b"


def test_a_system_prompt_makes_a_chat_of_a_text(load):
    text = load([GSM], system_prompt="Be brief.")[0].text
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )
    chat = [{"role": "user", "content": "2 + 2?"}]
    assert load([GSM | {"prompt": chat}], system_prompt="Be brief.")[0].text == text
    own = [{"role": "system", "content": "x"}, *chat]
    with pytest.raises(ValueError, match="a system message of its own"):
        load([GSM | {"prompt": own}], system_prompt="Be brief.")


def test_bos_comes_once_for_texts_and_for_chats(load):
    tokenizer = bos_tokenizer()
    text, chat = load([GSM, GSM | {"prompt": [{"role": "user", "content": "2 + 2?"}]}], tokenizer=tokenizer)
    for prompt in (text, chat):
        assert prompt.prompt_ids[0] == tokenizer.bos_token_id
        assert prompt.prompt_ids.count(tokenizer.bos_token_id) == 1
    assert text.prompt_ids == tokenizer("2 + 2?")["input_ids"]


def test_a_tokenizer_that_ends_texts_is_refused(load):
    with pytest.raises(ValueError, match="add_eos_token"):
        load([GSM], tokenizer=bos_tokenizer(eos=True))


def test_messages_without_a_template_are_an_error_that_says_what_to_do(load):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    assert len(load([GSM], tokenizer=tokenizer)) == 1
    with pytest.raises(ValueError, match=r"prompts are chat messages, but the tokenizer .* has no chat template: use"):
        load([GSM | {"prompt": [{"role": "user", "content": "?"}]}], tokenizer=tokenizer, invalid_rows="drop")
    with pytest.raises(ValueError, match=r"data.system_prompt is set, but the tokenizer"):
        load([GSM], tokenizer=tokenizer, system_prompt="Be brief.")


def test_a_template_that_refuses_a_prompt_is_quoted(load):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ValueError, match=r"train.jsonl:1: the chat template refuses .*System role not supported"):
        load([GSM], tokenizer=tokenizer, system_prompt="Be brief.")


def test_chat_template_kwargs_reach_the_template(load):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}{% if not enable_thinking %}/no_think{% endif %}"
    chat = GSM | {"prompt": [{"role": "user", "content": "hi"}]}
    assert load([chat], tokenizer=tokenizer, chat_template_kwargs={"enable_thinking": True})[0].text == "hi"
    assert load([chat], tokenizer=tokenizer, chat_template_kwargs={"enable_thinking": False})[0].text == "hi/no_think"
    with pytest.raises(ValueError, match=r"chat_template_kwargs .* is set, but the prompts are plain texts"):
        load([GSM], tokenizer=tokenizer, chat_template_kwargs={"enable_thinking": False})


# What is kept

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec=None)), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(min_size=1).filter(str.strip), answer=json_values, extra=json_values)
def test_texts_answers_and_rows_come_through_unchanged(load, tokenizer, text, answer, extra):
    """Odd Unicode and nesting included, on through the stream's row form; the tokens decode to the text."""
    prompt = load([{"prompt": text, "answer": answer, "extra": extra}], max_prompt_tokens=10**6)[0]
    assert (prompt.text, prompt.answer, prompt.row) == (text, answer, {"extra": extra})
    if not any(token in text for token in tokenizer.all_special_tokens):
        assert tokenizer.decode(prompt.prompt_ids) == text
    group = RolloutGroup(
        ticket=0, prompt=prompt, policy_version=0, rollouts=[], generator="g", generate_start_s=0, generate_end_s=0
    )
    assert row_to_group(group_to_row(group)).prompt == prompt


def test_values_of_columnar_files_become_json(tmp_path, tokenizer):
    row = {
        "prompt": "a",
        "answer": decimal.Decimal("0.10"),
        "day": datetime.date(2024, 2, 29),
        "moment": datetime.datetime(2024, 2, 29, 1, 2, 3),
        "picture": b"\x89PNG",
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "t.parquet")
    prompts = load_prompts(DataConfig(source=str(tmp_path / "t.parquet")), tokenizer, max_prompt_tokens=9)
    assert prompts[0].answer == "0.10"
    assert prompts[0].row == {"day": "2024-02-29", "moment": "2024-02-29T01:02:03"}
    assert prompts.report.columns_left_out == {"picture": "bytes"} and "'picture' (bytes)" in str(prompts.report)
    with pytest.raises(ValueError, match="the answer is no JSON value: a bytes"):
        load_prompts(DataConfig(source=str(tmp_path / "t.parquet"), answer="picture"), tokenizer, max_prompt_tokens=9)


def test_a_prompt_set_survives_pickling_and_knows_its_content(load):
    rows = [{"prompt": f"{i}?", "answer": i} for i in range(20)]
    prompts = load(rows)
    again = pickle.loads(pickle.dumps(prompts))
    assert list(again) == list(prompts) and again.report == prompts.report and again.digest == prompts.digest
    changed = [
        load([*rows[:-1], rows[-1] | change]).digest for change in ({"prompt": "20?"}, {"answer": "19"}, {"x": 1})
    ]
    assert len({prompts.digest, load(rows[:-1]).digest, load(rows[::-1]).digest, *changed}) == 6


def test_tickets_draw_every_prompt_once_an_epoch(load):
    prompts = load([{"prompt": f"{i}?", "answer": i} for i in range(50)])
    epochs = [[prompts.at(epoch * 50 + i, seed=1).answer for i in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert [prompts.at(i, seed=2).answer for i in range(50)] != epochs[0]
    ordered = load([{"prompt": f"{i}?", "answer": i} for i in range(50)], shuffle=False)
    assert [ordered.at(i, seed=1).answer for i in range(60)] == [*range(50), *range(10)]
    replacements = [ordered.at(i, seed=1, replacement=1).answer for i in range(50)]
    assert sorted(replacements) == list(range(50)) and np.mean(np.array(replacements) == np.arange(50)) < 0.2
