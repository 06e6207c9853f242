"""What a ticket stands for: prompts and seeds as functions of the run's seed."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raygrpo.data import prompt_index, sample_seed

MASK = 2**64 - 1
ORDER = [1, 6, 3, 7, 5, 2, 4, 0, 5, 6, 4, 2, 0, 1, 3, 7]
SEEDS = [4472310929699430000, 8017341480418433418, 600250383978553238]


def splitmix64(state):
    """The generator as its authors write it, on Python integers: the independent reference for the vectorised one."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        yield z ^ (z >> 31)


@given(st.integers(1, 200), st.integers(0, 2**70), st.integers(0, 1000), st.integers(0, 3))
def test_each_epoch_is_a_permutation(num_prompts, seed, epoch, replacement):
    tickets = range(epoch * num_prompts, (epoch + 1) * num_prompts)
    drawn = [prompt_index(ticket, num_prompts, seed=seed, replacement=replacement) for ticket in tickets]
    assert sorted(drawn) == list(range(num_prompts))


def test_order_sorts_the_prompts_by_splitmix64_seeded_with_blake2b():
    from hashlib import blake2b

    digest = blake2b(b"order/7/3/0", digest_size=8, person=b"raygrpo").digest()
    generator = splitmix64(int.from_bytes(digest, "little"))
    draws = [next(generator) for _ in range(50)]
    expected = sorted(range(50), key=draws.__getitem__)
    assert [prompt_index(3 * 50 + place, 50, seed=7) for place in range(50)] == expected


def test_splitmix64_reference_gives_the_published_outputs():
    generator = splitmix64(1234567)
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [next(generator) for _ in published] == published


def test_order_and_seeds_never_change():
    """A release that changed these numbers could not resume an older run."""
    assert [prompt_index(ticket, 8, seed=0) for ticket in range(16)] == ORDER
    assert [sample_seed(0, 0, 0), sample_seed(1, 2, 3), sample_seed(0, 0, 0, 1)] == SEEDS


def test_epochs_seeds_and_replacements_each_give_another_order():
    orders = {
        (seed, epoch, replacement): tuple(
            prompt_index(epoch * 100 + place, 100, seed=seed, replacement=replacement) for place in range(100)
        )
        for seed, epoch, replacement in product(range(3), range(3), range(3))
    }
    assert len(set(orders.values())) == len(orders)


def test_without_shuffle_the_source_order_repeats_but_replacements_are_drawn():
    assert [prompt_index(ticket, 5, seed=3, shuffle=False) for ticket in range(12)] == [*range(5), *range(5), 0, 1]
    replacements = [prompt_index(ticket, 100, seed=3, shuffle=False, replacement=1) for ticket in range(100)]
    assert sorted(replacements) == list(range(100)) and replacements != list(range(100))


def test_every_prompt_is_equally_likely_at_every_place():
    """Chi-squared over 6000 epochs of 6 prompts: 5 x 5 free cells per table, mean 25, standard deviation 7."""
    counts = np.zeros((6, 6))
    for ticket in range(6 * 6000):
        counts[ticket % 6, prompt_index(ticket, 6, seed=11)] += 1
    chi_squared = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_squared < 25 + 4 * 7


@given(st.integers(0, 2**64), st.integers(0, 2**40), st.integers(0, 63), st.integers(0, 5))
def test_sample_seeds_fit_63_bits(run_seed, ticket, sample, replacement):
    assert 0 <= sample_seed(run_seed, ticket, sample, replacement) < 2**63


def test_sample_seeds_do_not_collide():
    """Also not where inputs concatenate to the same digits, e.g. ticket 1 sample 11 and ticket 11 sample 1."""
    seeds = [sample_seed(*inputs) for inputs in product(range(3), range(300), range(12), range(2))]
    assert len(set(seeds)) == len(seeds) == 3 * 300 * 12 * 2


def test_sample_seeds_are_far_apart_within_a_group():
    """Engines may use seed + i for the i-th sample of a request."""
    for ticket in range(200):
        seeds = sorted(sample_seed(0, ticket, sample) for sample in range(16))
        assert min(np.diff(seeds)) > 10_000


@pytest.mark.parametrize("num_prompts", [1, 2, 3])
def test_tiny_sets_work(num_prompts):
    assert {prompt_index(ticket, num_prompts, seed=0) for ticket in range(num_prompts)} == set(range(num_prompts))
