"""The task that SmolLM2 is trained on."""

from __future__ import annotations

import importlib
from itertools import islice

import pytest


@pytest.fixture
def last_word():
    return importlib.import_module("last_word")


def question_words(row):
    return row["prompt"][-1]["content"].split(":")[1].split()


def test_the_same_arguments_give_the_same_questions_and_another_seed_others(last_word):
    first = list(last_word.questions(50))
    assert first == list(last_word.questions(50)) == list(islice(last_word.questions(200), 50))
    assert [row["answer"] for row in first] != [row["answer"] for row in last_word.questions(50, seed=1)]


def test_training_and_held_out_questions_have_no_word_in_common_nor_with_the_examples(last_word):
    training = {word for row in last_word.questions(1000) for word in question_words(row)}
    held_out = {word for row in last_word.questions(1000, "held_out") for word in question_words(row)}
    examples = {word for example in last_word.EXAMPLES for word in example.split()}
    assert training | held_out == set(last_word.WORDS) and len(set(last_word.WORDS)) == len(last_word.WORDS)
    assert not training & held_out and not examples & (training | held_out)


def test_the_answer_is_the_last_word_of_the_question_and_the_examples_are_solved_right(last_word):
    for row in last_word.questions(100):
        assert len(question_words(row)) == last_word.NUM_WORDS and question_words(row)[-1] == row["answer"]
        system, *turns, question = row["prompt"]
        assert system["role"] == "system" and question["role"] == "user"
        for asked, answered in zip(turns[::2], turns[1::2], strict=True):
            assert (asked["role"], answered["role"]) == ("user", "assistant")
            assert asked["content"].split()[-1] == answered["content"]


@pytest.mark.parametrize(
    ("completion", "finish_reason", "reward"),
    [
        ("castle", "stop", 1.0),
        (" castle\n", "stop", 1.0),
        ("castle", "length", 0.0),
        ("Castle", "stop", 0.0),
        ("the castle", "stop", 0.0),
        ("castle.", "stop", 0.0),
        ("tower", "stop", 0.0),
        ("", "stop", 0.0),
    ],
)
def test_reward_is_for_the_word_alone_and_an_ended_reply(last_word, completion, finish_reason, reward):
    assert last_word.says_last_word(completion, "castle", finish_reason) == reward
