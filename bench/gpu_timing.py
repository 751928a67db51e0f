"""How long a call takes on a GPU, and how fast the card is by its own libraries.

An event pair round one launch measures the gap in which the host prepares the next one, so a window
holds many calls between two events: replays of a CUDA graph where the calls can be captured (the
GPU alone, no host between the launches), plain calls where they cannot (what a user waits for).
Each call of a window gets its own inputs, and in a graph its own outputs, so that none finds them
in the L2 cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

WINDOW_SECONDS = 0.02  # between two events, at least: a hundred thousand times their resolution
WINDOWS = 9
COPY_BYTES = 2**30  # many times any L2 cache
MATRIX_SIZE = {"float64": 4096}
DEFAULT_MATRIX_SIZE = 8192

Call = Callable[[], object]


class Timing(NamedTuple):
    """Seconds a call, one figure for each window."""

    seconds: list[float]
    how: str  # "graph", "calls", or "host" for a clock without a GPU
    calls: int  # of one window

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return low, high


class Clock(Protocol):
    """Times calls that alternate."""

    def measure(self, calls: Sequence[Call], *, seconds: float, graph: bool = True) -> Timing:
        """The calls, in rotation, for about so many seconds."""


def timing(window: Callable[[int], float], calls: int, how: str, *, seconds: float) -> Timing:
    """WINDOWS windows of equal length, each a whole number of rounds through the calls.

    Args:
        window: runs so many rounds and says how many seconds that took.
        calls: in a round.
        how: for the result.
        seconds: for all the windows together.
    """
    once = max(window(1), 1e-9)  # also the last warm-up
    wanted = min(max(WINDOW_SECONDS, once), max(seconds / WINDOWS, once))
    rounds = max(1, round(wanted / once))
    windows = max(3, min(WINDOWS, int(seconds / (rounds * once))))
    return Timing([window(rounds) / (rounds * calls) for _ in range(windows)], how, rounds * calls)


class HostClock:
    """The host's clock, for a machine without a GPU: the tests of this program."""

    def measure(self, calls: Sequence[Call], *, seconds: float, graph: bool = True) -> Timing:
        """See :class:`Clock`."""
        del graph

        def window(rounds: int) -> float:
            start = time.perf_counter()
            for _ in range(rounds):
                for call in calls:
                    call()
            return time.perf_counter() - start

        return timing(window, len(calls), "host", seconds=seconds)


class CudaClock:
    """CUDA events round windows of graph replays or of calls."""

    def measure(self, calls: Sequence[Call], *, seconds: float, graph: bool = True) -> Timing:
        """See :class:`Clock`."""
        for call in calls[:2]:  # compiles what is to be compiled
            call()
        torch.cuda.synchronize()

        def run() -> None:
            for call in calls:
                call()

        how = "calls"
        if graph:
            try:
                graphed, _results = _captured(calls)
                run, how = graphed.replay, "graph"
            except RuntimeError:  # it waits for the device somewhere, or allocates outside the pool
                torch.cuda.synchronize()
                how = "calls, not capturable"

        def window(rounds: int) -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(rounds):
                run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        return timing(window, len(calls), how, seconds=seconds)


def _captured(calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, list[object]]:
    """The calls as a graph, and what they return, which must be kept as long as it is replayed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as the capture will run: libraries set up what a stream needs
        calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # A capture that fails leaves its own stream behind as the current one; this block does not.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        results = [call() for call in calls]
    return graph, results


def copy_rate(
    clock: Clock, device: torch.device, *, seconds: float, size: int = COPY_BYTES
) -> float:
    """Bytes a second of a kernel that copies, each byte counted as read and as written.

    A kernel that adds 0, since a graph copies by its own means, which are slower: on an H200
    2,762 GB/s where kernels reach 4,250.
    """
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    taken = clock.measure([lambda: torch.add(source, 0.0, out=target)], seconds=seconds)
    assert torch.equal(source, target)
    return 2 * 4 * source.numel() / taken.median


def matrix_rate(
    clock: Clock, device: torch.device, rate: str, *, seconds: float, size: int | None = None
) -> float:
    """Operations a second of the library's square matrix product, a multiply-add as two."""
    n = MATRIX_SIZE.get(rate, DEFAULT_MATRIX_SIZE) if size is None else size
    dtype = torch.float32 if rate == "tf32" else getattr(torch, rate)
    left, right = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if rate == "tf32" else "highest")
    try:
        taken = clock.measure([lambda: left @ right], seconds=seconds)
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * n**3 / taken.median


def card(device: torch.device) -> dict[str, Any]:
    """What the driver says of the card."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
    }
