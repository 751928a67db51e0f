"""Our own sums in our own precision, whatever the user chose for the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

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
    """Run the function without gradients, and without autocast on its first tensor's device."""

    @functools.wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        first: object = args[0] if args else None
        if not isinstance(first, Tensor):
            first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        device = first.device if isinstance(first, Tensor) else torch.device("cpu")
        if not torch.amp.is_autocast_available(device.type):  # "meta", say: a check will speak
            device = torch.device("cpu")
        with torch.no_grad(), full_precision(device):
            return function(*args, **kwargs)

    return wrapped
