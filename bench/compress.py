"""Compressed databases: what k-means takes, what it saves, and how the maps change.

    python bench/compress.py [--rows 1000000] [--centers 50 1000 10000] [--json FILE]
    python bench/compress.py --demo [--json FILE]
    python bench/compress.py --scenes [--stamps DIR] [--cache DIR] [--json FILE]

The first form compresses synthetic rows in clusters, whose grad-weights go with the cluster, and
compares the maps of new embeddings through the whole database and through the compressed one. The
second compresses the demonstration's database as far as the paper does, by 120, and scores the
maps of the unseen birds. The third does so with the training pictures of bench/scenes.py, whose
options it takes, and scores its pictures as it does: share and right are of the object of the class
of the nearest row of the whole database, for every database alike. Each has a control: as many rows
drawn at random in the place of the centres, five times in the second and third form.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from paired import conditions
from torch import Tensor

import gcfast
from gcfast import metrics, ops
from gcfast.database.compress import ROWS_AT_ONCE
from gcfast.database.database import Database
from gcfast.database.manifest import FORMAT_VERSION
from gcfast.database.shards import FIELDS
from gcfast.evaluation.table import tables_from, upsampled
from gcfast.evaluation.ways import Query, Trained, Way, database_ways
from gcfast.metrics import box_score, mask_score

DIM, CHANNELS, KEPT, SIDE = 128, 512, 50, 7
CLUSTERS = 2000
QUERIES = 256
DRAWS = 5  # of the control
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


@dataclass(frozen=True)
class Subject:
    """A database to explain from."""

    name: str
    database: Database
    draw: int  # of random rows, 0 otherwise
    seconds: float | None  # that it took to compress


def fold(database: Database) -> int:
    """The centres of the paper's saving."""
    return max(1, round(len(database) / PAPER_FOLD))


def subset(database: Database, count: int, draw: int = 0) -> Database:
    """The control: rows drawn at random."""
    chosen = torch.randperm(len(database), generator=torch.Generator().manual_seed(1 + draw))
    chosen = chosen[:count]
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
    for centers in options.centers or [50, 1_000, 10_000]:
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


def subjects(whole: Database, counts: Sequence[int], iterations: int) -> list[Subject]:
    """The whole database, then for each count its centres and as many random rows, DRAWS times."""
    whole.compress(1, iterations=1)  # FAISS is loaded before anything is timed
    out = [Subject("all rows", whole, 0, None)]
    for count in dict.fromkeys(min(count, len(whole)) for count in counts):
        began = time.perf_counter()
        small = whole.compress(count, iterations=iterations)
        seconds = time.perf_counter() - began
        out.append(Subject(f"{count} centres", small, 0, seconds))
        out += [
            Subject(f"{count} random rows", subset(whole, count, draw), draw, None)
            for draw in range(DRAWS)
        ]
    return out


def facts_of(found: Sequence[tuple[Subject, dict[str, float]]]) -> list[dict[str, Any]]:
    """What there is to say of each subject, the draws of random rows as their mean."""
    out: dict[str, dict[str, Any]] = {}
    for one, scores in found:
        if one.draw == 0:
            sizes = stored_bytes(one.database)
            out[one.name] = {
                "database": one.name,
                "rows": len(one.database),
                "row_bytes, folder_bytes": sizes,
                "seconds": one.seconds,
                **dict.fromkeys(scores, 0.0),
            }
        drawn = DRAWS if one.name.endswith("random rows") else 1
        for score, value in scores.items():
            out[one.name][score] += value / drawn
    print(json.dumps(list(out.values()), indent=1))
    return list(out.values())


def of_the_demonstration(options: argparse.Namespace) -> list[dict[str, Any]]:
    from gcfast.demo import run as demo
    from gcfast.demo.network import load_network

    train = demo._draw(demo.TRAINING_LABELS, options.each, 0, 0, "drawing", False)
    unseen = demo._draw(demo.UNSEEN_LABELS, options.unseen, 0, 1, "drawing", False)
    explainer = gcfast.Explainer(load_network(), layer=demo._LAYER)
    whole = explainer.build(train)
    counts = [fold(whole), *(options.centers or [50])]
    found, truths = [], []
    for one in subjects(whole, counts, options.iterations):
        explainer.database = one.database
        scores: dict[str, list[Tensor]] = {}
        for number, (images, truth) in enumerate(demo.scored(unseen.pictures)):
            got = explainer.explain_batch(images)
            if one.database is whole:
                truths.append(got)
            shares = {
                "cosine with all rows": metrics.cosine(got, truths[number]),
                "box": box_score(got, truth.boxes),
                "mask": mask_score(got, truth.birds),
                "part": mask_score(got, truth.parts),
            }
            for score, values in shares.items():
                scores.setdefault(score, []).append(values)
        found.append((one, {s: float(torch.cat(v).nanmean()) for s, v in scores.items()}))
    return facts_of(found)


def of_scenes(options: argparse.Namespace, rest: Sequence[str]) -> list[dict[str, Any]]:
    import scenes
    import scenes_quality

    scene = scenes.parse(rest)
    if scene.threads:
        torch.set_num_threads(scene.threads)
    rows, one, two = scenes.compose_all(scene, scenes.load_photographs())
    network, learnt = scenes.fine_tune(scene, rows, one, False)
    print(learnt)
    explainer = gcfast.Explainer(network, scenes.LAYER, seed=scene.seed)
    trained = Trained(explainer, scenes_quality.Rows(rows), False)
    counts = [fold(trained.database), *(options.centers or [50, len(set(rows.names))])]
    several = subjects(trained.database, counts, options.iterations)
    databases = {f"{subject.name}, {subject.draw}": subject.database for subject in several}
    cosines: dict[str, list[Tensor]] = {name: [] for name in databases}
    decided: dict[str, list[Tensor]] = {name: [] for name in databases}

    def watch(
        _images: Tensor, truth: Any, query: Query, ways: Sequence[Way], maps: Sequence[Tensor]
    ) -> None:
        names = [way.name for way in ways]
        H, W = maps[0].shape[2:]
        large = upsampled(maps[0], (8 * H, 8 * W))  # as the fidelity is measured
        for name, database in databases.items():
            pair = large[:, names.index(name)], large[:, names.index("all rows, 0")]
            cosines[name].append(metrics.cosine(*pair))
            if len(truth.names[0]) == 2:
                nearest = ops.knn(query.embeddings, database.embeddings, 1)[1][:, 0]
                labels = [database.label_name(i) for i in database.labels[nearest].tolist()]
                decided[name].append(scenes_quality.matches(truth.names, labels) >= 0)

    (table,) = tables_from(
        trained,
        scenes_quality.Queries([one, two]),
        scenes_quality.SceneScore(),
        centers=(0.0,),
        seed=scene.seed,
        further=(database_ways(databases),),
        watch=watch,
    )
    found = []
    for subject, name in zip(several, databases, strict=True):
        scores = {
            "cosine with all rows": float(torch.cat(cosines[name]).mean()),
            **{column: float(v.nanmean()) for column, v in table.extra[name].items()},
            "nearest is of one of the two": float(torch.cat(decided[name]).float().mean()),
        }
        found.append((subject, scores))
    return facts_of(found)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # or it would take options of bench/scenes.py for its own
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--centers", type=int, nargs="+", help="besides the paper's 120-fold")
    parser.add_argument("--iterations", type=int, default=25, help="of the k-means")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--demo", action="store_true")
    form.add_argument("--scenes", action="store_true", help="takes options of bench/scenes.py")
    parser.add_argument("--each", type=int, default=24, help="pictures a training species")
    parser.add_argument("--unseen", type=int, default=8, help="pictures an unseen species")
    parser.add_argument("--json", type=Path)
    options, rest = parser.parse_known_args(arguments)
    if rest and not options.scenes:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    record: dict[str, Any] = {"conditions": conditions()}
    print(record)
    if options.scenes:
        record["results"] = of_scenes(options, rest)
    elif options.demo:
        record["results"] = of_the_demonstration(options)
    else:
        record["results"] = of_synthetic_rows(options)
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
