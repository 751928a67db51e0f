"""The cost of drawing a row's triplets as the table grows, on one CPU thread or a GPU.

    python bench/triplet_cost.py [--rows 10000 100000 1000000] [--kinds 0 3] [--out bench/results]
    python bench/triplet_cost.py --envelope

Embeddings are made: centres of classes uniform on the sphere, D = 128, and each row its class's
centre plus noise, normalized. The noise is chosen so that a given share of the pairs is valid at a
margin of 0.2, over all rows together; rows differ. Classes: 100 of them, or products, N / 3 classes
of about 3 rows. T = 50 triplets are drawn for anchors taken at random, as many together as a build
draws for.

A time is the median of ROUNDS calls after one, in processor time of the one thread, which other
jobs on the machine stretch less than the time on the clock, or by CUDA events.

With --envelope: whether drawing from a part of the table would pay. Rows go to cells by k-means,
and for an anchor a cell is left out when the triangle inequality shows that it holds no row under
the largest threshold. Reported is the share of the rows that is left to draw from, by the number
of dimensions that the centres and the noise span.

Writes triplet_cost.json and triplet_cost.png (matplotlib), or triplet_envelope.json. What the file
has of other rows and kinds stays.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from paired import conditions
from torch import Tensor

from gcfast import ops, reference

D, T, MARGIN = 128, 50, 0.2
ROUNDS = 3
CHUNK = 100_000  # rows made at once


class Kind(NamedTuple):
    """A kind of table."""

    name: str
    share: float  # of the pairs that are valid
    products: bool = False  # N / 3 classes in place of 100


KINDS = (
    Kind("100 classes, 2.7 % of the pairs valid", 0.027),
    Kind("100 classes, 1 % valid", 0.01),
    Kind("100 classes, 0.1 % valid", 0.001),
    Kind("N / 3 classes, 0.01 % valid", 0.0001, products=True),
)


def spanned(count: int, dims: int, generator: torch.Generator) -> Tensor:
    """Vectors [count, D] of squared length 1 on average that span the first ``dims`` dimensions."""
    vectors = torch.zeros(count, D)
    vectors[:, :dims] = torch.randn(count, dims, generator=generator) / dims**0.5
    return vectors


def noise_for(share: float, dims: int = D) -> float:
    """The noise, as a multiple of a centre's length, at which this share of triplets is valid."""
    generator = torch.Generator().manual_seed(1)
    count = 200_000
    own, other = (F.normalize(spanned(count, dims, generator), dim=1) for _ in range(2))
    noises = [spanned(count, dims, generator) for _ in range(3)]
    low, high = 0.02, 20.0
    for _ in range(20):
        noise = (low * high) ** 0.5
        a, p, n = (
            F.normalize(centre + noise * vector, dim=1)
            for centre, vector in zip((own, own, other), noises, strict=True)
        )
        valid = (a - p).square().sum(1) + MARGIN > (a - n).square().sum(1)
        low, high = (noise, high) if valid.float().mean() < share else (low, noise)
    return noise


def made(rows: int, classes: int, noise: float, dims: int = D) -> tuple[Tensor, Tensor]:
    """Embeddings [rows, D] and labels [rows]."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(classes, (rows,), generator=generator)
    centres = F.normalize(spanned(classes, dims, generator), dim=1)
    embeddings = torch.empty(rows, D)
    for start in range(0, rows, CHUNK):
        part = labels[start : start + CHUNK]
        vectors = centres[part] + noise * spanned(len(part), dims, generator)
        embeddings[start : start + CHUNK] = F.normalize(vectors, dim=1)
    return embeddings, labels


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """The median of ROUNDS calls after one."""
    call()
    taken = []
    for _ in range(ROUNDS):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.process_time()
            call()
            taken.append(time.process_time() - start)
    return statistics.median(taken)


def measure(kind: Kind, rows: int, anchors: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds a row, with tries and by scans alone, and how many rows are scanned."""
    classes = max(1, rows // 3) if kind.products else 100
    embeddings, labels = (t.to(device) for t in made(rows, classes, noise_for(kind.share)))
    order = reference.label_order(labels)
    start = time.perf_counter()
    sketch = None if device.type == "cuda" else reference.label_sketch(embeddings, order)
    sketched = time.perf_counter() - start

    def draw(count: int, **options: Any) -> ops.Triplets:
        chosen = torch.randperm(rows, generator=torch.Generator().manual_seed(3))[:count].to(device)
        one = (embeddings[chosen], labels[chosen], chosen, embeddings, labels, order, sketch)
        return ops.sample_triplets(*one, triplets=T, margin=MARGIN, **options)

    anchors = min(anchors, rows)
    few = min(64, anchors)
    drawn = draw(anchors)
    tried = ~drawn.exact
    pairs = drawn.counts.double()
    found = {
        "ms_a_row": 1e3 * seconds(lambda: draw(anchors), device) / anchors,
        "ms_a_row_scanned": 1e3 * seconds(lambda: draw(few, tries=0), device) / few,
        "scanned": float(drawn.exact.double().mean()),
        "share_valid": float(pairs.mean()) / ((rows / classes - 1) * rows * (1 - 1 / classes)),
        "anchors": anchors,
        "sketch_s": sketched,
    }
    if bool(tried.any()):
        own = tried.nonzero().flatten()[:256]

        def only_tried() -> None:
            chosen = torch.randperm(rows, generator=torch.Generator().manual_seed(3))
            chosen = chosen[:anchors].to(device)[own]
            one = (embeddings[chosen], labels[chosen], chosen, embeddings, labels, order, sketch)
            ops.sample_triplets(*one, triplets=T, margin=MARGIN)

        found["ms_a_row_tried"] = 1e3 * seconds(only_tried, device) / len(own)
        found["share_valid_tried"] = float(pairs[tried].mean()) / (
            (rows / classes - 1) * rows * (1 - 1 / classes)
        )
    return found


def plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    for kind in KINDS:
        found = record["kinds"][kind.name]
        rows = sorted(map(int, found))
        (line,) = axis.plot(
            rows, [found[str(n)]["ms_a_row"] for n in rows], marker="o", label=kind.name
        )
        axis.plot(
            rows, [found[str(n)]["ms_a_row_scanned"] for n in rows],
            linestyle=":", color=line.get_color(),
        )  # fmt: skip
    axis.plot([], [], linestyle=":", color="gray", label="the same, every row scanned")
    axis.set(xscale="log", yscale="log", xlabel="rows", ylabel="ms a row")
    axis.set_title(f"drawing {T} triplets, D = {D}, {record['device']}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def left_to_draw_from(kind: Kind, rows: int, dims: int, anchors: int = 200) -> dict[str, float]:
    """The mean share of the rows in cells that the triangle inequality does not leave out."""
    classes = max(1, rows // 3) if kind.products else 100
    embeddings, labels = made(rows, classes, noise_for(kind.share, dims), dims)
    generator = torch.Generator().manual_seed(4)
    cells = round(rows**0.5)
    centres = embeddings[torch.randperm(rows, generator=generator)[:cells]]
    for _ in range(10):
        nearest = torch.cat([(part @ centres.T).argmax(1) for part in embeddings.split(CHUNK)])
        sums = torch.zeros_like(centres).index_add_(0, nearest, embeddings)
        centres = F.normalize(sums, dim=1)
    sizes = torch.bincount(nearest, minlength=cells)
    off = (embeddings - centres[nearest]).norm(dim=1)
    radii = torch.zeros(cells).scatter_reduce_(0, nearest, off, "amax")
    shares, valid = [], []
    for row in torch.randperm(rows, generator=generator)[:anchors].tolist():
        same = labels == labels[row]
        same[row] = False
        if not same.any():
            continue
        distances = (embeddings - embeddings[row]).square().sum(1)
        top = distances[same].max() + MARGIN
        least = ((centres - embeddings[row]).norm(dim=1) - radii).clamp(min=0).square()
        shares.append(float(sizes[least < top].sum()) / rows)
        valid.append(float((distances[labels != labels[row]] < top).double().mean()))
    return {"left": statistics.mean(shares), "under_the_largest_threshold": statistics.mean(valid)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--kinds", type=int, nargs="+", default=range(len(KINDS)))
    parser.add_argument("--anchors", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--envelope", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "conditions": conditions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "one CPU thread",
        "dims": D,
        "triplets": T,
        "margin": MARGIN,
    }
    print(record["conditions"], record["device"])
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.envelope:
        record["left"] = {
            kind.name: {
                str(dims): left_to_draw_from(kind, 10**5, dims) for dims in (4, 8, 16, 32, 128)
            }
            for kind in (KINDS[1], KINDS[3])
        }
        for name, found in record["left"].items():
            for dims, left in found.items():
                print(f"{name}, {dims} dimensions: {left}")
        (arguments.out / "triplet_envelope.json").write_text(json.dumps(record, indent=1) + "\n")
        return
    name = "triplet_cost" if device.type == "cpu" else "triplet_cost-gpu"
    record["kinds"] = {kind.name: {} for kind in KINDS}
    if (arguments.out / f"{name}.json").exists():
        record["kinds"] = json.loads((arguments.out / f"{name}.json").read_text())["kinds"]
    for rows in arguments.rows:
        for kind in (KINDS[number] for number in arguments.kinds):
            found = measure(kind, rows, arguments.anchors, device)
            record["kinds"][kind.name][str(rows)] = found
            print(
                f"N = {rows}, {kind.name}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items())
            )
            (arguments.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(record, arguments.out / f"{name}.png")


if __name__ == "__main__":
    main()
