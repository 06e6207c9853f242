"""Direct transfers: what is pulled is what was published, to the bit; whoever fails takes nobody along.

Real sockets and real gloo groups; whoever is killed or stopped is a process of its own. On GPUs only the process
group's class and the device differ: the last test here, which has not been run.
"""

from __future__ import annotations

import dataclasses
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from raygrpo.direct_transfer import Offer, WeightsServer
from raygrpo.types import TransferError
from tests.pulling_process import PullingProcess, ServingProcess
from tests.test_weights import assert_equal_to_the_bit, bits, tensors

pytestmark = pytest.mark.timeout(180)
HOST = "127.0.0.1"
TIMEOUT_S = 3.0
BUCKET = 2**20


def large_tensors(seed: int = 0, count: int = 6) -> dict[str, torch.Tensor]:
    """Each fills a bucket."""
    generator = torch.Generator().manual_seed(seed)
    return {f"t{i}": torch.randn(BUCKET // 4, generator=generator) for i in range(count)}


def as_bytes(published: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in published.items()}


@pytest.fixture
def server() -> Iterator[WeightsServer]:
    server = WeightsServer(HOST, timeout_s=TIMEOUT_S, grace_s=1.0)
    yield server
    server.close()


def publish(server: WeightsServer, version: int, published: dict[str, torch.Tensor]) -> Offer:
    return server.publish(version, published.items(), bucket_bytes=BUCKET)


def pull(offer: Offer) -> dict[str, torch.Tensor]:
    receiver = offer.receiver()
    try:
        return dict(receiver.begin(offer))
    finally:
        receiver.close()


@pytest.mark.parametrize("bucket_bytes", [64, 4096, 2**20])
def test_pulled_tensors_are_the_published_ones_to_the_bit(server, bucket_bytes):
    published = tensors() | {"bytes": torch.arange(-5, 8, dtype=torch.int8)}
    offer = server.publish(3, published.items(), bucket_bytes=bucket_bytes)
    assert offer.num_bytes == sum(tensor.numel() * tensor.element_size() for tensor in published.values())
    assert_equal_to_the_bit(pull(offer), published)


def test_a_connection_is_used_again_for_later_versions_and_replaced_when_it_is_closed(server):
    first = publish(server, 1, large_tensors(1))
    receiver = first.receiver()
    assert_equal_to_the_bit(dict(receiver.begin(first)), large_tensors(1))
    second = publish(server, 2, large_tensors(2))
    assert second.receiver(receiver) is receiver
    assert_equal_to_the_bit(dict(receiver.begin(second)), large_tensors(2))
    receiver.close()
    again = second.receiver(receiver)
    assert again is not receiver
    assert_equal_to_the_bit(dict(again.begin(second)), large_tensors(2))
    again.close()


def test_a_newcomer_may_ask_long_after_the_publish_while_the_parameters_change(server):
    live = large_tensors()
    offer = publish(server, 1, live)
    for tensor in live.values():
        tensor.fill_(0)
    assert_equal_to_the_bit(pull(offer), large_tensors())
    time.sleep(2 * TIMEOUT_S)
    assert_equal_to_the_bit(pull(offer), large_tensors())


def test_a_flipped_byte_is_refused_with_its_tensors_name(server):
    offer = publish(server, 1, large_tensors())
    server._snapshots[1].buckets[0][12345] ^= 1
    with pytest.raises(ValueError, match="digest of 't0'"):
        pull(offer)
    server._snapshots[1].buckets[0][12345] ^= 1
    server._snapshots[1].buckets[3][99] ^= 1
    seen = []
    with pytest.raises(ValueError, match="digest of 't3'"):
        seen.extend(name for name, _ in offer.receiver().begin(offer))
    assert seen == [] or seen == ["t0", "t1", "t2"]
    server._snapshots[1].buckets[3][99] ^= 1
    assert_equal_to_the_bit(pull(offer), large_tensors())


def test_a_damaged_offer_is_refused(server):
    offer = publish(server, 1, large_tensors())
    index = (dataclasses.replace(offer.index[0], shape=(1, BUCKET // 4)), *offer.index[1:])
    with pytest.raises(ValueError, match="index of the offered weights is damaged"):
        pull(dataclasses.replace(offer, index=index))


def test_several_ranks_of_one_engine_receive_everything_together(server):
    """What tensor parallelism makes of it."""
    published = large_tensors()
    offer = publish(server, 1, published)
    found: dict[int, Any] = {}

    def receive(rank: int) -> None:
        receiver = offer.receiver(party="engine", rank=rank, size=4)
        found[rank] = dict(receiver.begin(offer))
        receiver.close()

    threads = [threading.Thread(target=receive, args=(rank,)) for rank in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for rank in (1, 2, 3):
        assert_equal_to_the_bit(found[rank], published)


def test_a_rank_whose_others_do_not_come_gives_up(server):
    offer = publish(server, 1, large_tensors())
    start = time.monotonic()
    with pytest.raises(TransferError, match="said nothing for 3 s"):
        offer.receiver(party="engine", rank=1, size=3)
    assert time.monotonic() - start < 2 * TIMEOUT_S
    assert_equal_to_the_bit(pull(offer), large_tensors())
    assert server._arriving == {}


def test_a_receiver_that_is_killed_in_the_middle_costs_nobody_else_anything(server):
    published = large_tensors()
    offer = publish(server, 1, published)
    dying, living = PullingProcess(offer), PullingProcess(offer)
    dying.begun()
    living.begun()
    dying.kill()
    assert living.go_on() == as_bytes(published)
    start = time.monotonic()
    publish(server, 2, large_tensors(2))  # needs the room of version 1
    assert time.monotonic() - start < 0.5
    living.kill()
    assert_equal_to_the_bit(pull(publish(server, 3, large_tensors(3))), large_tensors(3))


def test_a_receiver_that_hangs_delays_a_publish_by_the_grace_and_nobody_else(server):
    published = large_tensors()
    offer = publish(server, 1, published)
    hanging, living = PullingProcess(offer), PullingProcess(offer)
    hanging.begun()
    living.begun()
    hanging.stop()
    assert living.go_on() == as_bytes(published)
    bucket = weakref.ref(server._snapshots[1].buckets[2])
    start = time.monotonic()
    offer = publish(server, 2, large_tensors(2))
    assert 0.9 < time.monotonic() - start < 2.5, "grace_s is 1"
    assert bucket() is None, "the memory of the version that hung is free"
    assert_equal_to_the_bit(pull(offer), large_tensors(2))
    hanging.kill()
    living.kill()


def test_a_receiver_that_hangs_is_given_up_also_without_a_publish(server):
    hanging = PullingProcess(publish(server, 1, large_tensors()))
    hanging.begun()
    assert len(server._pullers(1)) == 1
    hanging.stop()
    deadline = time.monotonic() + 3 * TIMEOUT_S
    while server._pullers(1) or server._parties:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    hanging.kill()


def test_a_slow_receiver_gets_the_old_version_within_the_grace_and_else_an_error(server):
    published = large_tensors()
    offer = publish(server, 1, published)
    slow, too_slow = PullingProcess(offer), PullingProcess(offer)
    slow.begun()
    too_slow.begun()
    newer: list[Offer] = []
    publishing = threading.Thread(target=lambda: newer.append(publish(server, 2, large_tensors(2))))
    publishing.start()
    time.sleep(0.2)
    with pytest.raises(TransferError, match="does not keep version 1 any more"):
        pull(offer)
    assert slow.go_on() == as_bytes(published)
    publishing.join(10)
    result = too_slow.go_on()
    assert isinstance(result, str) and result.startswith("TransferError: "), result
    assert_equal_to_the_bit(pull(newer[0]), large_tensors(2))
    slow.kill()
    too_slow.kill()


def test_two_versions_are_kept_where_asked_for():
    server = WeightsServer(HOST, timeout_s=TIMEOUT_S, keep=2)
    offers = [publish(server, version, large_tensors(version)) for version in range(3)]
    for version in (1, 2):
        assert_equal_to_the_bit(pull(offers[version]), large_tensors(version))
    with pytest.raises(TransferError, match="does not keep version 0 any more"):
        pull(offers[0])
    server.close()


def test_a_sender_that_dies_in_the_middle_is_an_error_at_once():
    sender = ServingProcess(BUCKET, timeout_s=60.0)
    offer = sender.offer
    received = offer.receiver().begin(offer)
    assert next(received)[0] == "t0"
    sender.kill()
    start = time.monotonic()
    with pytest.raises(TransferError):
        list(received)
    with pytest.raises(TransferError, match=r"the learner at .* does not answer"):
        offer.receiver()
    assert time.monotonic() - start < 5.0


def test_a_sender_that_hangs_is_an_error_at_the_deadline():
    sender = ServingProcess(64 * BUCKET, timeout_s=TIMEOUT_S)
    offer = sender.offer
    received = offer.receiver().begin(offer)
    sender.stop()
    start = time.monotonic()
    with pytest.raises(TransferError):
        list(received)
    assert time.monotonic() - start < 3 * TIMEOUT_S
    sender.kill()


def test_another_server_at_the_same_address_sends_nothing(server):
    """A learner that was restarted may get the port of the one before."""
    offer = publish(server, 1, large_tensors())
    stranger = dataclasses.replace(offer, server=dataclasses.replace(offer.server, token="of another"))
    with pytest.raises(TransferError, match="not the learner that offered"):
        pull(stranger)
    with socket.create_connection((HOST, offer.server.port)) as noise:
        noise.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert_equal_to_the_bit(pull(offer), large_tensors())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two GPUs for two ranks")
def test_from_gpu_to_gpu(server):  # has not been run
    published = {name: tensor.to("cuda:0") for name, tensor in (tensors() | large_tensors()).items()}
    offer = publish(server, 1, published)
    assert offer.backend == "nccl"
    with torch.cuda.device(1):
        found = pull(offer)
    assert {tensor.device.index for tensor in found.values()} == {1}
    expected = {name: tensor.cpu() for name, tensor in published.items()}
    assert_equal_to_the_bit({name: tensor.cpu() for name, tensor in found.items()}, expected)
