"""Whole explanations as CUDA graphs: captured once for each shape, then replayed."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from gcfast.explain.maps import Explained

GRAPHS_KEPT = 8  # shapes whose graphs are kept, the last used
WARM_UPS = 3  # runs before a capture, in which libraries choose their algorithms

_R = TypeVar("_R")
_version = attrgetter("_version")


class Recording(Protocol):
    """A captured function: what it gave stays where it is and is overwritten by each replay."""

    def replay(self) -> None:
        """Run what was captured again, on the current stream."""


class Recorder(Protocol):
    """What captures. Only one recording of a recorder runs at a time."""

    def record(self, function: Callable[[], Explained]) -> tuple[Recording, Explained]:
        """Capture a function of no arguments."""

    def in_order(self) -> Any:
        """A block that begins on the device when the block before has ended, on any stream."""


class CudaRecorder:
    """Captures on a stream of its own; all graphs share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], Explained]) -> tuple[Recording, Explained]:
        """See :class:`Recorder`."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):  # which also makes its device the current one
            for _ in range(WARM_UPS):
                function()
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on using the device meanwhile.
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                out = function()
        current.wait_stream(self.stream)
        return graph, out

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """See :class:`Recorder`."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self.done)
        try:
            yield
        finally:
            self.done.record(stream)


class _Captured(NamedTuple):
    recording: Recording
    images: Tensor  # read by each replay
    out: Explained


class Graphs:
    """The graphs of one model, for each shape of its images.

    A graph reads the weights where they were when it was captured. So all are dropped when a
    module, a parameter or a buffer has been replaced, moved or written to, and when the database is
    another one. A model that cannot be captured (it waits for the device, or its work depends on
    values) is named in a warning and runs without graphs until then.

    Args:
        model: whose tensors are watched.
        recorder: makes what captures, on a device.
    """

    def __init__(
        self, model: nn.Module, recorder: Callable[[torch.device], Recorder] = CudaRecorder
    ) -> None:
        self._model = model
        self._make_recorder = recorder
        self._lock = threading.Lock()
        self._recorders: dict[torch.device, Recorder] = {}
        self._watch = _Watch(model)
        self._state: Hashable = None
        self._owner: object = None
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._refused: set[Hashable] = set()

    def run(
        self,
        images: Tensor,
        function: Callable[[Tensor], Explained],
        take: Callable[[Explained], _R],
        *,
        owner: object,
        key: Hashable,
    ) -> _R:
        """``take(function(images))``, by a replay where there is a graph.

        Args:
            images: [B, 3, h, w] in the memory format that the model takes best.
            function: a forward pass that waits for nothing on the device.
            take: makes what the caller keeps; must copy, since the next replay writes over it.
            owner: what the function rests on besides the model, by identity.
            key: what else the function depends on.
        """
        kind = images.device.type
        key = (
            key,
            images.shape,
            images.stride(),
            images.dtype,
            images.device,
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        )
        with self._lock:
            self._drop_what_is_stale(owner)
            if key not in self._refused:
                recorder = self._recorders.get(images.device)
                if recorder is None:
                    recorder = self._make_recorder(images.device)
                    self._recorders[images.device] = recorder
                with recorder.in_order():
                    captured = self._captured.get(key)
                    if captured is None:
                        captured = self._capture(images, function, key, recorder)
                    if captured is not None:
                        self._captured.move_to_end(key)
                        captured.images.copy_(images)
                        captured.recording.replay()
                        return take(captured.out)
        return take(function(images))

    def __len__(self) -> int:
        return len(self._captured)

    def _capture(
        self,
        images: Tensor,
        function: Callable[[Tensor], Explained],
        key: Hashable,
        recorder: Recorder,
    ) -> _Captured | None:
        cached = torch.is_autocast_cache_enabled()
        # A cast that autocast has kept from before would be outside the graph, and freed after.
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(False)
        try:
            # Outside inference mode, so that what is captured in it can be replayed outside.
            with torch.inference_mode(False), torch.no_grad():
                own = torch.empty_like(images, memory_format=torch.preserve_format)
                own.copy_(images)
                recording, out = recorder.record(lambda: function(own))
        except Exception as error:  # whatever the user's model does that a capture forbids
            self._refused.add(key)
            warnings.warn(
                "the model cannot be captured in a CUDA graph, and runs without one: "
                f"{type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=5,
            )
            return None
        finally:
            torch.set_autocast_cache_enabled(cached)
        captured = self._captured[key] = _Captured(recording, own, out)
        while len(self._captured) > GRAPHS_KEPT:
            self._captured.popitem(last=False)
        # The capture may have been the first pass, which settles how the model is run.
        self._state = self._watch.state()
        return captured

    def _drop_what_is_stale(self, owner: object) -> None:
        state = self._watch.state()
        if state is None:
            self._watch = _Watch(self._model)
            state = self._watch.state()
        if state != self._state or owner is not self._owner:
            self._captured.clear()
            self._refused.clear()
            self._state, self._owner = state, owner


class _Watch:
    """Whether a model's tensors are those they were, at a few microseconds a hundred tensors."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self.children = [(m._modules, name, c) for m in modules for name, c in m._modules.items()]
        self.slots = [
            (held, name)
            for m in modules
            for held in (m._parameters, m._buffers)
            for name, tensor in held.items()
            if tensor is not None
        ]

    def state(self) -> Hashable:
        """Where each tensor is and how often it was written to; None where a module is another."""
        if any(held.get(name) is not child for held, name, child in self.children):
            return None
        tensors = [held.get(name) for held, name in self.slots]
        if any(tensor is None for tensor in tensors):
            return None
        places = tuple(map(Tensor.data_ptr, tensors))  # type: ignore[arg-type]
        try:
            return places, tuple(map(_version, tensors))
        except RuntimeError:  # tensors made in inference mode count no writes
            return places
