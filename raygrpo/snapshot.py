"""Published tensors as they lie on a device: copies in a few flat buckets, with an index and digests.

What `generator.weight_transfer: direct` publishes (direct_transfer.py carries it). The tensors are copied, so the
learner may go on and change its parameters; what ZeRO-3 gathers is copied while it is there. Which bucket and place a
tensor has follows from the index alone, so sender and receiver need not tell each other.

The digest can be computed on any device and is the same number on all of them, for it is made of integers that wrap
around at 64 bits. The bytes are read as words of 32 bits, in rows of ROW. A row's sum is

    sum_k w_k m_k  (mod 2^64)         m_k: odd, its bits scattered

and the rows' sums are the digits of a number to an odd base, mod 2^64. Damage within one word is always found: m_k is
odd, so no difference below 2^64 vanishes. Two words of a row that changed places are missed if their m_k agree in 32
bits or more, with a chance of about 2^-32; anything else with a chance of about 2^-64. It guards against faults, not
against forgery.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from raygrpo.weights import PackedTensor, index_digest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BUCKET_BYTES = 256 * 2**20  # a larger tensor has a bucket of its own
MIN_FILL = 0.75  # a bucket that is emptier is cut to what is in it
ALIGNMENT = 64  # bytes; each tensor begins at a multiple of it, and zeros follow it up to the next
ROW = 2**16  # words whose weighted sum is one digit of the digest
BASE = 0x9E37_79B9_7F4A_7C15  # of the digits
ROWS_AT_A_TIME = {"cpu": 1, "cuda": 64}  # 8 ROW bytes of scratch memory each; the digest does not depend on it


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All tensors of one version."""

    index: tuple[PackedTensor, ...]
    index_digest: int  # as that of PackedWeights
    bucket_bytes: int
    buckets: tuple[Tensor, ...]  # of each its bytes, uint8; all on one device

    @property
    def num_bytes(self) -> int:
        """Of the tensors, without what lies between them."""
        return sum(entry.num_bytes for entry in self.index)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A tensor's place in its bucket."""

    entry: PackedTensor
    start: int
    end: int  # with the zeros that follow the tensor


def take_snapshot(tensors: Iterable[tuple[str, Tensor]], *, bucket_bytes: int = BUCKET_BYTES) -> Snapshot:
    """Copy the tensors, in order, into buckets on their device; returns when the copies are made. The iterable may
    gather each tensor just before it yields it and free it after. Raises ValueError for two tensors of one name."""
    import torch

    index: list[PackedTensor] = []
    buckets: list[Tensor] = []
    slots: list[Slot] = []  # of the last bucket
    seen: set[str] = set()

    def finish_bucket() -> None:
        if not slots:
            return
        used = buckets[-1][: slots[-1].end]
        buckets[-1] = used.clone() if len(used) < MIN_FILL * len(buckets[-1]) else used
        found = digests([buckets[-1][slot.start : slot.end] for slot in slots])
        index.extend(replace(slot.entry, digest=digest) for slot, digest in zip(slots, found, strict=True))
        slots.clear()

    for name, tensor in tensors:
        if name in seen:
            raise ValueError(f"two tensors are named {name!r}")
        seen.add(name)
        entry = PackedTensor(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            num_bytes=tensor.numel() * tensor.element_size(),
            digest=0,  # until its bucket is full
        )
        slot = _next_slot(entry, slots, bucket_bytes)
        if slot.start == 0:
            finish_bucket()
            buckets.append(torch.empty(max(bucket_bytes, slot.end), dtype=torch.uint8, device=tensor.device))
        end = slot.start + entry.num_bytes
        buckets[-1][slot.start : end].copy_(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
        buckets[-1][end : slot.end].zero_()
        slots.append(slot)
    finish_bucket()
    return Snapshot(
        index=tuple(index), index_digest=index_digest(index), bucket_bytes=bucket_bytes, buckets=tuple(buckets)
    )


def layout(index: Iterable[PackedTensor], bucket_bytes: int) -> list[list[Slot]]:
    """For each bucket the tensors in it, in order."""
    buckets: list[list[Slot]] = []
    for entry in index:
        slot = _next_slot(entry, buckets[-1] if buckets else [], bucket_bytes)
        if slot.start == 0:
            buckets.append([])
        buckets[-1].append(slot)
    return buckets


def _next_slot(entry: PackedTensor, slots: Sequence[Slot], bucket_bytes: int) -> Slot:
    """After `slots`, which share a bucket, or at the start of the next bucket."""
    size = max(1, -(-entry.num_bytes // ALIGNMENT)) * ALIGNMENT  # an empty tensor too has a place of its own
    start = slots[-1].end if slots else 0
    if start + size > bucket_bytes:
        start = 0
    return Slot(entry=entry, start=start, end=start + size)


def open_bucket(bucket: Tensor, slots: Sequence[Slot]) -> list[tuple[str, Tensor]]:
    """The bucket's tensors by name, as views of it. Raises ValueError that names a tensor whose bytes are not those
    that were packed; everything is verified before anything is returned."""
    import torch

    found = digests([bucket[slot.start : slot.end] for slot in slots])
    for slot, digest in zip(slots, found, strict=True):
        if digest != slot.entry.digest:
            raise ValueError(
                f"published weights are damaged: the digest of {slot.entry.name!r} does not match its bytes"
            )
    return [
        (
            slot.entry.name,
            bucket[slot.start : slot.start + slot.entry.num_bytes]
            .view(getattr(torch, slot.entry.dtype))
            .reshape(slot.entry.shape),
        )
        for slot in slots
    ]


def digests(parts: Sequence[Tensor]) -> list[int]:
    """Of each part: uint8, on one device, a multiple of 4 bytes long and so aligned. Waits for the device once."""
    import torch

    sums = [_row_sums(part.view(torch.int32)) for part in parts]
    rows = torch.cat(sums).tolist() if sums else []
    found, first = [], 0
    for part_sums in sums:
        digest = 0
        for row in rows[first : first + len(part_sums)]:
            digest = (digest * BASE + row) % 2**64
        found.append(digest)
        first += len(part_sums)
    return found


def _row_sums(words: Tensor) -> Tensor:
    """[rows], int64, of [words], int32; the last row may be shorter."""
    import torch

    multipliers = _multipliers(words.device)
    num_whole = len(words) // ROW
    step = ROWS_AT_A_TIME[words.device.type]
    whole = words[: num_whole * ROW].view(num_whole, ROW)
    sums = [(whole[i : i + step] * multipliers).sum(1) for i in range(0, num_whole, step)]
    rest = words[num_whole * ROW :]
    if len(rest):
        sums.append((rest * multipliers[: len(rest)]).sum(0, keepdim=True))
    return torch.cat(sums)


@functools.lru_cache
def _multipliers(device: torch.device) -> Tensor:
    """[ROW], int64, odd: k golden-ratio steps, mixed as SplitMix64 does it (Steele et al., OOPSLA 2014)."""
    import torch

    z = np.arange(1, ROW + 1, dtype=np.uint64) * np.uint64(BASE)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    z = (z ^ (z >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(z.view(np.int64)).to(device)
