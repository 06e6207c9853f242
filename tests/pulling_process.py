"""A generator's end of a direct transfer in a process of its own, which tests kill or stop while it pulls."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from typing import Any

from raygrpo.direct_transfer import Offer

READY_TIMEOUT_S = 60.0


class PullingProcess:
    """Pulls up to the first bucket, and goes on when it is told to."""

    def __init__(self, offer: Offer):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_pull, args=(offer, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def begun(self) -> None:
        """Wait until it has the first bucket."""
        assert self._pipe.poll(READY_TIMEOUT_S), "the receiver did not begin"
        assert self._pipe.recv() == "begun"

    def go_on(self) -> Any:
        """Pull the rest; returns {name: bytes}, or the text of the error."""
        self._pipe.send("go on")
        assert self._pipe.poll(READY_TIMEOUT_S), "the receiver did not end"
        return self._pipe.recv()

    def stop(self) -> None:
        """It hangs from now on."""
        os.kill(self._process.pid or 0, signal.SIGSTOP)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _pull(offer: Offer, pipe: Connection) -> None:
    import torch

    try:
        tensors = offer.receiver().begin(offer)
        pipe.send("begun")
        pipe.recv()
        pipe.send({name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors})
        pipe.recv()  # stays connected until the test ends it
    except EOFError:
        pass
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


class ServingProcess:
    """A learner's end, which tests kill or stop while it sends. `tensor_bytes` of each of four tensors."""

    def __init__(self, tensor_bytes: int, timeout_s: float):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(tensor_bytes, timeout_s, theirs), daemon=True)
        self._process.start()
        assert self._pipe.poll(READY_TIMEOUT_S), "the sender did not start"
        self.offer: Offer = self._pipe.recv()

    def stop(self) -> None:
        os.kill(self._process.pid or 0, signal.SIGSTOP)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(tensor_bytes: int, timeout_s: float, pipe: Connection) -> None:
    import torch

    from raygrpo.direct_transfer import WeightsServer

    server = WeightsServer("127.0.0.1", timeout_s=timeout_s)
    tensors = [(f"t{i}", torch.full((tensor_bytes,), i, dtype=torch.uint8)) for i in range(4)]
    pipe.send(server.publish(1, tensors, bucket_bytes=tensor_bytes))
    pipe.recv()
