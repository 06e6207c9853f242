"""Weights from the learner to the generators: one object, an index, digests.

`pack` makes one object of named tensors. It goes through `ray.put` once, which copies the bytes into shared memory, and
every node maps it from there; `unpack` checks each byte and gives back tensors that view it. A transfer is thus one
message however many parameters a model has, and weights that were damaged on the way are refused before an engine sees
any of them.

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


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTensor:
    """What the bytes of one tensor mean."""

    name: str
    dtype: str  # of torch, e.g. "bfloat16"
    shape: tuple[int, ...]
    num_bytes: int
    digest: int  # of the bytes: xxh3_64; on a device snapshot.digests


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeights:
    """All tensors of a model. Pickled with protocol 5, as `ray.put` does it, the bytes travel beside the pickle,
    uncopied.
    """

    index: tuple[PackedTensor, ...]
    index_digest: int  # of the index with the tensors' digests in it: one number that stands for the whole
    data: tuple[np.ndarray, ...]  # for each tensor its bytes, uint8

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.index)


def pack(tensors: Iterable[tuple[str, Tensor]], *, copy: bool = True) -> PackedWeights:
    """Pack the tensors, in order. The iterable may gather each tensor just before it yields it and free it after.

    copy: false saves a copy of tensors in CPU memory; they must then stay as they are until the result is in Ray's
    store (parameters between two updates do, what ZeRO-3 gathers does not).
    """
    import torch

    index: list[PackedTensor] = []
    data: list[np.ndarray] = []
    seen: set[str] = set()
    for name, tensor in tensors:
        if name in seen:
            raise ValueError(f"two tensors are named {name!r}")
        seen.add(name)
        on_cpu = tensor.detach().to("cpu").contiguous()
        if copy and on_cpu.data_ptr() == tensor.data_ptr():
            on_cpu = on_cpu.clone()
        array = on_cpu.reshape(-1).view(torch.uint8).numpy()
        data.append(array)
        index.append(
            PackedTensor(
                name=name,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                num_bytes=array.nbytes,
                digest=_digest(array),
            )
        )
    return PackedWeights(index=tuple(index), index_digest=index_digest(index), data=tuple(data))


def unpack(packed: PackedWeights) -> dict[str, Tensor]:
    """The tensors by name, as views of the packed bytes: read-only memory in Ray's object store, never to be written
    to.

    Everything is verified before anything is returned. Raises ValueError that names the tensor whose bytes are not
    those that were packed.
    """
    import torch

    if index_digest(packed.index) != packed.index_digest:
        raise ValueError("the index of the packed weights is damaged: its digest does not match")
    if len(packed.data) != len(packed.index):
        raise ValueError(f"packed weights hold {len(packed.data)} of {len(packed.index)} tensors")
    tensors: dict[str, Tensor] = {}
    for entry, array in zip(packed.index, packed.data, strict=True):
        if array.nbytes != entry.num_bytes:
            raise ValueError(
                f"packed weights are damaged: {entry.name!r} has {array.nbytes} of {entry.num_bytes} bytes"
            )
        if _digest(array) != entry.digest:
            raise ValueError(f"packed weights are damaged: the digest of {entry.name!r} does not match its bytes")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            flat = torch.from_numpy(array) if array.size else torch.empty(0, dtype=torch.uint8)
        tensors[entry.name] = flat.view(getattr(torch, entry.dtype)).reshape(entry.shape)
    return tensors


def _digest(data: np.ndarray) -> int:
    import xxhash

    return xxhash.xxh3_64_intdigest(data.data)


def index_digest(index: Iterable[PackedTensor]) -> int:
    import xxhash

    return xxhash.xxh3_64_intdigest(repr(list(index)).encode())
