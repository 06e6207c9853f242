"""Snapshots: what lies in the buckets is what was published, to the bit, or an error that names the tensor."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from raygrpo.snapshot import ALIGNMENT, BASE, ROW, ROWS_AT_A_TIME, Snapshot, digests, layout, open_bucket, take_snapshot
from tests.test_weights import assert_equal_to_the_bit, tensors

SMALL = 4096  # bytes of a bucket: several are needed, and one tensor is larger


def opened(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    places = layout(snapshot.index, snapshot.bucket_bytes)
    assert [slots[-1].end for slots in places] == [len(bucket) for bucket in snapshot.buckets]
    found = [
        tensor for bucket, slots in zip(snapshot.buckets, places, strict=True) for tensor in open_bucket(bucket, slots)
    ]
    return dict(found)


@pytest.mark.parametrize("bucket_bytes", [64, SMALL, 2**20])
def test_opened_tensors_are_the_published_ones_to_the_bit(bucket_bytes):
    published = tensors() | {"bytes": torch.arange(-5, 8, dtype=torch.int8), "large": torch.randn(3000)}
    snapshot = take_snapshot(published.items(), bucket_bytes=bucket_bytes)
    assert_equal_to_the_bit(opened(snapshot), published)
    assert snapshot.num_bytes == sum(t.numel() * t.element_size() for t in published.values())


def test_no_bucket_is_larger_than_asked_for_unless_one_tensor_fills_it():
    published = {f"t{i}": torch.randn(100 * i) for i in range(20)}
    snapshot = take_snapshot(published.items(), bucket_bytes=SMALL)
    assert len(snapshot.buckets) > 3
    for bucket, slots in zip(snapshot.buckets, layout(snapshot.index, SMALL), strict=True):
        assert len(bucket) <= SMALL or len(slots) == 1
        assert all(slot.start % ALIGNMENT == 0 for slot in slots)


def test_buckets_hold_no_more_memory_than_is_in_them_but_for_a_quarter():
    published = {"small": torch.zeros(10), "larger than a bucket": torch.zeros(2000), "last": torch.zeros(10)}
    for bucket in take_snapshot(published.items(), bucket_bytes=SMALL).buckets:
        assert bucket.untyped_storage().nbytes() <= len(bucket) / 0.75


def test_tensors_may_change_or_be_freed_after_they_were_yielded():
    parameter = torch.arange(6.0)

    def gathered():
        scratch = torch.empty(4)
        for i in range(3):
            scratch.fill_(i)
            yield f"t{i}", scratch
        yield "parameter", parameter

    snapshot = take_snapshot(gathered())
    parameter += 1
    found = opened(snapshot)
    assert [found[f"t{i}"].tolist() for i in range(3)] == [[i] * 4 for i in range(3)]
    assert found["parameter"].tolist() == list(range(6))


def test_a_flipped_bit_is_found_wherever_it_is_and_its_tensor_named():
    snapshot = take_snapshot(tensors().items(), bucket_bytes=SMALL)
    for bucket, slots in zip(snapshot.buckets, layout(snapshot.index, SMALL), strict=True):
        for slot in slots:
            for byte in range(slot.start, slot.end, 37):
                bucket[byte] ^= 16
                with pytest.raises(ValueError, match=f"digest of '{slot.entry.name}'"):
                    open_bucket(bucket, slots)
                bucket[byte] ^= 16
        open_bucket(bucket, slots)


def test_swapped_words_and_swapped_rows_change_the_digest():
    words = torch.randint(-(2**31), 2**31 - 1, (3 * ROW + 5,), dtype=torch.int32)
    before = digests([words.view(torch.uint8)])
    for first, second in [(0, 1), (7, 7 + ROW), (ROW - 1, ROW), (3 * ROW, 3 * ROW + 4)]:
        other = words.clone()
        other[[first, second]] = words[[second, first]]
        assert digests([other.view(torch.uint8)]) != before
    rows = words[: 3 * ROW].view(3, ROW)[[1, 0, 2]].reshape(-1)
    assert digests([torch.cat([rows, words[3 * ROW :]]).view(torch.uint8)]) != before


def test_the_digest_is_the_documented_sum_however_many_rows_are_computed_at_a_time(monkeypatch):
    """In Python's integers, which do not wrap around by themselves: what any device must arrive at."""
    words = torch.randint(-(2**31), 2**31 - 1, (2 * ROW + 3,), dtype=torch.int32)
    multipliers = []
    for k in range(1, ROW + 1):
        z = k * BASE % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        multipliers.append((z ^ (z >> 31)) | 1)
    expected = 0
    for start in range(0, len(words), ROW):
        row = words[start : start + ROW].tolist()
        total = sum(w * m for w, m in zip(row, multipliers, strict=False))
        expected = (expected * BASE + total) % 2**64
    for rows in (1, 2, 64):
        monkeypatch.setitem(ROWS_AT_A_TIME, "cpu", rows)
        assert digests([words.view(torch.uint8)]) == [expected]


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two tensors are named 'a'"):
        take_snapshot([("a", torch.zeros(1)), ("a", torch.ones(1))])


def test_no_tensors_make_no_buckets():
    snapshot = take_snapshot([])
    assert (snapshot.index, snapshot.buckets, snapshot.num_bytes) == ((), (), 0)


def test_a_changed_index_has_another_digest():
    snapshot = take_snapshot([("a", torch.zeros(3))])
    from raygrpo.weights import index_digest

    assert index_digest(snapshot.index) == snapshot.index_digest
    assert index_digest([dataclasses.replace(snapshot.index[0], shape=(1, 3))]) != snapshot.index_digest


@pytest.mark.gpu
def test_the_digest_is_the_same_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    part = torch.randint(0, 255, (4 * (130 * ROW + 7),), dtype=torch.uint8)
    assert digests([part.cuda()]) == digests([part])
