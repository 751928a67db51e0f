"""Our own sums in our own precision, whatever the user chose for the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


_as_it_is: AbstractContextManager[None] = nullcontext()  # holds nothing, so threads may share it


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off inside the block: the user's choice for the model is not one for our sums."""
    # To enter and leave `torch.autocast` takes more of the host than to launch a kernel.
    if not torch.is_autocast_enabled(device.type):
        return _as_it_is
    return torch.autocast(device.type, enabled=False)


def sheltered(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function outside the graph, and outside autocast on its first tensor's device."""

    @functools.wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        device = torch.device("cpu") if first is None else first.device
        if not torch.amp.is_autocast_available(device.type):  # "meta", say: a check will speak
            device = torch.device("cpu")
        with torch.no_grad(), full_precision(device):
            return function(*args, **kwargs)

    return wrapped


def operation(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A public operation: sheltered, and while torch.compile traces it one node of the graph.

    That node is ``torch.ops.gcfast.<name>``, which checks shapes and dtypes and not values: those
    are not known before the graph runs.
    """
    eager = sheltered(function)
    name = function.__name__

    @functools.wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_compiling():
            node: Any = getattr(torch.ops.gcfast, name)
            out: _R = node(*args, **kwargs)
            return out
        return eager(*args, **kwargs)

    return wrapped
