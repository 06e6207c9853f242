"""What a ticket stands for: a prompt and the seeds of its samples, as pure functions of the run's seed.

A ticket is the position of a group in the run, so one integer is the whole data cursor: a resumed run, a retried group
and any number of generators draw the same prompts with the same seeds. Nothing here depends on platform, library
version or history.

Random words come from BLAKE2b over the inputs. The order of an epoch sorts the prompts by the outputs of SplitMix64
(Steele, Lea and Flood, 2014, "Fast splittable pseudorandom number generators", figure 17), seeded with such a word: its
2^64 outputs are distinct, so that there are no ties to break.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

import numpy as np


def prompt_index(ticket: int, num_prompts: int, *, seed: int, shuffle: bool = True, replacement: int = 0) -> int:
    """The place in the prompt set of the prompt that a ticket stands for.

    Tickets count through the prompts once per epoch, each epoch in an order of its own. Replacement k > 0 is the k-th
    other prompt of the ticket, for groups that had to be sampled anew from another prompt; replacements too cover
    all prompts evenly, and are drawn in random order even without `shuffle`.
    """
    epoch, position = divmod(ticket, num_prompts)
    if replacement == 0 and not shuffle:
        return position
    return int(_epoch_order(num_prompts, seed, epoch, replacement)[position])


def sample_seed(run_seed: int, ticket: int, sample_index: int, replacement: int = 0) -> int:
    """The seed of one completion, in [0, 2**63). Seeds of a group are unrelated: engines that derive seed + i for a
    child stay apart."""
    return _random_word("sample", run_seed, ticket, sample_index, replacement) >> 1


def evaluation_seed(run_seed: int, set_name: str, prompt: int, sample_index: int) -> int:
    """As `sample_seed`, of an evaluation: the same in every evaluation of a run, whichever policy is evaluated, so that
    one differs from the next by the policy alone. prompt: its place in the set."""
    return _random_word("evaluation", run_seed, set_name, prompt, sample_index) >> 1


@lru_cache(maxsize=8)
def _epoch_order(num_prompts: int, seed: int, epoch: int, replacement: int) -> np.ndarray:
    """A permutation of range(num_prompts)."""
    state = np.uint64(_random_word("order", seed, epoch, replacement))
    z = state + np.arange(1, num_prompts + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # modulo 2**64
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.argsort(z).astype(np.uint32 if num_prompts < 2**32 else np.uint64)


def _random_word(*inputs: str | int) -> int:
    """64 bits that look random, the same for the same inputs."""
    text = "/".join(str(value) for value in inputs)
    return int.from_bytes(blake2b(text.encode(), digest_size=8, person=b"raygrpo").digest(), "little")
