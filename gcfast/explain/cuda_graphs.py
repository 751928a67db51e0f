"""Explanations as CUDA graphs: captured once for each shape, then replayed.

A network of some hundred kernels takes the host longer to launch than the GPU to run, in small
batches; a graph is launched at once. Where the GPU is far slower a graph gains nothing, so
``"auto"`` runs the first calls of a shape without one, measures both by events that nothing waits
for, and captures what the host holds up. Where the host takes part (a FAISS index, rows on
demand) the forward pass alone is captured.

Memory: each graph keeps its images and what it gives; what lies between is shared by all graphs of
a device, and is as large as the largest forward pass. GRAPHS_KEPT shapes are kept.
"""

from __future__ import annotations

import statistics
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from gcfast.errors import UnsupportedModelError
from gcfast.model.watch import Watch

GRAPHS_KEPT = 8  # shapes whose graphs are kept, the last used
WARM_UPS = 3  # runs before a capture, in which libraries choose their algorithms
TRIALS_UNTIMED, TRIALS = 2, 3  # calls of a shape before "auto" decides: the first ones compile
# The GPU's time of a call by the host's, up to which a graph is faster. A GPU that is somewhat
# slower than the host still waits for single launches: the forward pass of ResNet-50 over 64 images
# took an H200 8.0 ms so, and 7.7 ms in a graph.
HOST_BOUND = 2.0

_T = TypeVar("_T")


class Recording(Protocol):
    """A captured function: what it gave stays where it is and is overwritten by each replay."""

    def replay(self) -> None:
        """Run what was captured again, on the current stream."""


class Recorder(Protocol):
    """What captures. Only one recording of a recorder runs at a time."""

    def record(self, function: Callable[[], _T]) -> tuple[Recording, _T]:
        """Capture a function of no arguments."""

    def in_order(self) -> Any:
        """A block that begins on the device when the block before has ended, on any stream."""

    def timed(self, function: Callable[[], _T]) -> tuple[_T, Trial]:
        """Run a function of no arguments, and measure it without waiting for it."""


class Trial(Protocol):
    """A measured run."""

    def ratio(self) -> float | None:
        """The device's time by the host's; None while the device has not ended."""


class CudaRecorder:
    """Captures on a stream of its own; all graphs share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], _T]) -> tuple[Recording, _T]:
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

    def timed(self, function: Callable[[], _T]) -> tuple[_T, Trial]:
        """See :class:`Recorder`."""
        trial = _CudaTrial()
        stream = torch.cuda.current_stream(self.device)
        trial.begin.record(stream)
        started = time.perf_counter()
        out = function()
        trial.host_ms = 1e3 * (time.perf_counter() - started)
        trial.end.record(stream)
        return out, trial


class _CudaTrial:
    def __init__(self) -> None:
        self.begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.host_ms = 0.0

    def ratio(self) -> float | None:
        if not self.end.query():  # type: ignore[no-untyped-call]
            return None
        return float(self.begin.elapsed_time(self.end)) / self.host_ms


@dataclass
class _Trials:
    """What "auto" knows of a shape."""

    calls: int = 0
    pending: list[Trial] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    def wants_one(self) -> bool:
        """Count a run without a graph; whether it is to be timed."""
        self.calls += 1
        return self.calls > TRIALS_UNTIMED and len(self.ratios) + len(self.pending) < TRIALS

    def host_bound(self) -> bool:
        """Whether the host is the slower one, as far as enough runs have ended to tell."""
        told = [(trial, trial.ratio()) for trial in self.pending]
        self.ratios += [ratio for _, ratio in told if ratio is not None]
        self.pending = [trial for trial, ratio in told if ratio is None]
        return len(self.ratios) >= TRIALS and statistics.median(self.ratios) <= HOST_BOUND


class _Captured(NamedTuple):
    recording: Recording
    images: Tensor  # read by each replay
    out: Any  # what the function gave


class Graphs:
    """The graphs of one model, for each shape of its images.

    A graph reads the weights where they were when it was captured. So all are dropped when a
    module, a parameter or a buffer has been replaced, moved or written to, when a module's own
    numbers, flags or names have changed (an adapter that is switched off), and when the database
    is another one. A model that cannot be captured (it waits for the device, its work depends on
    values, or its forward pass changes such a number) is named in one warning and runs without
    graphs until then.

    Args:
        model: whose tensors are watched.
        recorder: makes what captures, on a device.
        auto: capture only the shapes that the host is too slow for.
    """

    def __init__(
        self,
        model: nn.Module,
        recorder: Callable[[torch.device], Recorder] = CudaRecorder,
        *,
        auto: bool = False,
    ) -> None:
        self._model = model
        self.auto = auto
        self._trials: dict[Hashable, _Trials] = {}
        self._warned = False
        self._restless = False  # whether the model changes numbers of its own in each pass
        self._make_recorder = recorder
        self._lock = threading.Lock()
        self._recorders: dict[torch.device, Recorder] = {}
        self._watch = Watch(model)
        self._state: tuple[Hashable, Hashable] | None = None
        self._owner: object = None
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._refused: set[Hashable] = set()

    def run(
        self,
        images: Tensor,
        function: Callable[[Tensor], _T],
        copied: Callable[[_T], _T],
        *,
        owner: object,
        key: Hashable,
        prepared: Callable[[Tensor], Tensor],
    ) -> _T:
        """``function(images)``, by a replay where there is a graph.

        Args:
            images: [B, 3, h, w] in any memory format.
            function: a forward pass that waits for nothing on the device.
            copied: copies what the caller keeps of a replay, since the next one writes over it.
            owner: what the function rests on besides the model, by identity.
            key: what else the function depends on.
            prepared: gives images the memory format that the model takes best. A graph has them in
                it, so that what comes is copied once, whatever its format.
        """
        kind = images.device.type
        key = (
            key,
            images.shape,
            images.dtype,
            images.device,
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        )
        with self._lock:
            self._drop_what_is_stale(owner)
            recorder = self._recorders.get(images.device)
            if recorder is None:
                recorder = self._recorders[images.device] = self._make_recorder(images.device)
            trials = self._trials.setdefault(key, _Trials()) if self.auto else None
            if key not in self._refused and (trials is None or trials.host_bound()):
                with recorder.in_order():
                    captured = self._captured.get(key)
                    if captured is None:
                        captured = self._capture(prepared(images), function, key, recorder)
                    if captured is not None:
                        self._captured.move_to_end(key)
                        captured.images.copy_(images)
                        captured.recording.replay()
                        return copied(captured.out)
            timed = trials is not None and trials.wants_one()
        if trials is None or not timed:
            return function(images)
        out, trial = recorder.timed(lambda: function(images))
        trials.pending.append(trial)
        return out

    def __len__(self) -> int:
        return len(self._captured)

    def _capture(
        self,
        images: Tensor,
        function: Callable[[Tensor], Any],
        key: Hashable,
        recorder: Recorder,
    ) -> _Captured | None:
        cached = torch.is_autocast_cache_enabled()
        # A cast that autocast has kept from before would be outside the graph, and freed after.
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(False)
        before = self._watch.state()
        try:
            # Outside inference mode, so that what is captured in it can be replayed outside.
            with torch.inference_mode(False), torch.no_grad():
                own = images.clone()
                recording, out = recorder.record(lambda: function(own))
            if before is not None and self._watch.numbers() != before[1]:
                self._restless = True  # each pass would look like another model
                raise UnsupportedModelError("its forward pass changes a number of its own")
        except Exception as error:  # whatever the user's model does that a capture forbids
            self._refused.add(key)
            if not self._warned:
                self._warned = True
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
        rebuilt = state is None  # of other modules, which may differ in what they do alone
        if rebuilt:
            self._watch = Watch(self._model)
            state = self._watch.state()
        known = self._state
        if self._restless and state is not None and known is not None:
            state = (state[0], known[1])
        if rebuilt or state != known or owner is not self._owner:
            self._captured.clear()
            self._refused.clear()
            self._trials.clear()
            self._warned = self._restless = False
            self._state, self._owner = state, owner
