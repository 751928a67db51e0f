"""Compressed databases: what k-means takes, what it saves, and how the maps change.

    python bench/compress.py [--rows 1000000] [--centers 50 1000 10000] [--json FILE]
    python bench/compress.py --demo [--json FILE]

The first form compresses synthetic rows in clusters, whose grad-weights go with the cluster, and
compares the maps of new embeddings through the whole database and through the compressed one. The
second compresses the demonstration's database as far as the paper does, by 120, and scores the
maps of the unseen birds. Either has a control: as many rows drawn at random in the place of the
centres.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from paired import conditions
from torch import Tensor

import gcfast
from gcfast import ops
from gcfast.compress import ROWS_AT_ONCE
from gcfast.database import Database
from gcfast.manifest import FORMAT_VERSION
from gcfast.metrics import box_score, mask_score
from gcfast.shards import FIELDS

DIM, CHANNELS, KEPT, SIDE = 128, 512, 50, 7
CLUSTERS = 2000
QUERIES = 256
PAPER_FOLD = 120  # about 5,900 pictures became 50 centres


def points(classes: Tensor, centres: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn((len(classes), DIM), generator=generator) * 0.5 / DIM**0.5
    return F.normalize(centres[classes] + noise, dim=1)


def synthetic(rows: int) -> tuple[Database, Tensor, Tensor]:
    """(a database, embeddings of queries, their activations); weights go with the cluster."""
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn((CLUSTERS, DIM), generator=generator), dim=1)
    typical = torch.randn((CLUSTERS, CHANNELS), generator=generator)
    mean = torch.full((CHANNELS,), 0.3989)  # of the activations below, but for the object
    classes = torch.randint(CLUSTERS, (rows,), generator=generator)
    parts: list[dict[str, Tensor]] = []
    for start in range(0, rows, ROWS_AT_ONCE):
        some = classes[start : start + ROWS_AT_ONCE]
        dense = typical[some] + torch.randn((len(some), CHANNELS), generator=generator)
        channels, weights = ops.top_m(dense * 1e-3, KEPT)
        parts.append(
            {
                "embeddings": points(some, centres, generator),
                "channels": channels,
                "weights": weights,
                "offsets": (weights * mean[channels]).sum(1),
                "labels": some,
                "triplet_counts": torch.full_like(some, 50),
            }
        )
    tensors = {name: torch.cat([part[name] for part in parts]) for name in FIELDS}
    manifest = {
        "format": "gcfast-database",
        "format_version": FORMAT_VERSION,
        "fingerprint": {},
        "layer": "synthetic",
        "settings": {},
        "class_names": [],
        "report": {},
        "mean_activation": mean.double().tolist(),
    }
    queries = torch.randint(CLUSTERS, (QUERIES,), generator=generator)
    activations = torch.randn((QUERIES, CHANNELS, SIDE, SIDE), generator=generator).relu()
    # The object, a corner of the picture, shows the channels that its cluster's rows weigh high.
    activations[:, :, :3, :3] += typical[queries].relu()[:, :, None, None]
    database = Database(tensors, [str(i) for i in range(rows)], manifest)
    return database, points(queries, centres, generator), activations


def subset(database: Database, count: int) -> Database:
    """The control: rows drawn at random."""
    chosen = torch.randperm(len(database), generator=torch.Generator().manual_seed(1))[:count]
    tensors = {name: getattr(database, name)[chosen] for name in FIELDS}
    ids = [database.ids[row] for row in chosen.tolist()]
    return Database(tensors, ids, database.manifest)


def maps(database: Database, queries: Tensor, activations: Tensor, center: float) -> Tensor:
    _, nearest = ops.knn(queries, database.embeddings, 1)
    return ops.sparse_cam(
        activations,
        nearest,
        database.channels,
        database.weights,
        size=(SIDE, SIDE),
        offsets=database.offsets,
        center=center,
    )


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten(1), b.flatten(1)).mean())


def stored_bytes(database: Database, storage: str = "float32") -> tuple[int, int]:
    """Bytes of (the shards of rows, the whole folder, the members' ids included)."""
    with tempfile.TemporaryDirectory() as folder:
        database.save(Path(folder) / "db", storage=storage)
        sizes = {f.name: f.stat().st_size for f in (Path(folder) / "db").iterdir()}
    return sum(size for name, size in sizes.items() if name.startswith("rows-")), sum(
        sizes.values()
    )


def of_synthetic_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    whole, queries, activations = synthetic(options.rows)
    size = stored_bytes(whole)
    wanted = {center: maps(whole, queries, activations, center) for center in (0.0, 1.0)}
    out = []
    for centers in options.centers:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        small = whole.compress(centers, iterations=options.iterations)
        seconds = time.perf_counter() - began
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        random = subset(whole, len(small))
        small_size = stored_bytes(small)
        facts: dict[str, Any] = {
            "rows": len(whole),
            "centers": len(small),
            "iterations": options.iterations,
            "seconds": seconds,
            "peak_grown_mib": grown,
            "row_bytes, folder_bytes": size,
            "compressed": small_size,
            "compressed, float16": stored_bytes(small, "float16"),
            "saving in rows": size[0] / small_size[0],
            "saving of the folder": size[1] / small_size[1],
        }
        for center, truth in wanted.items():
            facts[f"cosine, center={center:g}"] = cosine(
                maps(small, queries, activations, center), truth
            )
            facts[f"cosine of random rows, center={center:g}"] = cosine(
                maps(random, queries, activations, center), truth
            )
        out.append(facts)
        print(json.dumps(facts, indent=1))
    return out


def of_the_demonstration(options: argparse.Namespace) -> list[dict[str, Any]]:
    from gcfast.demo import run as demo
    from gcfast.demo.network import load_network

    train = demo._draw(demo.TRAINING_LABELS, options.each, 0, 0, "drawing", False)
    unseen = demo._draw(demo.UNSEEN_LABELS, options.unseen, 0, 1, "drawing", False)
    explainer = gcfast.Explainer(load_network(), layer=demo._LAYER)
    whole = explainer.build(train)
    count = max(1, round(len(whole) / PAPER_FOLD))
    subjects = {"all rows": whole, f"{count} centres": whole.compress(count)}
    subjects[f"{count} random rows"] = subset(whole, count)
    subjects["50 centres"] = whole.compress(min(50, len(whole)))
    subjects["50 random rows"] = subset(whole, min(50, len(whole)))
    out, truths = [], []
    for name, database in subjects.items():
        explainer.database = database
        scores: dict[str, list[Tensor]] = {}
        agreement = []
        for number, (images, truth) in enumerate(demo.scored(unseen.pictures)):
            got = explainer.explain_batch(images)
            if database is whole:
                truths.append(got)
            agreement.append(cosine(got, truths[number]) * len(images))
            shares = {
                "box": box_score(got, truth.boxes),
                "mask": mask_score(got, truth.birds),
                "part": mask_score(got, truth.parts),
            }
            for score, values in shares.items():
                scores.setdefault(score, []).append(values)
        facts: dict[str, Any] = {
            "database": name,
            "rows": len(database),
            "row_bytes, folder_bytes": stored_bytes(database),
            "cosine with all rows": sum(agreement) / len(unseen.pictures),
        }
        facts |= {score: float(torch.cat(values).nanmean()) for score, values in scores.items()}
        out.append(facts)
        print(json.dumps(facts, indent=1))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--centers", type=int, nargs="+", default=[50, 1_000, 10_000])
    parser.add_argument("--iterations", type=int, default=25, help="of the k-means")
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--each", type=int, default=24, help="pictures a training species")
    parser.add_argument("--unseen", type=int, default=8, help="pictures an unseen species")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    record: dict[str, Any] = {"conditions": conditions()}
    print(record)
    record["results"] = (
        of_the_demonstration(options) if options.demo else of_synthetic_rows(options)
    )
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
