"""The cost of explain_batch from 10^4 to 10^6 rows, and what approximate search does to the maps.

    python bench/scale.py [--rows 10000 31623 100000 316228 1000000] [--out bench/results]

For each number of rows and each index: explain_batch / forward pass (paired), recall@1 against
exact search, and the cosine of each map with the map by exact search. The network is
EfficientNet-Lite0 with ImageNet weights; a database is built on `--built` crops of photographs, a
class a photograph, and queries are other crops of them. A table of N rows lies round the rows that
were built: each takes one of them, moves its embedding up to half of the way to one of its NEAR
nearest and a little at random, scales each of its weights by a random factor, and exchanges a fifth
of its channels for others. So neighbours are about as far apart as those of real pictures are, and
a wrong one lends other weights; how much other is this construction's choice, not a data set's.

Writes scale.json and scale.png (matplotlib).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paired import conditions, paired
from PIL import Image
from scenes_compose import load_photographs
from scenes_network import to_input
from subjects import EMBEDDING, network
from tables import filled
from torch import Tensor

import gcfast

INDICES = ("exact", "Flat", "IVF", "HNSW32")
SIDE = 224
NEAR = 8  # built rows towards which a row may move
NOISE = 0.1 / EMBEDDING**0.5  # of each coordinate: together about a tenth of an embedding's length
EXCHANGED = 5  # one channel in so many


def crops(count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Random squares of the photographs, a quarter to all of the shorter side.

    Returns:
        (float32 [count, 3, 224, 224] as the network takes them, channels-last, and the name of
        each one's photograph).
    """
    rng = np.random.default_rng(seed)
    photographs = load_photographs()
    views, names = [], []
    for i in range(count):
        name, pixels = photographs[i % len(photographs)]
        height, width = pixels.shape[:2]
        side = int(rng.uniform(0.25, 1.0) * min(height, width))
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        cut = Image.fromarray(pixels[top : top + side, left : left + side])
        view = np.asarray(cut.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
        views.append(view[:, ::-1] if rng.random() < 0.5 else view)
        names.append(name)
    return to_input(np.stack(views)).contiguous(memory_format=torch.channels_last), names


def rows_like(built: gcfast.Database, rows: int, channels: int) -> gcfast.Database:
    """A database of N rows round those that were built."""
    generator = torch.Generator().manual_seed(0)
    pick = torch.randint(len(built), (rows,), generator=generator)
    known = built.embeddings
    _, near = gcfast.ops.knn(known, known, NEAR + 1)
    other = near[pick, torch.randint(1, NEAR + 1, (rows,), generator=generator)]
    way = 0.5 * torch.rand((rows, 1), generator=generator)
    embeddings = torch.lerp(known[pick], known[other], way)
    embeddings += NOISE * torch.randn((rows, EMBEDDING), generator=generator)
    kept = built.channels[pick]
    factors = torch.exp(0.5 * torch.randn(kept.shape, generator=generator))
    weights, order = (built.weights[pick] * factors).sort(1, descending=True)
    kept = kept.gather(1, order)
    # For the one that lies half the channels further on; it counts twice where the row has it too.
    kept[:, ::EXCHANGED] = (kept[:, ::EXCHANGED] + channels // 2) % channels
    mean = built.mean_activation
    tensors = {
        "embeddings": torch.nn.functional.normalize(embeddings, dim=1),
        "channels": kept.contiguous(),
        "weights": weights.contiguous(),
        "offsets": (weights * mean[kept]).sum(1),
        "labels": built.labels[pick],
        "triplet_counts": built.triplet_counts[pick],
    }
    return gcfast.Database(tensors, [str(i) for i in range(rows)], built.manifest)


def cosines(maps: Tensor, wanted: Tensor) -> Tensor:
    """[B], 1 where both are flat."""
    one, two = maps.flatten(1), wanted.flatten(1)
    same = (one == 0).all(1) & (two == 0).all(1)
    return torch.where(same, 1.0, torch.cosine_similarity(one, two, dim=1))


def measure(
    explainer: gcfast.Explainer, exact: gcfast.Explainer, asked: list[Tensor], rounds: int
) -> dict[str, Any]:
    recalls, agreements = [], []
    for batch in asked:
        why = explainer.explain_batch(batch, details=True)
        wanted = exact.explain_batch(batch, details=True)
        recalls.append((why.neighbors == wanted.neighbors).float().flatten())
        agreements.append(cosines(why.maps, wanted.maps))
    agreement = torch.cat(agreements)
    model, batch = explainer.network.model, asked[0]
    cost = paired(
        lambda: explainer.explain_batch(batch), lambda: model(batch), rounds=rounds, warmup=1
    )
    return {
        "cost": cost.record(),
        "recall": float(torch.cat(recalls).mean()),
        "cosine_mean": float(agreement.mean()),
        "cosine_tenth": float(agreement.quantile(0.1)),
    }


def plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    rows = [int(n) for n in record["rows"]]
    panels = (
        ("explain_batch / forward pass", lambda m: m["cost"]["ratio"]),
        ("recall@1 against exact search", lambda m: m["recall"]),
        ("cosine of the maps to exact search", lambda m: m["cosine_mean"]),
    )
    for axis, (title, value) in zip(axes, panels, strict=True):
        for name in record["indices"]:
            values = [value(record["rows"][str(n)][name]) for n in rows]
            axis.plot(rows, values, marker="o", label=name)
        axis.set(xscale="log", xlabel="rows", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[10_000, 31_623, 100_000, 316_228, 1_000_000]
    )
    parser.add_argument("--index", nargs="+", default=list(INDICES))
    parser.add_argument("--built", type=int, default=960, help="rows built for real")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=8, help="for recall and agreement")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    record: dict[str, Any] = {
        "conditions": conditions(),
        "batch": arguments.batch,
        "indices": arguments.index,
        "rows": {},
    }
    print(record["conditions"])

    model, layer = network("efficientnet-lite0")
    built = gcfast.Explainer(model, layer).build(
        crops(min(32, arguments.built - start), seed=start)
        for start in range(0, arguments.built, 32)
    )
    channels = len(built.mean_activation)
    asked = [crops(arguments.batch, seed=10_000 + i)[0] for i in range(arguments.batches)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        for rows in arguments.rows:
            database = rows_like(built, rows, channels)
            exact = gcfast.Explainer(model, layer, database)
            found: dict[str, Any] = {}
            for name in arguments.index:
                start = time.perf_counter()
                index = "exact" if name == "exact" else filled(name, database.embeddings)
                made = time.perf_counter() - start
                explainer = gcfast.Explainer(model, layer, database, index=index)
                found[name] = measure(explainer, exact, asked, arguments.rounds)
                found[name]["index_seconds"] = made
                print(
                    f"N = {rows}, {name}: {found[name]['cost']['ratio']:.3f} × forward, recall@1 "
                    f"{found[name]['recall']:.3f}, cosine {found[name]['cosine_mean']:.4f} "
                    f"(lowest tenth {found[name]['cosine_tenth']:.4f}), made in {made:.0f} s"
                )
            record["rows"][str(rows)] = found
            (arguments.out / "scale.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(record, arguments.out / "scale.png")


if __name__ == "__main__":
    main()
