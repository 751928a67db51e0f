"""What Ray Data costs next to the work itself, and what a row and a map take on disk.

    python bench/ray_cost.py [--json FILE]

The pieces of the cost model in docs/how-to/ray.md that can be measured on one machine: a batch of
prepared pictures through an actor that does nothing, against the same batches in this process; the
rows of stage 2 a second, from tables of several sizes; the bytes of a row, of an embedding and of
a map, and how fast a part is written and read; JPEG files decoded a second. Two CPUs, an object
store of 512 MiB. All but the first are in processor time of one thread, which other jobs on the
machine stretch less than the time on the clock.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import numpy as np
import ray
import torch
from paired import conditions
from PIL import Image
from triplet_cost import made

import gcfast.ray
from gcfast.builder.embed import Embedded
from gcfast.builder.rows import Rows
from gcfast.images.preprocessing import Preprocessing
from gcfast.method.head import AffineHead
from gcfast.method.objectives import TripletLoss
from gcfast.method.settings import Settings
from gcfast.model.network import Network
from gcfast.ray import parts
from gcfast.ray.cluster import in_batches, in_order

BATCH, SIDE = 32, 224
D, C, M = 128, 2048, 50
NOISE = 1.441  # triplet_cost.noise_for(0.027): the share of valid pairs on a held-out network


class Nothing:
    """An actor that takes a batch and gives back a number."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"sum": np.array([int(batch["view"][0, 0, 0, 0])])}


def views(batch: dict[str, Any]) -> dict[str, Any]:
    """Stand for a decoder: pictures at the network's size."""
    n = len(batch["id"])
    return {"view": np.full((n, SIDE, SIDE, 3), int(batch["id"][0]) % 256, np.uint8)}


def overhead(batches: int, rounds: int) -> dict[str, Any]:
    """Time batches through tasks and an actor, and through two function calls, in turn."""
    on_ray, here = [], []
    for _ in range(rounds):
        dataset = ray.data.range(BATCH * batches, override_num_blocks=4)
        stage = in_batches(dataset, BATCH).map_batches(views, batch_size=None)
        actors = gcfast.ray.pool(1, cpus=0.5).options()
        stage = stage.map_batches(Nothing, batch_size=None, **actors)
        with in_order(stage):
            seen: list[float] = []
            for _ in stage.iter_rows():
                seen.append(time.perf_counter())
        # The first fifth waits for processes to start, which a long run does once.
        first = len(seen) // 5
        on_ray.append((seen[-1] - seen[first]) / (len(seen) - 1 - first))
        start = time.perf_counter()
        for number in range(batches):
            Nothing()(views({"id": np.arange(number * BATCH, (number + 1) * BATCH)}))
        here.append((time.perf_counter() - start) / batches)
    return {
        "batches": batches,
        "ray_ms_a_batch": [round(1e3 * s, 2) for s in on_ray],
        "here_ms_a_batch": [round(1e3 * s, 2) for s in here],
        "overhead_ms_a_batch": 1e3 * (statistics.median(on_ray) - statistics.median(here)),
    }


def rows_a_second(N: int, some: int) -> float:
    """Stage 2 by the closed form: rows of ``some`` images of a table of N, on one thread."""
    embeddings, labels = made(N, 100, NOISE)
    generator = torch.Generator().manual_seed(0)
    head = AffineHead(torch.randn(D, C, generator=generator), torch.zeros(D), True)
    embedded = Embedded(
        embeddings=embeddings[:some],
        labels=labels[:some],
        ids=[str(i) for i in range(some)],
        class_names=[],
        norms=torch.ones(some),
        pixels=torch.full((some,), 49),
        pooled=None,
        mean_activation=torch.ones(C, dtype=torch.float64),
        head=head,
    )
    settings = Settings.checked(
        objective=TripletLoss(), method="gradcam", triplets=50, channels=M, evidence="for",
        l2_normalize=True, on_no_triplet="hardest", seed=0,
    )  # fmt: skip
    network = Network(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), None)
    rows = Rows(network, embedded, settings, everyone=(embeddings, labels), first=0)
    next(iter(rows.made([])))  # once, for the order of the labels and the sketch of the table
    start = time.process_time()
    list(rows.made([]))
    return some / (time.process_time() - start)


def decoded_a_second(pictures: int = 200) -> dict[str, float]:
    """Pictures a second and CPU from JPEG files of 500 × 375 pixels to the network's size."""
    picture = torch.rand(1, 3, 47, 63, generator=torch.Generator().manual_seed(0))
    large = torch.nn.functional.interpolate(picture, (375, 500), mode="bicubic").clamp(0, 1)[0]
    content = io.BytesIO()
    pixels = large.mul(255).to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(content, "jpeg", quality=90)
    prepare = gcfast.ray.Prepare(Preprocessing())
    batch = {"image": np.array([content.getvalue()] * pictures, dtype=object)}
    prepare(dict(batch))
    start = time.process_time()
    prepare(dict(batch))
    return {
        "bytes": float(len(content.getvalue())),
        "a_second": pictures / (time.process_time() - start),
    }


def on_disk(folder: Path, database_rows: int) -> dict[str, Any]:
    """Bytes of a row, an embedding and a map, and the speed of writing and reading parts."""
    random = np.random.default_rng(0)
    n = 1024
    # Smooth, as upsampled maps are.
    coarse = torch.rand(n, 1, 7, 7, generator=torch.Generator().manual_seed(0)) ** 3
    maps = torch.nn.functional.interpolate(coarse, SIDE, mode="bilinear")[:, 0]
    columns = {
        "map, uint8": maps.mul(255).to(torch.uint8).numpy(),
        "map, float32": maps.numpy(),
        "embedding": random.standard_normal((n, D)).astype(np.float32),
    }
    found: dict[str, Any] = {}
    ids = np.array([f"folder/{i:012}.jpg" for i in range(n)], dtype=object)
    for name, values in columns.items():
        write = parts.Write(folder / name, "id")
        seconds, read = [], []
        for number in range(3):
            start = time.process_time()
            write({"id": ids + str(number), "value": values})
            seconds.append(time.process_time() - start)
        for file in parts.listed(folder / name):
            start = time.process_time()
            parts.as_array(parts.read(file.parent, ["value"])["value"].chunk(0))
            read.append(time.process_time() - start)
        size = statistics.mean(f.stat().st_size for f in parts.listed(folder / name))
        found[name] = {
            "bytes": size / n,
            "raw_bytes": values.nbytes / n,
            "written_a_second": n / statistics.median(seconds),
            "read_a_second": n * len(read) / statistics.median(read),
        }
    found["row of a database"] = {"bytes": row_bytes(database_rows)}
    return found


def row_bytes(rows: int) -> float:
    """Bytes of a shard's row with D = 128, M = 50 and an id of 23 characters."""
    from gcfast.database.shards import Shard
    from gcfast.database.write import write_shard

    shard = Shard(
        torch.zeros(rows, D), torch.zeros(rows, M, dtype=torch.int64), torch.zeros(rows, M),
        torch.zeros(rows), torch.zeros(rows, dtype=torch.int64),
        torch.zeros(rows, dtype=torch.int64),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        ids = [f"folder/{i:012}.jpg" for i in range(rows)]
        return float(write_shard(Path(folder), 0, shard, ids)["bytes"]) / rows


def main() -> None:
    """Measure all, and print it as JSON."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    out: dict[str, Any] = {
        **conditions(),
        "ray": ray.__version__,
        "D": D,
        "C": C,
        "M": M,
        "side": SIDE,
    }
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        ray.init(
            num_cpus=2,
            object_store_memory=512 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=folder,
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
        out["overhead"] = overhead(options.batches, options.rounds)
        ray.shutdown()
    out["stage 2, rows a second and CPU"] = {
        str(N): rows_a_second(N, min(N, 2048)) for N in options.rows
    }
    out["decoding"] = decoded_a_second()
    with tempfile.TemporaryDirectory() as folder:
        out["disk"] = on_disk(Path(folder), 4096)
    text = json.dumps(out, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
