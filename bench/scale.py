"""The cost of explain_batch from 10^4 to 10^6 rows, and what approximate search does to the maps.

    python bench/scale.py [--rows 10000 31623 100000 316228 1000000] [--out bench/results]

For each number of rows and each index: explain_batch / forward pass (paired), recall@1 against
exact search, and the cosine of each map with the map by exact search. Queries are embeddings of
random images. A table of N rows is made from `--built` rows built for real: each of its rows takes
one of them, moves its embedding at random, scales each of its weights by a random factor, and
exchanges a fifth of its channels for others; so a wrong neighbour lends other weights, but how much
other is this construction's choice, not a data set's.

Writes scale.json and scale.png (matplotlib).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from paired import conditions, paired
from subjects import EMBEDDING, images, loader, network
from tables import filled
from torch import Tensor

import gcfast

INDICES = ("exact", "Flat", "IVF", "HNSW32")
NOISE = 0.05  # of each coordinate of an embedding, before it is normalised again
EXCHANGED = 5  # one channel in so many


def rows_like(built: gcfast.Database, rows: int, channels: int) -> gcfast.Database:
    """A database of N rows round those that were built."""
    generator = torch.Generator().manual_seed(0)
    pick = torch.randint(len(built), (rows,), generator=generator)
    noise = NOISE * torch.randn((rows, EMBEDDING), generator=generator)
    kept = built.channels[pick]
    factors = torch.exp(0.5 * torch.randn(kept.shape, generator=generator))
    weights, order = (built.weights[pick] * factors).sort(1, descending=True)
    kept = kept.gather(1, order)
    # For the one that lies half the channels further on; it counts twice where the row has it too.
    kept[:, ::EXCHANGED] = (kept[:, ::EXCHANGED] + channels // 2) % channels
    mean = built.mean_activation
    tensors = {
        "embeddings": torch.nn.functional.normalize(built.embeddings[pick] + noise, dim=1),
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
    parser.add_argument("--network", default="efficientnet-lite0")
    parser.add_argument("--built", type=int, default=512, help="rows built for real")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=8, help="for recall and agreement")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    record: dict[str, Any] = {
        "conditions": conditions(),
        "network": arguments.network,
        "batch": arguments.batch,
        "indices": arguments.index,
        "rows": {},
    }
    print(record["conditions"])

    model, layer = network(arguments.network)
    built = gcfast.Explainer(model, layer).build(loader(arguments.built, 32, 16))
    channels = len(built.mean_activation)
    shift = torch.linspace(-1, 1, 16)
    asked = []
    for i in range(arguments.batches):
        picked = shift[torch.arange(arguments.batch) % 16][:, None, None, None]
        batch = images(arguments.batch, seed=10_000 + i) + picked
        asked.append(batch.contiguous(memory_format=torch.channels_last))
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
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "scale.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(record, arguments.out / "scale.png")


if __name__ == "__main__":
    main()
