"""A task for a real small model: repeat the last of four words. `smollm2_cpu.yaml` trains SmolLM2-135M-Instruct on it.

The prompt is a chat with four solved examples. The model half knows what to do: it often answers with another of the
words, or goes on talking. Held-out questions are made of words that no training question holds, so what is measured
on them is the skill.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, Literal

WORDS = """
anchor apple arrow autumn bakery balcony banana barrel basket beach bicycle blanket bottle branch bread bridge
bucket butter button cabin camera candle canyon carpet castle ceiling chair cheese cherry circle circus city cloud
coffee collar copper corner cotton cousin cradle cricket crystal curtain dancer desert diamond dinner doctor dolphin
donkey dragon drawer eagle engine envelope evening farmer feather fence finger flower forest fountain friend galaxy
garden giant ginger glacier glove guitar hammer harbor honey horse hotel iceberg island jacket jungle kettle kitchen
ladder lantern leather lemon letter library lion lobster machine magnet market meadow medal melon mirror monkey
morning mountain museum needle notebook ocean office onion orange orchard oven painter palace paper parrot pencil
pepper piano picture pillow pirate planet pocket potato puzzle rabbit railway ribbon river robot rocket saddle
salmon school shadow shelter silver singer spider spoon stable station summer table teacher temple ticket tiger
tomato tower train tunnel turtle valley village violin wagon wallet whale window winter wizard
""".split()  # noqa: SIM905 (as a list it would fill a page)
NUM_WORDS = 4

SYSTEM = "Answer briefly."
QUESTION = "Last word: {words}"
EXAMPLES = (
    "hill stone music paint",
    "dream cat road snow",
    "coat lake wheel milk",
    "king lamp bell sugar",
)


def questions(num: int, split: Literal["train", "held_out"] = "train", seed: int = 0) -> Iterator[dict[str, Any]]:
    """`num` questions as {prompt, answer}; the same arguments give the same ones. The splits have no word in common."""
    words = WORDS[::4] if split == "held_out" else [word for i, word in enumerate(WORDS) if i % 4]
    rng = random.Random(seed)
    for _ in range(num):
        sample = rng.sample(words, NUM_WORDS)
        yield {"prompt": chat(" ".join(sample)), "answer": sample[-1]}


def chat(words: str) -> list[dict[str, str]]:
    """System line, solved examples, and the question on `words`."""
    messages = [{"role": "system", "content": SYSTEM}]
    for example in EXAMPLES:
        messages += [
            {"role": "user", "content": QUESTION.format(words=example)},
            {"role": "assistant", "content": example.split()[-1]},
        ]
    return [*messages, {"role": "user", "content": QUESTION.format(words=words)}]


def says_last_word(completion: str, answer: str, finish_reason: str) -> float:
    """1 if the reply is the word, in the same letters, and ended there."""
    return float(completion.strip() == answer and finish_reason == "stop")
