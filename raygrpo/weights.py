"""Weights from the learner to the generators: one buffer, an index, digests.

`pack` copies named tensors into one buffer; the result goes through `ray.put` once and every node maps it without a
copy; `unpack` checks each byte and gives back tensors that view the buffer. A transfer is thus one message however many
parameters a model has, and weights that were damaged on the way are refused before an engine sees any of them.

Who gathers the tensors (DeepSpeed) and who loads them (the sampling engines) is not known here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

ALIGNMENT = 64  # bytes; every tensor starts at a multiple of it, so that views of any dtype are aligned


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTensor:
    """Where one tensor lies in the buffer."""

    name: str
    dtype: str  # of torch, e.g. "bfloat16"
    shape: tuple[int, ...]
    offset: int  # bytes
    num_bytes: int
    digest: int  # xxh3_64 of the bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeights:
    """All tensors of a model in one buffer. Pickles without a copy of the buffer (protocol 5), as `ray.put` does."""

    index: tuple[PackedTensor, ...]
    index_digest: int  # of the index with the tensors' digests in it: one number that stands for the whole
    buffer: np.ndarray  # [bytes], uint8

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.index)


def pack(tensors: Iterable[tuple[str, Tensor]]) -> PackedWeights:
    """Copy the tensors, in order, into one buffer. The iterable may gather each tensor just before it yields it and
    free it after.
    """
    import torch

    buffer = bytearray()  # grows by remapping pages, not by copying what it holds
    index: list[PackedTensor] = []
    seen: set[str] = set()
    for name, tensor in tensors:
        if name in seen:
            raise ValueError(f"two tensors are named {name!r}")
        seen.add(name)
        data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
        buffer.extend(bytes(-len(buffer) % ALIGNMENT))
        index.append(
            PackedTensor(
                name=name,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                offset=len(buffer),
                num_bytes=data.nbytes,
                digest=_digest(data),
            )
        )
        buffer.extend(memoryview(data))
    return PackedWeights(
        index=tuple(index), index_digest=_index_digest(index), buffer=np.frombuffer(buffer, dtype=np.uint8)
    )


def unpack(packed: PackedWeights) -> dict[str, Tensor]:
    """The tensors by name, as views of the buffer (read-only where the buffer is, as in Ray's object store: never write
    to them).

    Everything is verified before anything is returned. Raises ValueError that names the tensor whose bytes are not
    those that were packed.
    """
    import torch

    if _index_digest(packed.index) != packed.index_digest:
        raise ValueError("the index of the packed weights is damaged: its digest does not match")
    tensors: dict[str, Tensor] = {}
    for entry in packed.index:
        data = packed.buffer[entry.offset : entry.offset + entry.num_bytes]
        if data.nbytes != entry.num_bytes:
            raise ValueError(
                f"packed weights are cut short: {entry.name!r} ends at byte {entry.offset + entry.num_bytes}, "
                f"the buffer at {packed.buffer.nbytes}"
            )
        if _digest(data) != entry.digest:
            raise ValueError(f"packed weights are damaged: the digest of {entry.name!r} does not match its bytes")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            flat = torch.from_numpy(data)
        tensors[entry.name] = flat.view(getattr(torch, entry.dtype)).reshape(entry.shape)
    return tensors


def _digest(data: np.ndarray) -> int:
    import xxhash

    return xxhash.xxh3_64_intdigest(data)


def _index_digest(index: Iterable[PackedTensor]) -> int:
    import xxhash

    return xxhash.xxh3_64_intdigest(repr(list(index)).encode())
