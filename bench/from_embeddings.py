"""A database from embeddings alone: how long 10⁶ rows take.

    python bench/from_embeddings.py [--rows 1000000] [--part 20000] [--json FILE]
    python bench/from_embeddings.py --whole "DistanceDifference, all" [--json FILE]

Builds a database of made embeddings (D = 128, those of bench/triplet_cost.py: 1,000 classes, 2.7 %
of the pairs valid at a margin of 0.2) for a network whose layer has C = 512 channels; M = 50 are
kept. The rows of a few images are the network's own, as a build checks. Reported are milliseconds
for a row that is made on demand (the median over rows asked for one at a time, and per row in
batches of 64), on one thread; seconds for the first --part rows of the table, as many at once as a
build makes, on one thread; and seconds to read the embeddings back from FAISS indexes. With --whole
it is seconds of one build of all rows, on all threads. Each by the clock and in processor time,
which other jobs on the machine stretch less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import torch
from paired import conditions
from torch import Tensor, nn
from triplet_cost import MARGIN, D, made, noise_for

import gcfast
from gcfast.builder.given.on_demand import OnDemandDatabase
from gcfast.builder.given.vectors import read_vectors

C, M, CLASSES, VALID = 512, 50, 1000, 0.027
CHECKED = 8
INDEXES = ("Flat", "IVF1024,Flat", "IVF1024,SQ8")
TRAINING = 50_000
# What is built in full, and what is made on demand: (objective, triplets).
BUILT: dict[str, tuple[gcfast.Objective, Any]] = {
    "DistanceDifference, all": (gcfast.DistanceDifference(), "all"),
    "TripletLoss, 50 drawn": (gcfast.TripletLoss(MARGIN), 50),
}
ON_DEMAND = BUILT | {"TripletLoss, all": (gcfast.TripletLoss(MARGIN), "all")}


def network() -> nn.Module:
    """Images [B, 3, h, w] to [B, D], over C channels."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, C, 3, stride=2), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, D))
    return nn.Sequential(backbone, *head).eval()


class Taken(NamedTuple):
    """What a call took, in seconds."""

    clock: float
    processor: float  # of all threads


def timed(call: Callable[[], Any]) -> tuple[Taken, Any]:
    clock, processor = time.perf_counter(), time.process_time()
    result = call()
    return Taken(time.perf_counter() - clock, time.process_time() - processor), result


def record(taken: Taken | Sequence[Taken], scale: float = 1.0) -> dict[str, float]:
    """The medians, multiplied by ``scale``."""
    every = [taken] if isinstance(taken, Taken) else taken
    return {
        name: scale * statistics.median(values)
        for name, values in zip(Taken._fields, zip(*every, strict=True), strict=True)
    }


def table(model: nn.Module, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """(embeddings [rows, D], labels [rows], images of the first rows)."""
    embeddings, labels = made(rows, CLASSES, noise_for(VALID))
    images = torch.randn(CHECKED, 3, 16, 16)
    with torch.no_grad():
        embeddings[:CHECKED] = nn.functional.normalize(model(images), dim=1)
    return embeddings, labels, images


def build(
    model: nn.Module,
    columns: tuple[Tensor, Tensor, Tensor],
    settings: tuple[gcfast.Objective, Any],
    rows: str,
) -> gcfast.Database:
    embeddings, labels, images = columns
    objective, triplets = settings
    explainer = gcfast.Explainer(model, "0", objective=objective, triplets=triplets, channels=M)
    return explainer.build_from_embeddings(
        embeddings, labels, sample=images, check=(images, range(CHECKED)), rows=rows, progress=True
    )


def on_demand(database: gcfast.Database, batch: int = 64, single: int = 20) -> dict[str, Any]:
    """Milliseconds of the first row, of a row asked for alone, and of one in a batch."""
    assert isinstance(database, OnDemandDatabase)
    rows = torch.randperm(len(database), generator=torch.Generator().manual_seed(3))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    first, _ = timed(lambda: database.make(rows[:1]))
    alone = rows[1 : single + 1].view(single, 1)
    together = rows[single + 1 : single + 1 + 3 * batch].view(3, batch)
    found = {
        "first_ms": record(first, 1e3),
        "alone_ms": record([timed(partial(database.make, some))[0] for some in alone], 1e3),
        "in_a_batch_ms": record(
            [timed(partial(database.make, some))[0] for some in together], 1e3 / batch
        ),
    }
    torch.set_num_threads(threads)
    return found


def part_of(database: gcfast.Database, count: int) -> dict[str, Any]:
    """Seconds for the first rows of a table, from nothing."""
    assert isinstance(database, OnDemandDatabase)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    taken, _ = timed(partial(database.make, torch.arange(count)))
    torch.set_num_threads(threads)
    return {"rows": count} | record(taken)


def reading(embeddings: Tensor) -> dict[str, Any]:
    """Seconds to read all vectors back from each kind of index."""
    times = {}
    for factory in INDEXES:
        index = faiss.index_factory(embeddings.shape[1], factory)
        index.train(embeddings[:TRAINING].numpy())
        index.add(embeddings.numpy())
        times[factory] = record(timed(partial(read_vectors, index))[0])
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--part", type=int, default=20_000)
    parser.add_argument("--whole", choices=BUILT)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = network()
    columns = table(model, options.rows)
    found: dict[str, Any] = {
        "conditions": conditions(),
        "rows": options.rows,
        "threads": torch.get_num_threads(),
        "on_demand": {},
        "part_s": {},
        "read_s": {},
        "built_s": {},
    }

    def keep(what: str, name: str, value: Any) -> None:
        found[what][name] = value
        print(what, name, value, flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))

    if options.whole:
        taken, _ = timed(partial(build, model, columns, BUILT[options.whole], "all"))
        keep("built_s", options.whole, record(taken))
        return
    for name, settings in ON_DEMAND.items():
        taken, database = timed(partial(build, model, columns, settings, "on-demand"))
        keep("on_demand", name, {"begun_s": record(taken)} | on_demand(database))
    for name, settings in BUILT.items():
        database = build(model, columns, settings, "on-demand")
        keep("part_s", name, part_of(database, min(options.part, options.rows)))
    for name, value in reading(columns[0]).items():
        keep("read_s", name, value)


if __name__ == "__main__":
    main()
