"""What attention runs on, and the choice between the ways that fit a device and a layer.

Flash kernels (cpu_flash.py, cuda_flash.py) give a forward and a backward with a log-sum-exp; merged_flash.py turns one
into attention over a stream. flex.py and dense.py compute the whole stream themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from raygrpo.shared_prefix.layout import AttentionPlan

logger = logging.getLogger(__name__)


class Backend(Protocol):
    """Attention over a stream: each token sees its own segment causally and all segments above it."""

    def refusal(self, q: Tensor, v: Tensor, *, window: int | None, softcap: float | None) -> str | None:
        """Why this backend cannot run such a layer; None if it can."""
        ...

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        plan: AttentionPlan,
        scale: float,
        window: int | None,
        softcap: float | None,
        external: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """[T, Hq, Dv], differentiable. q [T, Hq, D], k [T, Hk, D], v [T, Hk, Dv].

        window: a token sees itself and the window - 1 positions before it. softcap: scores s become
        softcap * tanh(s / softcap). external: keys and values [E, Hk, ..] of a prefix encoded before, seen by all.
        """
        ...


def _cpu_flash() -> Backend:
    from raygrpo.shared_prefix.backends.cpu_flash import CpuFlash
    from raygrpo.shared_prefix.backends.merged_flash import MergedFlash

    return MergedFlash(CpuFlash())


def _aten_flash() -> Backend:
    from raygrpo.shared_prefix.backends.cuda_flash import AtenFlash
    from raygrpo.shared_prefix.backends.merged_flash import MergedFlash

    return MergedFlash(AtenFlash())


def _flash_attn() -> Backend:
    from raygrpo.shared_prefix.backends.cuda_flash import FlashAttnPackage
    from raygrpo.shared_prefix.backends.merged_flash import MergedFlash

    return MergedFlash(FlashAttnPackage())


def _flex() -> Backend:
    from raygrpo.shared_prefix.backends.flex import Flex

    return Flex()


def _dense() -> Backend:
    from raygrpo.shared_prefix.backends.dense import Dense

    return Dense()


BACKENDS: dict[str, Callable[[], Backend]] = {
    "cpu-flash": _cpu_flash,
    "aten-flash": _aten_flash,
    "flash-attn": _flash_attn,
    "flex": _flex,
    "dense": _dense,
}
_PREFERENCE = {"cpu": ("cpu-flash", "dense"), "cuda": ("aten-flash", "flash-attn", "flex", "dense")}


class BackendChoice:
    """The backend that runs each layer: the one that was named, or for "auto" the first on the device that can.

    Holds the backends made so far; they have no state that belongs to a model.
    """

    def __init__(self, name: str):
        if name != "auto" and name not in BACKENDS:
            raise ValueError(f"attention = {name!r} is not one of auto, {', '.join(BACKENDS)}")
        self.name = name
        self._made: dict[str, Backend | str] = {}  # or why it cannot be made
        self._announced: set[str] = set()

    def __deepcopy__(self, memo) -> BackendChoice:
        return BackendChoice(self.name)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, softcap: float | None, **rest) -> Tensor:
        """As Backend.attend, on the chosen backend."""
        names = _PREFERENCE.get(q.device.type, ("dense",)) if self.name == "auto" else (self.name,)
        refusals = []
        for name in names:
            backend = self._make(name)
            if isinstance(backend, str):
                refusals.append(f"{name}: {backend}")
                continue
            refusal = backend.refusal(q, v, window=window, softcap=softcap)
            if refusal is None:
                self._announce(name, refusals)
                return backend.attend(q, k, v, window=window, softcap=softcap, **rest)
            refusals.append(f"{name}: {refusal}")
        raise ValueError("no attention backend can run this layer; " + "; ".join(refusals))

    def _make(self, name: str) -> Backend | str:
        if name not in self._made:
            try:
                self._made[name] = BACKENDS[name]()
            except ImportError as error:
                self._made[name] = f"not usable ({error})"
        return self._made[name]

    def _announce(self, name: str, refusals: list[str]) -> None:
        """Say once which slower way a layer takes, and why."""
        if refusals and name not in self._announced:
            self._announced.add(name)
            logger.warning("shared-prefix attention runs on %r for some layers: %s", name, "; ".join(refusals))


__all__ = ["BACKENDS", "Backend", "BackendChoice"]
