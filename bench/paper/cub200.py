"""The paper's Table 1, Figure 7, localisation and 50 centres: `python bench/paper/cub200.py`.

    cub200.py --root CUB_200_2011   the paper's data: trains its ResNet-50, D = 128, as Wu et al.
                                    2017 (margin loss, distance-weighted sampling), on the species
                                    1-100, and explains the species 101-200
    cub200.py --data scenes         the same on the pictures and the network of bench/scenes.py
    cub200.py --data demo           the same on the drawn birds of `gcfast demo`

The database is built with `gcfast.PAPER` and saved. The table has the paper's rows ("against" is
its sign) beside the other sign and the controls. Published figures stand beside ours where their
source could be read (cub200_published.py).

Writes tables, curves and the database to `--out`. The same seed gives the same tables on the same
machine; a trained network is kept in `--cache` and read from there.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from cub200_data import SUBJECTS, Subject
from cub200_network import SOURCES, TINY
from cub200_published import FIGURES, published
from torch import Tensor

import gcfast
from gcfast import ops
from gcfast.builder.build import in_memory
from gcfast.cli.evaluate import compressor
from gcfast.evaluation.measure import PAPER_ROW, AnnotationScore, Evaluation, evaluate
from gcfast.evaluation.report import draw, write_tables
from gcfast.evaluation.table import MAIN_ROW
from gcfast.evaluation.ways import Trained
from gcfast.metrics import localisation_accuracy

CENTERS = 50
SWEEP = (1, 2, 5, 10, 20, CENTERS, 100, 200, 500)
PACKAGES = ("torch", "numpy", "pytorch-metric-learning", "gcfast")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    here = Path(__file__).parents[1]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--root", type=Path, metavar="DIR", help="CUB-200-2011; for --data cub")
    add("--data", choices=SUBJECTS, help="default: cub with --root")
    add(
        "--backbone",
        choices=("auto", *SOURCES, TINY),
        default="auto",
        help="the ResNet-50; auto takes the first that is installed, with its ImageNet weights",
    )
    add("--imagenet", type=Path, metavar="FILE", help="ImageNet weights of the backbone")
    add("--weights", type=Path, metavar="FILE", help="a trained network that this script saved")
    add("--retrain", action="store_true", help="ignore weights in the cache")
    add("--epochs", type=int, default=20, help="of --steps batches (default: %(default)s)")
    add("--steps", type=int, default=200, help="default: %(default)s")
    add("--size", type=int, default=224, help="side of the network's input (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="%(default)s")
    add("--workers", type=int, default=0, help="processes that decode (default: %(default)s)")
    add("--stamps", type=Path, metavar="DIR", help="of --data scenes, as bench/scenes.py takes it")
    add("--thorough", action="store_true", help="localise every row, and MaxBoxAccV2")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--threads", type=int, help="of torch (default: torch's own choice)")
    add("--out", type=Path, metavar="DIR", help="default: bench/out/cub200-DATA")
    add("--cache", type=Path, default=here / ".cache", metavar="DIR",
        help="trained weights (default: bench/.cache)")  # fmt: skip
    add("--quick", action="store_true", help="few pictures of scenes or demo: shows that it runs")
    options = parser.parse_args(arguments)
    if options.data is None:
        options.data = "cub"
    if (options.data == "cub") != (options.root is not None):
        parser.error("--root is where CUB-200-2011 is: give it, or --data scenes or --data demo")
    options.out = options.out or here / "out" / f"cub200-{options.data}"
    return options


def measure(
    subject: Subject, explainer: gcfast.Explainer, seed: int, thorough: bool = False
) -> tuple[Evaluation, gcfast.Database]:
    """Everything, and the database of the explainer's settings, from one pass over each half."""
    databases = []

    def build(trained: Trained) -> None:
        settings, embedded = explainer.settings, trained.embedded
        databases.append(in_memory(trained.network, subject.train, embedded, settings)[0])

    measured = evaluate(
        explainer,
        subject.train,
        subject.test,
        AnnotationScore(),
        labels=lambda truth: truth.labels,
        localised=lambda truth: truth.localised,
        compress=compressor(),
        center_counts=SWEEP,
        total=subject.images,
        seed=seed,
        thorough=thorough,
        check=build,
        progress=sys.stderr.isatty(),
    )
    return measured, databases[0]


def recall_at_1(explainer: gcfast.Explainer, subject: Subject) -> float:
    """Share of the test images whose nearest other one has the same label."""
    embeddings, labels = [], []
    for images, truth in subject.test:
        output = explainer.network.embed(images).output
        embeddings.append(torch.nn.functional.normalize(output.float(), dim=1).cpu())
        labels += truth.labels
    table = torch.cat(embeddings)
    _, nearest = ops.knn(table, table, 2)
    # The image itself is the nearest, or a twin of it, which then has a place of its own.
    own = torch.arange(len(table))
    other = torch.where(nearest[:, 0] == own, nearest[:, 1], nearest[:, 0]).tolist()
    return sum(labels[i] == labels[j] for i, j in enumerate(other)) / len(table)


def top_channels(database: gcfast.Database, count: int = 5) -> tuple[int, list[float]]:
    """(channels that are first in some row, shares of the rows of the most frequent ones)."""
    first: Tensor = database.channels[:, 0].bincount()
    shares = first.sort(descending=True).values / len(database)
    return int((first > 0).sum()), shares[:count].tolist()


def comparison(measured: Evaluation, recall: float) -> dict[tuple[str, str], float]:
    """Our figures by the names that the published ones have."""
    plain = measured.tables[0.0]
    found = {(row, column): mean for row, means in plain.rows for column, mean in means.items()}
    columns = plain.columns
    if CENTERS in measured.center_counts:
        scores = plain.extra[f"K={CENTERS}"]
        found |= {
            (f"{CENTERS} k-means centres", column): float(scores[column].nanmean())
            for column in columns
        }
    iou = measured.localisation.iou.get(PAPER_ROW)
    if iou is not None:
        found["localisation", "best accuracy at IoU 0.5"] = float(localisation_accuracy(iou).max())
    found["recall@1", "unseen species"] = recall
    return found


def comparison_lines(found: dict[tuple[str, str], float], is_cub: bool) -> list[str]:
    """Ours beside what was published, for the figures that have a place there."""
    lines = [f"{'':44s}{'ours':>8s}{'published':>11s}"]
    for figure in FIGURES:
        value = found.get((figure.row, figure.column))
        if value is None:
            continue
        theirs = published(figure.row, figure.column)
        assert theirs is not None
        # On other data than the paper's a published figure would compare nothing.
        shown = f"{theirs.value:.3f}" if is_cub and theirs.value is not None else "-"
        source = f"  {theirs.source}" if shown != "-" else ""
        lines.append(f"{figure.row + ', ' + figure.column:44s}{value:8.3f}{shown:>11s}{source}")
    return lines


def sensitivity_lines(measured: Evaluation) -> list[str]:
    """The paper's Figure 7a as numbers: each column's mean for each M, for both signs."""
    extra, counts = measured.tables[0.0].extra, measured.channel_counts
    lines = [f"{'M, channels kept':36s}" + "".join(f"{m:7d}" for m in counts)]
    for column in measured.tables[0.0].columns:
        for evidence in ("for", "against"):
            means = [float(extra[f"M={m}, {evidence}"][column].nanmean()) for m in counts]
            lines.append(f"{column + ', ' + evidence:36s}" + "".join(f"{v:7.3f}" for v in means))
    return lines


def localisation_lines(measured: Evaluation) -> list[str]:
    """Accuracy at IoU 0.5 of each row at each threshold of the maximum."""
    found = measured.localisation
    head = "".join(f"{t:7.1f}" for t in found.thresholds)
    lines = [f"{'threshold of the maximum':36s}{head}"]
    for name, iou in found.iou.items():
        cells = "".join(f"{value:7.3f}" for value in localisation_accuracy(iou).tolist())
        lines.append(f"{name:36s}{cells}")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    start = time.perf_counter()
    try:
        subject = SUBJECTS[options.data](options)
    except (FileNotFoundError, ValueError, gcfast.GcfastError) as error:
        sys.exit(str(error))
    print("\n".join([subject.title, *subject.facts, f"seed: {options.seed}"]), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)

    settings: dict[str, Any] = {**gcfast.PAPER, "seed": options.seed}
    explainer = gcfast.Explainer(subject.network, subject.layer, **settings)
    measured, database = measure(subject, explainer, options.seed, options.thorough)
    database.save(options.out / "paper.gcfast", overwrite=True)
    recall = recall_at_1(explainer, subject)

    text = write_tables(measured, options.out, subject.title, seed=options.seed)
    curves = list(draw(measured, options.out, subject.title, seed=options.seed))
    first, shares = top_channels(database)
    found = comparison(measured, recall)
    plain = dict(measured.tables[0.0].rows)
    lines = [
        text,
        "",
        *comparison_lines(found, options.data == "cub"),
        "",
        "sensitivity to M (the paper's Figure 7a)",
        *sensitivity_lines(measured),
        "",
        "accuracy at IoU 0.5",
        *localisation_lines(measured),
        "",
        f"database of gcfast.PAPER: {len(database)} rows; first channels (Figure 7b): {first} of "
        f"{len(database.mean_activation)}, the most frequent in "
        + ", ".join(f"{share:.3f}" for share in shares)
        + " of the rows",
    ]
    centres = [key for key in found if key[0].endswith("k-means centres")]
    for row, column in centres:
        lines.append(
            f"{row}, {column}: {found[row, column]:.3f}, all rows {plain[MAIN_ROW][column]:.3f}"
        )
    if not centres:
        why = "the database has fewer rows" if compressor() else "FAISS is not installed"
        lines.append(f"{CENTERS} k-means centres: not measured, {why}")
    skipped = [] if subject.skipped is None else subject.skipped()
    lines += [f"images that could not be used: {len(skipped)}"]
    lines += [f"  {name}: {reason}" for name, reason in skipped]
    report = "\n".join(lines)
    (options.out / "cub200.txt").write_text(report + "\n", encoding="utf-8")
    (options.out / "cub200.json").write_text(
        json.dumps(
            {
                "data": subject.title,
                "facts": subject.facts,
                "seed": options.seed,
                "images": measured.images,
                "flat": measured.flat,
                "rows": len(database),
                "figures": [
                    {"row": row, "column": column, "value": value}
                    for (row, column), value in found.items()
                ],
                "first_channels": {"distinct": first, "shares": shares},
                "versions": {
                    "python": platform.python_version(),
                    **{package: version(package) for package in PACKAGES},
                },
            },
            indent=1,
        ),
        encoding="utf-8",
    )
    print(report)
    print(f"{measured.images} images, {time.perf_counter() - start:.0f} s; {options.out}: "
          f"cub200.txt, cub200.json, paper.gcfast, {', '.join(curves)}")  # fmt: skip


if __name__ == "__main__":
    main()
