"""Memory: flat over many explain_batch calls, linear in N for build, what append and open take.

    python bench/memory.py [--calls 1000] [--rows 20000 40000]
    python bench/memory.py --append 200000 [400000 …]
    python bench/memory.py --open 611

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
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from paired import conditions
from torch import Tensor, nn

import gcfast
from gcfast.builder.build import build
from gcfast.database.database import Database

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


def child(*arguments: str) -> str:
    """What a process of its own prints: a peak does not come down again."""
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def stored_rows(rows: int, folder: Path) -> None:
    """A database of N random rows, as a build of :class:`Small` would describe it."""
    torch.manual_seed(0)
    manifest = gcfast.Explainer(Small()).build(batches(512)).manifest
    tensors = {
        "embeddings": nn.functional.normalize(torch.randn(rows, DIM), dim=1),
        "channels": torch.rand(rows, CHANNELS).topk(50).indices,
        "weights": torch.rand(rows, 50),
        "offsets": torch.rand(rows),
        "labels": torch.arange(rows) % 100,
        "triplet_counts": torch.ones(rows, dtype=torch.int64),
    }
    Database(tensors, [str(i) for i in range(rows)], manifest).save(folder)


def append_peak(rows: int, folder: Path) -> dict[str, float]:
    """Growth of the peak of resident memory, mapped pages included, over an append of 512 rows.

    Args:
        rows: N, what the database in the folder has.
        folder: where it is.
    """
    torch.manual_seed(0)
    explainer = gcfast.Explainer(Small())
    explainer.build(batches(512))
    explainer.append(batches(512))  # what does not depend on N
    explainer.database = Database.open(folder)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = resident_mib()
    start = time.perf_counter()
    explainer.append(batches(512))
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    return {"rows": rows, "growth_mib": peak - before, "n_by_d_mib": rows * DIM * 4 / 2**20,
            "seconds": seconds}  # fmt: skip


def many_shards(count: int, folder: Path) -> None:
    """A database of so many shards of 16,384 rows, all of them hard links to one file."""
    stored_rows(16_384, folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    (entry,) = manifest["shards"]
    names = [f"rows-{number:05d}.safetensors" for number in range(count)]
    for name in names[1:]:
        (folder / name).hardlink_to(folder / entry["file"])
    manifest["shards"] = [entry | {"file": name} for name in names]
    path.write_text(json.dumps(manifest))


def opening(folder: Path) -> dict[str, float]:
    """What it takes to open a database."""
    before, start, cpu = resident_mib(), time.perf_counter(), time.process_time()
    database = Database.open(folder)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    growth = resident_mib() - before
    return {"rows": len(database), "seconds": seconds, "cpu_seconds": cpu, "growth_mib": growth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 40_000])
    parser.add_argument("--one", help=argparse.SUPPRESS)  # rows,method,spool of a single build
    parser.add_argument("--append", type=int, nargs="+", help="only append, to so many rows")
    parser.add_argument("--open", type=int, help="only open, so many shards")
    parser.add_argument("--opened", type=Path, help=argparse.SUPPRESS)  # folder of a single open
    parser.add_argument("--appended", help=argparse.SUPPRESS)  # rows,folder of a single append
    arguments = parser.parse_args()
    if arguments.appended:
        rows, folder = arguments.appended.split(",", 1)
        print(json.dumps(append_peak(int(rows), Path(folder))))
        return
    if arguments.append:
        print(conditions())
        for rows in arguments.append:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "db")
                stored_rows(rows, path)
                print(f"append: {child('--appended', f'{rows},{path}')}", flush=True)
        return
    if arguments.opened:
        print(json.dumps(opening(arguments.opened)))
        return
    if arguments.open:
        print(conditions())
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "db")
            many_shards(arguments.open, path)
            for _ in range(3):
                print(f"open: {child('--opened', str(path))}", flush=True)
        return
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
            out = child("--one", f"{rows},{method},{spool}")
            how = f"spool up to {spool} MiB in memory" if spool else "streamed into a folder"
            print(f"build, {method}, {how}: {out}")


if __name__ == "__main__":
    main()
