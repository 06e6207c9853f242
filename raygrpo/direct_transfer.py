"""Weights from the learner to the generators, device to device: who keeps them, who asks, who gets them.

The learner of rank 0 keeps each published version as a snapshot on its own device (snapshot.py) and hands out an
`Offer`: where it is and what it consists of, without the bytes. Whoever holds the offer may pull: a generator that
publishes reach, one that was restarted, a newcomer. Each generator has a connection and a process group of its own with
the learner (transfer_group.py), which stay for later versions, so nobody waits for anybody else's:

    receiver                                    sender (a thread for each generator)
    token, party, rank, size                ->
                                            <-  port of the store by which the group is formed
    version                                 ->
                                            <-  yes, or why not
    number of the next bucket               ->  only then its bytes are sent: a slow receiver holds no kernel
    ...
    done                                    ->

With tensor parallelism the ranks of one engine are one party, and all receive every bucket. Every bucket is verified
before a tensor of it is given away.

A receiver that dies, hangs or is slow costs its own transfer: the sender's thread closes the connection and gives the
group up. A sender that dies closes all connections, and each receiver raises. A version goes when room is needed for
the next (`WeightsServer.publish`).
"""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from raygrpo.snapshot import BUCKET_BYTES, Snapshot, layout, open_bucket, take_snapshot
from raygrpo.transfer_group import Backend, Channel, TransferGroup, device_for
from raygrpo.types import TransferError
from raygrpo.weights import PackedTensor, index_digest

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import TCPStore, Work  # type: ignore[attr-defined]

logger = logging.getLogger(__name__)

TIMEOUT_S = 60.0  # for the other side to do its next step: to answer, to join, to take or bring a bucket
GRACE_S = 20.0  # that pulls of the oldest version have to end in when the next needs its room
RELEASE_S = 5.0  # for threads to let go of a version after that


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerAddress:
    host: str
    port: int
    token: str  # of this server: another that got the port does not know it


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A version that can be pulled, for as long as the server keeps it."""

    server: ServerAddress
    version: int
    backend: Backend
    index: tuple[PackedTensor, ...]
    index_digest: int
    bucket_bytes: int
    timeout_s: float

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.index)

    def receiver(self, previous: Receiver | None = None, *, party: str = "", rank: int = 1, size: int = 2) -> Receiver:
        """A connection to the server: the previous one if that is still good, else a new one.

        party: a name that no other transfer has, the same on the ranks 1 .. size - 1 that receive together; may be left
        out where there is one. Raises TransferError when the server is not there, ValueError where there is no device
        of the offered kind.
        """
        if previous is not None:
            if previous.server == self.server and previous.is_open:
                return previous
            previous.close()
        return Receiver(self, party=party or secrets.token_hex(8), rank=rank, size=size)


class Receiver:
    """A generator's end, or that of one rank of its engine. After any error it is closed."""

    def __init__(self, offer: Offer, *, party: str, rank: int, size: int):
        self.server = server = offer.server
        self._timeout_s = offer.timeout_s
        self._device = device_for(offer.backend)
        self._first: list[tuple[str, Tensor]] = []
        self._channel = Channel.connect(server.host, server.port, self._timeout_s, "the learner")
        try:
            self._channel.send(token=server.token, party=party, rank=rank, size=size)
            self._store = _store(server.host, self._answer()["store"], self._timeout_s)
            self._group = TransferGroup(
                offer.backend,
                self._store,
                rank=rank,
                size=size,
                address=self._channel.own_address,
                channels=[self._channel],
                timeout_s=self._timeout_s,
            )
        except BaseException:
            self._channel.close()
            raise

    @property
    def is_open(self) -> bool:
        return self._channel.is_open

    def begin(self, offer: Offer) -> Iterator[tuple[str, Tensor]]:
        """Pull what is offered: (name, tensor) in the published order, views of buckets on this rank's device.

        The first bucket has arrived when this returns, so most of what can fail has not. Raises TransferError when the
        server does not have the version any more or is gone, ValueError when bytes are not what was published; so does
        the iterator, which must be exhausted.
        """
        try:
            if index_digest(offer.index) != offer.index_digest:
                raise ValueError("the index of the offered weights is damaged: its digest does not match")
            self._channel.send(version=offer.version)
            self._answer()
            buckets = self._buckets(offer)
            first = next(buckets, [])
        except BaseException:
            self.close()
            raise
        return self._tensors(first, buckets)

    def _tensors(
        self, first: list[tuple[str, Tensor]], buckets: Iterator[list[tuple[str, Tensor]]]
    ) -> Iterator[tuple[str, Tensor]]:
        is_whole = False
        try:
            yield from first
            del first
            for bucket in buckets:
                yield from bucket
            self._channel.send(done=True)
            is_whole = True
        finally:
            if not is_whole:
                self.close()

    def _buckets(self, offer: Offer) -> Iterator[list[tuple[str, Tensor]]]:
        """The tensors of each bucket, verified, while the next bucket is on its way."""
        slots = layout(offer.index, offer.bucket_bytes)
        coming = self._ask(0, slots[0][-1].end) if slots else None
        for number, expected in enumerate(slots):
            assert coming is not None
            bucket, work = coming
            self._group.finish(work)
            coming = None
            tensors = open_bucket(bucket, expected)
            if number + 1 < len(slots):
                coming = self._ask(number + 1, slots[number + 1][-1].end)
            yield tensors

    def _ask(self, number: int, num_bytes: int) -> tuple[Tensor, Work]:
        import torch

        bucket = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        self._channel.send(bucket=number)
        return bucket, self._group.start(bucket)

    def _answer(self) -> dict:
        answer = self._channel.receive(self._timeout_s)
        if "error" in answer:
            raise TransferError(answer["error"])
        return answer

    def close(self) -> None:
        self._channel.close()
        self._group.abort()


@dataclass(eq=False, slots=True)
class _Party:
    """The receivers of one generator, at the sender."""

    channels: list[Channel]
    pulls: int | None = None  # the version that they are being sent

    def close(self) -> None:
        for channel in self.channels:
            channel.close()


class WeightsServer:
    """The learner's end. `publish` is for one thread; the others, one for each generator, are its own."""

    def __init__(self, host: str, *, keep: int = 1, timeout_s: float = TIMEOUT_S, grace_s: float = GRACE_S):
        """host: this machine's address, for the generators. keep: versions that are there at a time; the room for them
        is the snapshots'. timeout_s: see TIMEOUT_S; grace_s: see GRACE_S."""
        self._listener = socket.create_server((host, 0))
        self._address = ServerAddress(host=host, port=self._listener.getsockname()[1], token=secrets.token_hex(16))
        self._keep = keep
        self._timeout_s = timeout_s
        self._grace_s = grace_s
        self._backend: Backend = "gloo"  # from the first publish on that of the tensors' device
        self._snapshots: dict[int, Snapshot] = {}  # by version, oldest first
        self._parties: set[_Party] = set()
        self._arriving: dict[str, dict[int, Channel]] = {}  # parties of which not all ranks have come
        self._changed = threading.Condition()
        self._is_closed = False
        threading.Thread(target=self._accept, name="weights", daemon=True).start()

    def publish(
        self, version: int, tensors: Iterable[tuple[str, Tensor]], *, bucket_bytes: int = BUCKET_BYTES
    ) -> Offer:
        """Copy the tensors and offer them as `version`; the iterable is as for `take_snapshot`.

        The oldest version goes first if there are `keep` already: from now on nobody can begin to pull it, and who has
        begun is waited for, for grace_s at most.
        """
        self._make_room()
        snapshot = take_snapshot(tensors, bucket_bytes=bucket_bytes)
        self._backend = "nccl" if snapshot.buckets and snapshot.buckets[0].is_cuda else "gloo"
        with self._changed:
            self._snapshots[version] = snapshot
        return Offer(
            server=self._address,
            version=version,
            backend=self._backend,
            index=snapshot.index,
            index_digest=snapshot.index_digest,
            bucket_bytes=bucket_bytes,
            timeout_s=self._timeout_s,
        )

    def _make_room(self) -> None:
        with self._changed:
            while len(self._snapshots) >= self._keep:
                oldest = next(iter(self._snapshots))
                del self._snapshots[oldest]
                if self._wait_until_unused(oldest, self._grace_s):
                    continue
                for party in self._pullers(oldest):
                    logger.warning("%s is too slow: version %d goes", party.channels[0].peer, oldest)
                    party.close()
                if not self._wait_until_unused(oldest, RELEASE_S):
                    logger.warning("a transfer of version %d does not end: its memory is still held", oldest)

    def _wait_until_unused(self, version: int, timeout_s: float) -> bool:
        return self._changed.wait_for(lambda: not self._pullers(version), timeout_s)

    def _pullers(self, version: int) -> list[_Party]:
        return [party for party in self._parties if party.pulls == version]

    def close(self) -> None:
        """Offer nothing any more, and close every connection."""
        self._is_closed = True
        with self._changed:
            self._snapshots.clear()
            parties = list(self._parties)
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for party in parties:
            party.close()

    # In threads of its own.

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                connection, peer = self._listener.accept()
            except OSError as error:
                if not self._is_closed:
                    logger.warning("a generator could not connect: %s", error)
                    time.sleep(1.0)  # out of file descriptors, say
                continue
            channel = Channel(connection, f"the generator at {peer[0]}:{peer[1]}")
            threading.Thread(target=self._welcome, args=(channel,), name="weights-transfer", daemon=True).start()

    def _welcome(self, channel: Channel) -> None:
        """The last rank of a party to come serves them all."""
        try:
            hello = channel.receive(self._timeout_s)
            if hello.get("token") != self._address.token:
                channel.send(error="this is not the learner that offered the weights")
                raise TransferError(f"{channel.peer} asks for another server")
        except (TransferError, ValueError) as error:
            logger.warning("%s", error)
            channel.close()
            return
        with self._changed:
            for party, channels in list(self._arriving.items()):
                if not all(other.is_open for other in channels.values()):  # it has given up
                    del self._arriving[party]
            channels = self._arriving.setdefault(hello["party"], {})
            channels[hello["rank"]] = channel
            if len(channels) < hello["size"] - 1:
                return
            del self._arriving[hello["party"]]
            party = _Party([channels[rank] for rank in sorted(channels)])
            self._parties.add(party)
        try:
            self._serve(party)
        finally:
            with self._changed:
                self._parties.discard(party)

    def _serve(self, party: _Party) -> None:
        """Send whatever versions are asked for, until the party is gone."""
        channels, group = party.channels, None
        try:
            store = _store(self._address.host, 0, self._timeout_s)
            for channel in channels:
                channel.send(store=store.port)
            group = TransferGroup(
                self._backend,
                store,
                rank=0,
                size=len(channels) + 1,
                address=self._address.host,
                channels=channels,
                timeout_s=self._timeout_s,
            )
            while True:
                asked = [channels[0].receive(None), *(c.receive(self._timeout_s) for c in channels[1:])]
                self._send_version(party, group, asked[0]["version"])
        except TransferError as error:
            logger.info("%s", error)
        except Exception:
            logger.exception("the transfer to %s failed", channels[0].peer)
        finally:
            party.close()
            if group is not None:
                group.abort()

    def _send_version(self, party: _Party, group: TransferGroup, version: int) -> None:
        with self._changed:
            snapshot = self._snapshots.get(version)
            party.pulls = version if snapshot is not None else None
        if snapshot is None:
            for channel in party.channels:
                channel.send(error=f"the learner does not keep version {version} any more")
            return
        start_s = time.perf_counter()
        num_bytes, failure = snapshot.num_bytes, None
        try:
            _send(snapshot.buckets, party.channels, group, self._timeout_s)
        except TransferError as error:
            failure = str(error)
        # Nothing of this thread holds the snapshot when the pull is declared to be over, not even a traceback.
        del snapshot
        with self._changed:
            party.pulls = None
            self._changed.notify_all()
        peer, seconds = party.channels[0].peer, time.perf_counter() - start_s
        if failure is not None:
            raise TransferError(f"version {version} did not reach {peer}: {failure}")
        logger.info("version %d: %.1f MB to %s in %.3f s", version, num_bytes / 1e6, peer, seconds)


def _send(buckets: Sequence[Tensor], channels: Sequence[Channel], group: TransferGroup, timeout_s: float) -> None:
    for channel in channels:
        channel.send(ok=True)
    for number, bucket in enumerate(buckets):
        for channel in channels:
            _expect(channel, {"bucket": number}, timeout_s)
        group.finish(group.start(bucket))
    for channel in channels:
        _expect(channel, {"done": True}, timeout_s)


def _expect(channel: Channel, message: dict, timeout_s: float) -> None:
    if (received := channel.receive(timeout_s)) != message:
        raise TransferError(f"{channel.peer} sent {received} instead of {message}")


def _store(host: str, port: int, timeout_s: float) -> TCPStore:
    """Start one (port 0: at a free port), or connect to one."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    limit = timedelta(seconds=timeout_s)
    try:
        return TCPStore(host, port, is_master=port == 0, wait_for_workers=False, timeout=limit)
    except RuntimeError as error:
        raise TransferError(f"the store at {host}:{port} does not answer: {error}") from None
