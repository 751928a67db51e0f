"""The paper's second application: `python bench/paper/house_prices.py`.

A rank siamese network learns from pairs of tiles which house sold for more. Its four features join
the attributes of gradient boosting (the paper's Table 2: estimates within 10 % of the price), and
gcfast shows on the tiles what they rest on.

The paper's data set is not public. Without `--tiles` and `--csv` the houses are made up: tiles like
a satellite's whose price depends on attributes and on what is to be seen, with masks of the latter.
With them, anyone's houses are read; house_data.py describes the columns, and what becomes of
missing and impossible values. Houses are split 6:4 by the date of their sale.

Prints both tables; writes house_prices.txt, .csv and .json and overlays to `--out`. The same seed
gives the same tables on the same machine and number of threads.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from house_data import Houses, generate, read_houses
from house_maps import COLUMNS, databases, fidelity, pointing_up, score_table
from house_network import RankSiamese, features_of, pair_accuracy, train
from house_overlays import save_overlays
from house_table import Line, table

QUICK = {"count": 160, "pixels": 48, "epochs": 2}
PACKAGES = ("torch", "numpy", "scikit-learn", "pillow", "gcfast")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiles", type=Path, metavar="DIR", help="folder of tiles")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="sales; needs --tiles")
    parser.add_argument("--masks", type=Path, metavar="DIR", help="folder of masks, if any")
    parser.add_argument("--count", type=int, default=3600, help="made-up houses (%(default)s)")
    parser.add_argument("--pixels", type=int, default=64, help="side of their tiles (%(default)s)")
    parser.add_argument("--epochs", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=here.parent / "out" / "house_prices", metavar="DIR",
        help="tables and overlays (default: bench/out/house_prices)",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true",
        help="few small houses, two epochs: shows that it runs, not how good it is",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if (options.tiles is None) != (options.csv is None):
        parser.error("--tiles and --csv go together")
    if options.masks is not None and options.tiles is None:
        parser.error("--masks needs --tiles and --csv")
    if options.quick:
        for name, value in QUICK.items():
            setattr(options, name, value)
    return options


def load(options: argparse.Namespace) -> tuple[Houses, str]:
    """The houses, and where they are from."""
    if options.tiles is not None:
        return read_houses(options.tiles, options.csv, options.masks), str(options.tiles)
    # Made-up houses go the same way as anyone's: through files and the reader.
    with tempfile.TemporaryDirectory(prefix="gcfast-houses-") as folder:
        where = Path(folder)
        generate(where, count=options.count, pixels=options.pixels, seed=options.seed)
        return read_houses(where / "tiles", where / "sales.csv", where / "masks"), "made up"


def price_lines(lines: Sequence[Line]) -> list[str]:
    """Table 2 as text."""
    out = [f"{'attributes':18s}{'without':>9s}{'features':>10s}{'gain':>8s}   95 % interval"]
    for line in lines:
        out.append(
            f"{line.name:18s}{line.without:9.3f}{line.with_features:10.3f}{line.gain:+8.3f}"
            f"   {line.low:+.3f} to {line.high:+.3f}"
        )
    return out


def map_lines(
    plain: dict[str, dict[str, float]], centred: dict[str, dict[str, float]]
) -> list[str]:
    """The table of the maps as text, without centring and with it side by side."""
    width = max(map(len, plain)) + 2
    cells = "".join(f"{c:>11s}" for c in COLUMNS)
    out = [f"{'':{width}s}{'without centring':^{len(cells)}s}  {'center=1':^{len(cells)}s}",
           f"{'':{width}s}{cells}  {cells}"]  # fmt: skip
    for name, means in plain.items():
        values = ["".join(f"{m[c]:11.3f}" for c in COLUMNS) for m in (means, centred[name])]
        out.append(f"{name:{width}s}{values[0]}  {values[1]}")
    return out


def explain(
    network: RankSiamese, houses: Houses, options: argparse.Namespace
) -> tuple[list[str], dict[str, Any]]:
    """Databases, scores where there are masks, overlays: lines to print and what to keep."""
    progress = sys.stderr.isatty()
    built = databases(network, houses, options.seed, progress=progress)
    dear, cheap = pointing_up(built, houses)
    counts = ", ".join(f"{name} {len(d)}" for name, d in built.items())
    agreement = fidelity(network, houses, built, options.seed)
    lines = [
        f"databases' rows: {counts}",
        "transferred map against the map from the house's own pairs",
        *(f"{name}: {line}" for name, one in agreement.items() for line in str(one).splitlines()),
        f"rows of all pairs whose evidence for is what raises a price: {dear:.3f} of the dearest "
        f"third, {cheap:.3f} of the cheapest",
    ]
    kept: dict[str, Any] = {"raising_rows": {"dearest third": dear, "cheapest third": cheap},
                            "fidelity": {name: float(one.cosine.mean())
                                         for name, one in agreement.items()}}  # fmt: skip
    kept["fidelity of a random row"] = {
        name: float(one.control.mean())
        for name, one in agreement.items()
        if one.control is not None
    }
    save_overlays(network, houses, built, options.out / "house_prices.png", options.seed)
    if houses.masks is None:
        return [*lines, "no masks: maps are not scored"], kept
    tables = [
        {
            row: {column: float(values.nanmean()) for column, values in columns.items()}
            for row, columns in score_table(
                network, houses, built, seed=options.seed, center=center
            ).items()
        }
        for center in (0.0, 1.0)
    ]
    kept["maps"], kept["maps_center_1"] = tables
    return [*lines, "", *map_lines(*tables)], kept


def save(
    folder: Path, text: str, lines: Sequence[Line], kept: dict[str, Any], run: dict[str, Any]
) -> None:
    """The same figures as text, CSV and JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "house_prices.txt").write_text(text + "\n", encoding="utf-8")
    with (folder / "house_prices.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["table", "row", "column", "value"])
        for line in lines:
            for column in ("without", "with_features", "gain", "low", "high"):
                writer.writerow(["prices", line.name, column, f"{getattr(line, column):.6f}"])
        for name in ("maps", "maps_center_1"):
            for row, columns in kept.get(name, {}).items():
                for column, value in columns.items():
                    writer.writerow([name, row, column, f"{value:.6f}"])
    prices = {line.name: {**vars(line), "gain": line.gain} for line in lines}
    (folder / "house_prices.json").write_text(
        json.dumps({"run": run, "prices": prices, **kept}, indent=1), encoding="utf-8"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    try:
        houses, source = load(options)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    print("\n".join(houses.report.lines()), flush=True)
    network, training = train(
        houses.images[: houses.train],
        houses.price[: houses.train],
        epochs=options.epochs,
        seed=options.seed,
        progress=sys.stderr.isatty(),
    )
    features = features_of(network.branch, houses.images)
    n = houses.train
    ranked = [
        pair_accuracy(network, features[part], houses.price[part])
        for part in (slice(None, n), slice(n, None))
    ]
    lines = table(houses, features, options.seed)
    shown, kept = explain(network, houses, options)
    text = "\n".join(
        [
            f"houses: {n} for training, {len(houses) - n} for testing, sold later; {source}",
            f"tiles: {houses.images.shape[1]} x {houses.images.shape[2]}; seed {options.seed}",
            f"rank siamese network: {options.epochs} epochs, loss {training.losses[0]:.4f} to "
            f"{training.losses[-1]:.4f}; pairs ordered as they sold: {ranked[0]:.3f} of the "
            f"training houses', {ranked[1]:.3f} of the test houses'",
            "",
            "share of the test houses whose estimate is within 10 % of the price",
            *price_lines(lines),
            "",
            *shown,
        ]
    )
    seconds = time.perf_counter() - start
    run = {
        "seed": options.seed,
        "train": n,
        "test": len(houses) - n,
        "pixels": houses.images.shape[1],
        "epochs": options.epochs,
        "losses": training.losses,
        "pair_accuracy": ranked,
        "left_out": houses.report.skipped,
        "imputed": houses.report.imputed,
        "seconds": {"all": round(seconds, 1), "training": round(training.seconds, 1)},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
    }
    save(options.out, text, lines, kept, run)
    print(f"\n{text}\n\n{seconds:.0f} s, of which training {training.seconds:.0f} s, "
          f"{options.threads} thread(s)\nwritten to {options.out}")  # fmt: skip


if __name__ == "__main__":
    main()
