"""Tensors, streams, events and graphs of the pretended device; see pretend_cuda.py."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

HOST = "host"  # the queue of what the host does itself
_modes: list[Any] = []  # the one that is entered


def active() -> Any:
    """The mode that is entered."""
    assert _modes, "a pretended tensor outside the mode"
    return _modes[-1]


@contextlib.contextmanager
def entered(mode: Any) -> Iterator[None]:
    assert not _modes
    _modes.append(mode)
    try:
        yield
    finally:
        _modes.pop()


class Wait(NamedTuple):
    """Something the host waited for the device in."""

    what: str  # "read", "shape", "download", "event", "stream"
    where: str  # "file.py:function" of the innermost frame of gcfast


class Place:
    """A tensor's memory: who wrote it, who read it, and where it was made."""

    def __init__(self, home: object) -> None:
        self.home = home
        self.written: tuple[object, int] | None = None
        self.read: dict[object, int] = {}
        self.promised: set[object] = set()  # streams by `record_stream`


class Pretended(Tensor):
    """A tensor that says it is on a GPU, or in pinned memory of the host."""

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device, place: Place) -> Pretended:
        del device, place
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device="cpu",
        )

    def __init__(self, inner: Tensor, device: torch.device, place: Place) -> None:
        self.inner, self.place, self._device = inner, place, device

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: self._device)
    is_cuda = property(lambda self: self._device.type == "cuda")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        mode = active()
        return mode.run(func, types, args, kwargs or {})

    def get_device(self) -> int:
        return self._device.index if self.is_cuda else -1

    def record_stream(self, stream: Stream) -> None:
        self.place.promised.add(stream)

    def __deepcopy__(self, memo):
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        copied._is_param = getattr(self, "_is_param", False)
        memo[id(self)] = copied
        return copied

    def __repr__(self) -> str:
        return f"Pretended({list(self.shape)}, {self.dtype}, {self._device})"


class Stream:
    """A queue of work on a device; ``seen`` is what is known to have ended before its next work."""

    def __init__(self, device: object = None) -> None:
        mode = active()
        self.device = mode.device_of(device)
        self.seen: Counter = Counter()
        self.time = 0
        self.cuda_stream = id(self)

    def wait_event(self, event: Event) -> None:
        self.seen |= event.seen

    def wait_stream(self, other: Stream) -> None:
        self.seen |= other.now()

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def now(self) -> Counter:
        return self.seen | Counter({self: self.time})

    def synchronize(self) -> None:
        active().wait("stream", self.now())


class Event:
    def __init__(self, **_: object) -> None:
        self.seen: Counter = Counter()

    def record(self, stream: Stream | None = None) -> None:
        self.seen = (stream or active().stream()).now()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or active().stream()).wait_event(self)

    def synchronize(self) -> None:
        active().wait("event", self.seen)


class Graph:
    """What ran under ``torch.cuda.graph``, to be run again on the memory that it ran on."""

    def __init__(self) -> None:
        self.tape: list[tuple[Callable[[], object], list[tuple[Place, bool]]]] = []

    def replay(self) -> None:
        mode = active()
        stream = mode.stream()
        stream.seen |= mode.host
        stream.time += 1
        for again, places in self.tape:
            for place, writes in places:
                mode.use(stream, place, writes, "a replay")
            again()


def where() -> str:
    """The innermost frame of gcfast that got here."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/gcfast/" in path or "/kernels/" in path:
            return f"{path.rsplit('/', 1)[-1]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
