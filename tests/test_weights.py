"""Packed weights: what comes out is what went in, to the bit, or an error that names the tensor."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch

from raygrpo.weights import ALIGNMENT, PackedWeights, pack, unpack


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(33, 17, generator=generator)
    return {
        "float32": matrix,
        "bfloat16": matrix.bfloat16(),
        "float16": matrix.half(),
        "transposed": matrix.t(),
        "scalar": torch.tensor(-0.0),
        "special": torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-45]),
        "empty": torch.empty(0, 5),
        "integers": torch.arange(7, dtype=torch.int64),
        "flags": torch.tensor([True, False, True]),
        "parameter": torch.nn.Parameter(matrix[:3].double()),
    }


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_equal_to_the_bit(unpacked: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(unpacked) == list(expected)
    for name, tensor in expected.items():
        assert unpacked[name].dtype == tensor.dtype, name
        assert unpacked[name].shape == tensor.shape, name
        assert bits(unpacked[name]) == bits(tensor), name


def damaged(packed: PackedWeights, byte: int) -> PackedWeights:
    buffer = packed.buffer.copy()
    buffer[byte] ^= 1
    return dataclasses.replace(packed, buffer=buffer)


def test_unpacked_tensors_are_the_packed_ones_to_the_bit():
    assert_equal_to_the_bit(unpack(pack(tensors().items())), tensors())


def test_a_copy_made_by_pickling_out_of_band_is_equal_and_views_the_received_buffer():
    """What `ray.put` and `ray.get` do: the buffer travels beside the pickle, and arrives read-only."""
    packed = pack(tensors().items())
    buffers: list[pickle.PickleBuffer] = []
    message = pickle.dumps(packed, protocol=5, buffer_callback=buffers.append)
    assert len(message) < 4000
    received = [memoryview(bytes(buffer.raw())) for buffer in buffers]
    copy = pickle.loads(message, buffers=received)
    assert not copy.buffer.flags.writeable
    unpacked = unpack(copy)
    assert_equal_to_the_bit(unpacked, tensors())
    start = np.frombuffer(received[0], dtype=np.uint8).ctypes.data
    for name, tensor in unpacked.items():
        assert tensor.numel() == 0 or start <= tensor.data_ptr() < start + packed.buffer.nbytes, name


def test_tensors_start_at_aligned_offsets_and_the_size_counts_no_padding():
    packed = pack(tensors().items())
    assert all(entry.offset % ALIGNMENT == 0 for entry in packed.index)
    assert packed.num_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors().values())


def test_a_tensor_may_be_freed_or_overwritten_after_it_was_yielded():
    def gathered():
        scratch = torch.empty(4)
        for i in range(3):
            scratch.fill_(i)
            yield f"t{i}", scratch

    unpacked = unpack(pack(gathered()))
    assert [unpacked[f"t{i}"].tolist() for i in range(3)] == [[i] * 4 for i in range(3)]


def test_a_flipped_bit_is_found_wherever_it_is_and_its_tensor_named():
    packed = pack(tensors().items())
    for entry in packed.index:
        for byte in range(entry.offset, entry.offset + entry.num_bytes, 97):
            with pytest.raises(ValueError, match=f"digest of '{entry.name}'"):
                unpack(damaged(packed, byte))


def test_a_buffer_cut_short_is_refused():
    packed = pack(tensors().items())
    with pytest.raises(ValueError, match="cut short: 'parameter' ends at byte"):
        unpack(dataclasses.replace(packed, buffer=packed.buffer[:-1]))


@pytest.mark.parametrize("change", [{"name": "other"}, {"dtype": "bfloat16"}, {"shape": (17, 33)}, {"digest": 1}])
def test_a_changed_index_is_refused(change):
    packed = pack(tensors().items())
    index = (dataclasses.replace(packed.index[0], **change), *packed.index[1:])
    with pytest.raises(ValueError, match="index of the packed weights is damaged"):
        unpack(dataclasses.replace(packed, index=index))


def test_swapped_tensors_are_refused():
    """Each tensor's bytes are sound, but not at their place."""
    packed = pack([("a", torch.zeros(16)), ("b", torch.ones(16))])
    swapped = np.concatenate([packed.buffer[64:], packed.buffer[:64]])
    with pytest.raises(ValueError, match="digest of 'a'"):
        unpack(dataclasses.replace(packed, buffer=swapped))


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two tensors are named 'a'"):
        pack([("a", torch.zeros(1)), ("a", torch.ones(1))])
