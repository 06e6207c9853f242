"""Packed weights: what comes out is what went in, to the bit, or an error that names the tensor."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch

from raygrpo.weights import PackedWeights, pack, unpack


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


def with_data(packed: PackedWeights, position: int, array: np.ndarray) -> PackedWeights:
    return dataclasses.replace(packed, data=(*packed.data[:position], array, *packed.data[position + 1 :]))


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
    assert not any(array.flags.writeable for array in copy.data)
    unpacked = unpack(copy)
    assert_equal_to_the_bit(unpacked, tensors())
    received_at = {np.frombuffer(buffer, dtype=np.uint8).ctypes.data for buffer in received if buffer.nbytes}
    assert {tensor.data_ptr() for tensor in unpacked.values() if tensor.numel()} == received_at


def test_the_size_is_that_of_the_tensors():
    assert pack(tensors().items()).num_bytes == sum(t.numel() * t.element_size() for t in tensors().values())


def test_without_a_copy_the_packed_weights_are_the_tensors_own_memory():
    """What copy=False saves, and why the tensors must stay as they are."""
    tensor = torch.arange(6.0)
    copied, shared = pack([("a", tensor)]), pack([("a", tensor)], copy=False)
    assert shared.data[0].ctypes.data == tensor.data_ptr() != copied.data[0].ctypes.data
    assert_equal_to_the_bit(unpack(shared), {"a": tensor})
    tensor += 1
    assert_equal_to_the_bit(unpack(copied), {"a": tensor - 1})
    with pytest.raises(ValueError, match="digest of 'a'"):
        unpack(shared)


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
    for position, entry in enumerate(packed.index):
        for byte in range(0, entry.num_bytes, 97):
            array = packed.data[position].copy()
            array[byte] ^= 1
            with pytest.raises(ValueError, match=f"digest of '{entry.name}'"):
                unpack(with_data(packed, position, array))


def test_missing_bytes_and_missing_tensors_are_refused():
    packed = pack(tensors().items())
    with pytest.raises(ValueError, match="'parameter' has 407 of 408 bytes"):
        unpack(with_data(packed, len(packed.data) - 1, packed.data[-1][:-1]))
    with pytest.raises(ValueError, match="hold 9 of 10 tensors"):
        unpack(dataclasses.replace(packed, data=packed.data[:-1]))


@pytest.mark.parametrize("change", [{"name": "other"}, {"dtype": "bfloat16"}, {"shape": (17, 33)}, {"digest": 1}])
def test_a_changed_index_is_refused(change):
    packed = pack(tensors().items())
    index = (dataclasses.replace(packed.index[0], **change), *packed.index[1:])
    with pytest.raises(ValueError, match="index of the packed weights is damaged"):
        unpack(dataclasses.replace(packed, index=index))


def test_swapped_tensors_are_refused():
    """Each tensor's bytes are sound, but not at their place."""
    packed = pack([("a", torch.zeros(16)), ("b", torch.ones(16))])
    with pytest.raises(ValueError, match="digest of 'a'"):
        unpack(dataclasses.replace(packed, data=packed.data[::-1]))


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two tensors are named 'a'"):
        pack([("a", torch.zeros(1)), ("a", torch.ones(1))])
