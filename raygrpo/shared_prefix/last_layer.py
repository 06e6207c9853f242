"""The last layer, where a prompt's tokens are read as keys and values only.

Behind the last layer only rows that predict a token are read. A prompt's rows but its last therefore need neither
queries, attention, output projection nor MLP there: of the last layer they run what makes keys and values.

That needs no knowledge of the layer's code. The layer is called on the unread rows, up to where it calls its
self-attention; that gets the same arguments, and leaves keys and values here. Then the whole layer is called on the
rows that are read, and its attention finds the other keys and values. Layers that are built or called in another way
than usual in transformers run on all rows.

Shapes: T tokens in the stream, R of them read; d hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from raygrpo.shared_prefix.layout import AttentionPlan
from raygrpo.shared_prefix.supported import UnsupportedModelError

_PER_ROW = ("position_ids", "position_embeddings")  # what a layer is given for each row, [1, T, ..]


class LastLayer:
    """What the two runs of the last layer share; travels to its attention in place of the pass itself."""

    def __init__(self, run: Any, plan: AttentionPlan, unread: Tensor, read: Tensor):
        self.run, self.plan = run, plan
        self._unread, self._read = unread, read
        self._kept: list[tuple[Tensor, Tensor]] = []
        self.is_first_run = True

    def keep(self, k: Tensor, v: Tensor) -> None:
        """In the first run: the unread rows' keys and values, [T - R, Hk, ..]."""
        self._kept.append((k, v))

    def join(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """In the second run: keys and values of all rows, [T, Hk, ..], from those of the read rows."""
        if len(self._kept) != 1:
            raise UnsupportedModelError(f"the last layer made {len(self._kept)} calls to attention; it must be one")
        ((k_unread, v_unread),) = self._kept
        return self._all_rows(k_unread, k), self._all_rows(v_unread, v)

    def _all_rows(self, unread: Tensor, read: Tensor) -> Tensor:
        joined = read.new_empty(self.plan.num_rows, *read.shape[1:])
        return joined.index_copy(0, self._unread, unread).index_copy(0, self._read, read)


def narrow_last_layer(decoder: nn.Module, num_layers: int) -> None:
    """Let a decoder's last layer return the read rows alone, where it is built as usual. Ordinary calls of it are
    unchanged."""
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(set(layers)) == len(layers) == num_layers:
        return  # no list of layers, or one that is used twice
    layer = layers[-1]
    if "forward" not in vars(layer) and isinstance(getattr(layer, "self_attn", None), nn.Module):
        layer.forward = MethodType(_narrowed(type(layer).forward), layer)


def _narrowed(ordinary: Callable) -> Callable:
    @functools.wraps(ordinary)
    def forward(self: nn.Module, *args, **kwargs):
        run = kwargs.get("shared_prefix")
        if run is not None and run.returned_rows is not None and not run.finished:
            raise UnsupportedModelError(f"{type(self).__name__}, the last layer, is called more than once in a pass")
        if run is None or not _is_usual(args, kwargs, run.plan.num_rows):
            return ordinary(self, *args, **kwargs)
        hidden, plan = args[0], run.plan.last_layer
        read, unread = (rows.to(hidden.device) for rows in (plan.query_rows, plan.other_rows))
        if not len(unread):
            if not _ranks_call_alike():
                return ordinary(self, *args, **kwargs)
            unread = read[:1]  # its keys and values are overwritten
        kwargs["shared_prefix"] = last = LastLayer(run, plan, unread, read)
        attention_args, attention_kwargs = _until_attention(ordinary, self, _take(hidden, unread), kwargs, unread)
        self.get_submodule("self_attn")(*attention_args, **attention_kwargs)
        last.is_first_run = False
        run.returned_rows = read
        return ordinary(self, _take(hidden, read), **_take_all(kwargs, read))

    return forward


def _ranks_call_alike() -> bool:
    """Whether other ranks may be gathering parameters in step with this one, call by call of every module."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class _Reached(Exception):
    """The layer got to its attention, with these arguments."""


def _until_attention(ordinary: Callable, layer: nn.Module, hidden: Tensor, kwargs: dict, rows: Tensor) -> tuple:
    """Arguments that a layer passes to its self-attention. First of its hooks, so that no other sees half a call."""

    def stop(_: nn.Module, args: tuple, kwargs: dict) -> NoReturn:
        raise _Reached(args, kwargs)

    hook = layer.get_submodule("self_attn").register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        ordinary(layer, hidden, **_take_all(kwargs, rows))
    except _Reached as reached:
        return reached.args
    finally:
        hook.remove()
    raise RuntimeError(f"{type(layer).__name__} did not call its self_attn")


def _is_usual(args: tuple, kwargs: dict, num_rows: int) -> bool:
    """One positional argument, and no tensor but the hidden states' and positions', one for each row."""
    if len(args) != 1:
        return False
    others = [value for name, value in kwargs.items() if name not in _PER_ROW]
    per_row = [args[0], *(kwargs.get(name) for name in _PER_ROW)]
    return not any(True for _ in _tensors(others)) and all(x.shape[:2] == (1, num_rows) for x in _tensors(per_row))


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for member in value:
            yield from _tensors(member)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _take_all(kwargs: dict, rows: Tensor) -> dict:
    return {name: _take(value, rows) if name in _PER_ROW else value for name, value in kwargs.items()}


def _take(value: Any, rows: Tensor) -> Any:
    """Some rows of a tensor [1, T, ..], or of each tensor in a tuple."""
    if isinstance(value, Tensor):
        return value.index_select(1, rows)
    if isinstance(value, (tuple, list)):
        return tuple(_take(member, rows) for member in value)
    if isinstance(value, dict):
        return {key: _take(member, rows) for key, member in value.items()}
    return value
