"""What carries a transfer of weights (direct_transfer.py): a socket for words, a process group for bytes.

A sender and the receivers of one generator have a process group of their own, beside torch.distributed's default group
and unknown to it: gloo where the tensors lie in the host's memory, NCCL on GPUs, and nothing else differs. Every wait
ends: when the other side has closed its socket (which its process does by dying, however it dies), or at a deadline.
Then the group is aborted, and with it nothing but the transfer.
"""

from __future__ import annotations

import json
import os
import select
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from raygrpo.types import TransferError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import Store, Work  # type: ignore[attr-defined]

Backend = Literal["gloo", "nccl"]

POLL_S = 0.0005  # between looks at an operation that is under way
MAX_LINE = 2**16  # bytes of a message
HANDSHAKE_BYTES = 64
# NCCL's own watchdog would end the whole process, learner or generator, when a peer fails or is slow: here the thread
# that waits finds out, and gives up its own group only. Read by ProcessGroupNCCL when it is constructed.
NCCL_ENVIRONMENT = {
    "TORCH_NCCL_BLOCKING_WAIT": "1",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}
_environment = threading.Lock()


class Channel:
    """One end of a connection: messages are JSON objects, one a line. Raises TransferError for whatever is not the
    answer that was to come."""

    def __init__(self, connection: socket.socket, peer: str):
        """peer: what messages call the other end."""
        self.peer = peer
        self._socket = connection
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = connection.makefile("rb")
        self._hung_up = select.poll()
        self._hung_up.register(connection, select.POLLRDHUP)  # POLLHUP and POLLERR always count

    @classmethod
    def connect(cls, host: str, port: int, timeout_s: float, peer: str) -> Channel:
        try:
            return cls(socket.create_connection((host, port), timeout_s), peer)
        except OSError as error:
            raise TransferError(f"{peer} at {host}:{port} does not answer: {error}") from None

    @property
    def own_address(self) -> str:
        """By which the other end reaches this machine."""
        return self._socket.getsockname()[0]

    @property
    def is_open(self) -> bool:
        """False when either end has closed it, also where messages are still to be read."""
        return self._socket.fileno() >= 0 and not self._hung_up.poll(0)

    def send(self, **message: Any) -> None:
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise TransferError(f"{self.peer} is gone: {error}") from None

    def receive(self, timeout_s: float | None) -> dict[str, Any]:
        """The next message. timeout_s: None waits until the other end closes."""
        try:
            self._socket.settimeout(timeout_s)
            line = self._file.readline(MAX_LINE)
        except TimeoutError:
            raise TransferError(f"{self.peer} said nothing for {timeout_s:g} s") from None
        except (OSError, ValueError) as error:
            raise TransferError(f"{self.peer} is gone: {error}") from None
        if not line.endswith(b"\n"):
            raise TransferError(f"{self.peer} is gone")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise TransferError(f"{self.peer} sent {line[:100]!r}")
        return message

    def close(self) -> None:
        """From any thread; who waits for a message stops waiting."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._file.close()
        self._socket.close()


class TransferGroup:
    """A process group whose rank 0 sends to all others. The constructor returns when all ranks have come."""

    def __init__(
        self,
        backend: Backend,
        store: Store,
        *,
        rank: int,
        size: int,
        address: str,
        channels: Sequence[Channel],
        timeout_s: float,
    ):
        """store: by which the ranks find one another. address: of this machine, for the others. channels: to the
        other side. timeout_s: for each operation. Raises TransferError, as every method."""
        import torch
        import torch.distributed as dist

        self.device = device_for(backend)
        self._channels = channels
        self._timeout_s = timeout_s
        limit = timedelta(seconds=timeout_s)
        try:
            if backend == "gloo":
                gloo: Any = dist.ProcessGroupGloo
                options = gloo._Options()
                # The default is the address that the machine's name stands for, which on many is a loopback's.
                options._devices = [gloo.create_device(hostname=address)]
                options._timeout = limit
                self._group: Any = gloo(store, rank, size, options)
            else:
                nccl: Any = dist.ProcessGroupNCCL
                options = nccl.Options()
                options._timeout = limit
                with _variables(NCCL_ENVIRONMENT):
                    self._group = nccl(store, rank, size, options)
        except RuntimeError as error:
            raise TransferError(f"{channels[0].peer} did not join the transfer: {error}") from None
        # NCCL connects in its first operation, and in there cannot be interrupted: no weights are held meanwhile.
        self.finish(self.start(torch.zeros(HANDSHAKE_BYTES, dtype=torch.uint8, device=self.device)))

    def start(self, tensor: Tensor) -> Work:
        """Send the tensor, or receive it into its memory. It must stay until `finish` has returned or raised."""
        with _current(self.device):
            try:
                return self._group.broadcast(tensor, 0)
            except RuntimeError as error:
                raise TransferError(f"{self._channels[0].peer} cannot be reached: {error}") from None

    def finish(self, work: Work) -> None:
        """Wait for what `start` began; on a GPU, kernels of this thread's stream may follow."""
        deadline_s = time.monotonic() + self._timeout_s
        with _current(self.device):
            while not work.is_completed():
                gone = [channel for channel in self._channels if not channel.is_open]
                if gone or time.monotonic() > deadline_s:
                    self.abort()
                    raise TransferError(
                        f"{gone[0].peer} is gone" if gone else f"nothing moved for {self._timeout_s:g} s"
                    )
                time.sleep(POLL_S)
            try:
                work.wait()
            except RuntimeError as error:
                self.abort()
                raise TransferError(f"{self._channels[0].peer} failed: {_first_line(error)}") from None

    def abort(self) -> None:
        with suppress(RuntimeError):
            self._group.abort()


def device_for(backend: Backend) -> torch.device:
    """Where tensors lie that this backend carries. Raises ValueError on a machine that has no such device."""
    import torch

    if backend == "gloo":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("the learner sends its weights from a GPU, and this process has none to receive them on")
    return torch.device("cuda", torch.cuda.current_device())


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes it this thread's device."""
    import torch

    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables while something is constructed that reads them."""
    with _environment:
        before = {name: os.environ.get(name) for name in values}
        os.environ.update(values)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
