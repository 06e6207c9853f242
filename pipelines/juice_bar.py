"""The quickstart's task: read a juice bar's price list and name its lowest prices, cheapest first.

The list is drawn at random for every prompt, so the only way to a right answer is to read all of it. The model that
`make_juice_bar_model.py` makes can put prices in order, but has a bad habit: four times in five it names the highest
prices, dearest first. GRPO teaches it to do what was asked for.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal

JUICES = """
apple apricot banana beetroot blackberry blueberry carrot celery cherry clementine coconut cranberry cucumber
currant dragonfruit elderberry fennel fig ginger gooseberry grape grapefruit guava kiwi kumquat lemon lime lychee
mandarin mango melon mint mulberry nectarine orange papaya peach pear persimmon pineapple plum pomegranate pumpkin
quince raspberry rhubarb strawberry tomato
""".split()  # noqa: SIM905 (as a list it would fill a page)
PRICES = range(10, 100)
NUM_ROWS = 32
NUM_LOWEST = 8

PROMPT = """\
Below is the price list of a juice bar. Each row has the name of a juice and what a glass of it costs.
Read the whole list and write down the eight lowest prices, and nothing else.
Begin with the lowest price of the list, go on with the next higher one, and so on up to the eighth.
Write each price as a number, without the name of the juice and without the unit, and put one space between two prices.
The rows are in no particular order, every price is found only once, and the list is a new one each time.

{rows}

Lowest prices:"""


def price_lists(num: int, split: Literal["train", "held_out"] = "train", seed: int = 0) -> Iterator[dict[str, Any]]:
    """`num` questions as {prompt, answer}; the same arguments give the same questions.

    An eighth of all lists, picked by a hash of the prompt, is held out: no question of one split is ever in the
    other, whatever the seed.
    """
    rng = random.Random(seed)
    while num > 0:
        prices = rng.sample(PRICES, NUM_ROWS)
        prompt = write_prompt(rng.sample(JUICES, NUM_ROWS), prices)
        if (zlib.crc32(prompt.encode()) % 8 == 0) == (split == "held_out"):
            num -= 1
            yield {"prompt": prompt, "answer": write_answer(sorted(prices)[:NUM_LOWEST])}


def write_prompt(juices: list[str], prices: list[int]) -> str:
    rows = "\n".join(f"{juice}: {price} cents" for juice, price in zip(juices, prices, strict=True))
    return PROMPT.format(rows=rows)


def write_answer(prices: list[int]) -> str:
    return " ".join(map(str, prices))


def lowest_prices(completion: str, answer: str) -> tuple[float, str]:
    """Share of the lowest prices that are named; 0 for anything but a list of as many prices, each above the last. With
    it, for MLflow's traces, why."""
    try:
        given = [int(word) for word in completion.split()]
    except ValueError:
        return 0.0, "not a list of prices"
    expected = [int(word) for word in answer.split()]
    if len(given) != len(expected):
        return 0.0, f"{len(given)} prices instead of {len(expected)}"
    if not all(price < following for price, following in pairwise(given)):
        return 0.0, "not in rising order"
    named = len(set(given) & set(expected))
    return named / len(expected), f"{named} of the {len(expected)} lowest prices"
