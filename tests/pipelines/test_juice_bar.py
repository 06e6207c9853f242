"""The quickstart's task and its committed model."""

from __future__ import annotations

import importlib
import json
from itertools import islice

import pytest
import torch

from tests.pipelines.conftest import PIPELINES

MODEL = PIPELINES / "quickstart_model"


@pytest.fixture
def juice_bar():
    return importlib.import_module("juice_bar")


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def test_the_same_arguments_give_the_same_questions_and_another_seed_others(juice_bar):
    first = list(juice_bar.price_lists(50))
    assert first == list(juice_bar.price_lists(50))
    assert first == list(islice(juice_bar.price_lists(200), 50))
    assert not {row["prompt"] for row in first} & {row["prompt"] for row in juice_bar.price_lists(50, seed=1)}


def test_no_held_out_question_is_in_the_training_set_of_any_seed(juice_bar):
    training = {row["prompt"] for seed in (0, 1, 2) for row in juice_bar.price_lists(1024, seed=seed)}
    held_out = {row["prompt"] for seed in (0, 1, 2) for row in juice_bar.price_lists(256, "held_out", seed=seed)}
    assert len(training) == 3 * 1024 and len(held_out) == 3 * 256
    assert not training & held_out


def test_the_answer_is_what_the_instructions_ask_for(juice_bar):
    for row in juice_bar.price_lists(20):
        prices = [int(line.split()[1]) for line in row["prompt"].splitlines() if line.endswith(" cents")]
        assert len(prices) == len(set(prices)) == juice_bar.NUM_ROWS
        assert row["answer"] == " ".join(str(price) for price in sorted(prices)[: juice_bar.NUM_LOWEST])


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (" 10 12 15 20 21 30 31 40", 1.0),
        (" 10 12 15 20 21 30 31 41", 7 / 8),
        (" 12 10 15 20 21 30 31 40", 0.0),  # all of them, but not in order
        (" 40 31 30 21 20 15 12 10", 0.0),
        (" 10 10 12 15 20 21 30 31", 0.0),
        (" 12 15 20 21 30 31 40 41", 7 / 8),
        (" 41 42 43 44 45 46 47 48", 0.0),
        (" 10 12 15 20 21 30 31", 0.0),
        (" 10 12 15 20 21 30 31 40 41", 0.0),
        (" 10, 12, 15, 20, 21, 30, 31, 40", 0.0),
        (" apple banana cherry fig kiwi lemon lime mango", 0.0),
        ("", 0.0),
    ],
)
def test_reward_is_the_share_of_the_lowest_prices_in_a_rising_list(juice_bar, completion, reward):
    assert juice_bar.lowest_prices(completion, "10 12 15 20 21 30 31 40")[0] == reward


def test_every_reference_answer_is_worth_1_and_its_reverse_less(juice_bar):
    for row in juice_bar.price_lists(100):
        assert juice_bar.lowest_prices(row["answer"], row["answer"]) == (1.0, "8 of the 8 lowest prices")
        assert juice_bar.lowest_prices(" ".join(row["answer"].split()[::-1]), row["answer"]) == (
            0.0,
            "not in rising order",
        )


def test_tokenizer_restores_every_text_of_the_task_and_any_other(juice_bar, tokenizer):
    texts = [text for row in juice_bar.price_lists(100) for text in (row["prompt"], row["answer"])]
    for text in [*texts, "Größe: 7 €, “naïve” 😀\n\n\t  end ", "<script> 0123456789"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_prompt_is_long_enough_to_be_worth_sharing_and_an_answer_is_short(juice_bar, tokenizer):
    for row in juice_bar.price_lists(50):
        assert 250 <= len(tokenizer(row["prompt"])["input_ids"]) <= 400
        assert len(tokenizer(" " + row["answer"])["input_ids"]) == juice_bar.NUM_LOWEST  # a token for each price


def test_committed_model_is_small_and_complete(model, tokenizer):
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 2e6
    config = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["tie_word_embeddings"]
    assert config["vocab_size"] == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_committed_model_answers_about_one_time_in_five_and_never_by_habit(juice_bar, model, tokenizer):
    """The quickstart's start: right often enough for GRPO to find out, wrong when it takes its likeliest way."""
    rows = list(juice_bar.price_lists(64, "held_out"))
    ids = torch.tensor([tokenizer(row["prompt"])["input_ids"] for row in rows])

    def mean_reward(do_sample: bool) -> float:
        torch.manual_seed(0)
        outputs = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=do_sample, top_k=0
        )
        texts = tokenizer.batch_decode(outputs[:, ids.shape[1] :], skip_special_tokens=True)
        scored = map(juice_bar.lowest_prices, texts, [row["answer"] for row in rows])
        return sum(share for share, _ in scored) / len(rows)

    assert 0.1 < mean_reward(do_sample=True) < 0.3
    assert mean_reward(do_sample=False) < 0.1
