"""Timing two things turn about on a noisy machine, and where a figure was measured."""

from __future__ import annotations

import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Paired:
    """Seconds of A and B in each round, measured one right after the other."""

    a: list[float]
    b: list[float]

    @property
    def ratios(self) -> list[float]:
        return [x / y for x, y in zip(self.a, self.b, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    def __str__(self) -> str:
        low, _, high = statistics.quantiles(self.ratios, n=4)
        return (
            f"{self.ratio:.3f} (quartiles {low:.3f} to {high:.3f}, {len(self.a)} pairs; "
            f"medians {statistics.median(self.a) * 1e3:.1f} and "
            f"{statistics.median(self.b) * 1e3:.1f} ms)"
        )

    def record(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "a_seconds": self.a, "b_seconds": self.b}


def paired(
    a: Callable[..., object],
    b: Callable[..., object],
    *,
    rounds: int = 11,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> Paired:
    """Times A and B in pairs; which of them goes first changes from pair to pair.

    On a machine with other work, `clock=time.process_time` and one thread are steadier.
    """
    for _ in range(warmup):
        a()
        b()
    times: dict[int, list[float]] = {0: [], 1: []}
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for which in (0, 1) if i % 2 == 0 else (1, 0):
                start = clock()
                (a, b)[which]()
                times[which].append(clock() - start)
    finally:
        gc.enable()
    return Paired(times[0], times[1])


def conditions() -> dict[str, Any]:
    """Processor, threads, versions and commit, for the record beside a figure."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    root = Path(__file__).parent
    git = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "processor": model,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gcfast": metadata.version("gcfast"),
        "commit": commit,
    }
