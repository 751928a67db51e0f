"""Memory: flat over many explain_batch calls, and linear in N for build.

    python bench/memory.py [--calls 1000] [--rows 20000 40000]

Resident memory is read from /proc. The network is small, so that what gcfast holds shows.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from paired import conditions
from torch import Tensor, nn

import gcfast
from gcfast.build import build

DIM, CHANNELS = 128, 256


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, 4), nn.ReLU())
        self.embed = nn.Linear(CHANNELS, DIM)

    def forward(self, images: Tensor) -> Tensor:
        return self.embed(self.features(images).mean((2, 3)))


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def batches(rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for start in range(0, rows, 256):
        labels = torch.arange(start, min(rows, start + 256)) % 100
        yield torch.randn(len(labels), 3, 16, 16, generator=generator), labels


def calls(count: int) -> dict[str, float]:
    """Resident memory after a tenth of the calls and after all of them."""
    torch.manual_seed(0)
    explainer = gcfast.Explainer(Small())
    explainer.build(batches(2000))
    images = torch.randn(32, 3, 64, 64)
    early = 0.0
    for i in range(count):
        explainer.explain_batch(images, details=True)
        if i == count // 10:
            gc.collect()
            early = resident_mib()
    gc.collect()
    return {"calls": count, "early_mib": early, "late_mib": resident_mib()}


def build_peak(rows: int, method: str, spool_mib: int) -> dict[str, float]:
    """Growth of the peak of resident memory over a build of N rows, in this process.

    Args:
        rows: N.
        method: of the weights.
        spool_mib: what the spool holds in memory; 0 streams the build into a folder.
    """
    torch.manual_seed(0)
    explainer = gcfast.Explainer(Small(), method=method)
    explainer.build(batches(512))  # libraries and buffers that do not depend on N
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with tempfile.TemporaryDirectory() as folder:
        options = {"spool_bytes": spool_mib * 2**20} if spool_mib else {"out": folder + "/db"}
        build(explainer.network, batches(rows), explainer.settings, **options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    table = rows * DIM * 4 / 2**20
    return {"rows": rows, "growth_mib": peak - before, "n_by_d_mib": table,
            "n_by_n_mib": rows * rows * 4 / 2**20}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 40_000])
    parser.add_argument("--one", help=argparse.SUPPRESS)  # rows,method,spool of a single build
    arguments = parser.parse_args()
    if arguments.one:
        rows, method, spool = arguments.one.split(",")
        print(json.dumps(build_peak(int(rows), method, int(spool))))
        return
    print(conditions())
    flat = calls(arguments.calls)
    print(f"explain_batch, {arguments.calls} calls: {flat}")
    for method, spool in (
        ("gradcam", 2048),
        ("gradcam++", 2048),
        ("gradcam++", 16),
        ("gradcam++", 0),
    ):
        for rows in arguments.rows:
            # A process of its own each time: a peak does not come down again.
            command = [sys.executable, __file__, "--one", f"{rows},{method},{spool}"]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            how = f"spool up to {spool} MiB in memory" if spool else "streamed into a folder"
            print(f"build, {method}, {how}: {out.strip()}")


if __name__ == "__main__":
    main()
